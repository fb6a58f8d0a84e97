"""Images that no fit sees: which they are, the ridge that they choose, and what they hold back."""

import copy
import math

import numpy as np
import pytest
import torch
from cases import batches, conv_net
from repair_cases import remove_channels
from torch import nn

from tp_twoaxis import calibrate, prune_to_flops
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.reconstruction.patch_fit import PatchFit
from tp_twoaxis.reconstruction.patch_moments import PatchMoments
from tp_twoaxis.reconstruction.ridge import choose_ridge, ridge_fit
from tp_twoaxis.repair import guard, repair_network
from tp_twoaxis.repair.guard import output_distance
from tp_twoaxis.repair.images import RepairImages

X = torch.zeros(1, 3, 8, 8)


def keys(loader):
    return {tuple(image.flatten().tolist()) for batch in loader for image in getattr(batch, "images", batch)}


@pytest.mark.parametrize("size", [1, 7, 40])
def test_the_same_images_are_held_out_however_the_loader_cuts_and_shuffles_them(size):
    x = torch.randn(40, 2)
    images = RepairImages(list(x.split(size)), None, False)
    assert keys([images.held_out]) == keys([x[4::5]])
    assert keys(images.fit_batches) == keys([x]) - keys([x[4::5]])

    class Shuffled:
        def __iter__(self):
            return iter(x[torch.randperm(40)].split(size))

    images = RepairImages(Shuffled(), None, False)
    held_out = keys([images.held_out])
    assert len(held_out) == 8
    for _ in range(2):
        assert keys(images.fit_batches) == keys([x]) - held_out


def test_no_more_images_are_read_than_allowed_and_no_more_held_out_than_needed():
    x = torch.arange(1000.0)[:, None]
    images = RepairImages([x], 50, False)
    assert (len(images.held_out), images.count) == (10, 40)
    images = RepairImages([x], None, False)
    assert (len(images.held_out), images.count) == (128, 872)
    images = RepairImages([x], None, False, hold_out=False)
    assert (images.held_out, images.count, len(keys(images.fit_batches))) == (None, 1000, 1000)


def test_too_few_images_are_said_before_anything_changes_and_the_guard_is_off_by_name():
    net = conv_net()
    before = copy.deepcopy(net.state_dict())
    options = {"flops": 0.6, "loader": batches(8, 8), "progress": False}
    with pytest.raises(TwoAxisError, match=r"expected at least 10 images.*got 8.*guard=False"):
        prune_to_flops(net, X, "l2", repair="sequential", **options)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    report = prune_to_flops(net, X, "l2", repair="sequential", guard=False, **options)
    assert report.achieved == pytest.approx(0.6, rel=0.02)


def moments_of(x, y):
    moments = PatchMoments(x.shape[1], x.shape[2], y.shape[2])
    for part in (slice(0, 3), slice(3, None)):
        moments.update(x[part], y[part])
    return moments


def test_moments_equal_numpy():
    x, y = torch.randn(50, 2, 4) + 100, torch.randn(50, 2, 3) - 7
    moments = moments_of(x, y)
    for block in range(2):
        a, b = x[:, block].double().numpy(), y[:, block].double().numpy()
        a0, b0 = a - a.mean(0), b - b.mean(0)
        np.testing.assert_allclose(moments.scatter[block], a0.T @ a0, rtol=1e-9)
        np.testing.assert_allclose(moments.cross[block], a0.T @ b0, rtol=1e-8, atol=1e-9)
    change, shift = torch.randn(2, 4, 3).double(), torch.randn(2, 3).double()
    errors = y.double() - shift - torch.einsum("nbp,bpo->nbo", x.double(), change)
    expected = float(errors.square().sum((1, 2)).mean())
    assert moments.squared_error(change, shift) == pytest.approx(expected, rel=1e-8)


def test_the_ridge_is_the_best_of_the_decades_on_other_rows():
    torch.manual_seed(0)
    truth = torch.randn(1, 30, 2).double() / 5

    def drawn(n):
        x = torch.randn(n, 1, 30).double()
        return x, torch.einsum("nbp,bpo->nbo", x, truth) + torch.randn(n, 1, 2).double()

    fit, other = moments_of(*drawn(40)), moments_of(*drawn(400))
    found = choose_ridge(fit, other)
    errors = {}
    for power in range(-7, 4):
        solution = ridge_fit(fit, 10.0**power)
        errors[power] = other.squared_error(solution.change, solution.shift)
    assert found.error == pytest.approx(min(errors.values()))
    assert round(math.log10(found.ridge)) == min(errors, key=errors.get)
    assert found.ridge > 1e-3  # 40 rows for 30 numbers, half of them noise


def test_depthwise_blocks_are_fitted_as_each_alone():
    torch.manual_seed(0)
    x, target = torch.randn(20, 3, 7, 7).double(), torch.randn(20, 6, 5, 5).double()
    together = nn.Conv2d(3, 6, 3, groups=3).double()
    alone = [nn.Conv2d(1, 2, 3).double() for _ in range(3)]
    for i, layer in enumerate(alone):
        layer.weight = nn.Parameter(together.weight[2 * i : 2 * i + 2].detach().clone())
        layer.bias = nn.Parameter(together.bias[2 * i : 2 * i + 2].detach().clone())
    with torch.no_grad():
        fit = PatchFit(together, images=20, ridge=1e-3)
        fit.update(x, target)
        shift = fit.solve()
        for i, layer in enumerate(alone):
            own = PatchFit(layer, images=20, ridge=1e-3)
            own.update(x[:, i : i + 1], target[:, 2 * i : 2 * i + 2])
            torch.testing.assert_close(own.solve(), shift[2 * i : 2 * i + 2])
            torch.testing.assert_close(layer.weight, together.weight[2 * i : 2 * i + 2])


@torch.no_grad()
def test_a_fit_that_only_learns_noise_changes_nothing():
    torch.manual_seed(0)
    layer = nn.Linear(40, 3)
    before = layer.weight.clone()
    x = torch.randn(48, 40)
    y = layer(x) + torch.randn(48, 3)
    fit = PatchFit(layer, images=24)
    fit.update(x[:24], y[:24])
    fit.update(x[24:], layer(x[24:]), held_out=True)
    shift = fit.solve()
    fresh = torch.randn(1000, 40)
    moved = ((fresh @ (layer.weight - before).T + shift.float()).square().mean()).sqrt()
    assert moved < 0.25  # least squares alone would move by 1.2
    current = layer(x) + shift.float()
    current, reference = current.split(24), (current + torch.randn(48, 3)).split(24)
    change, _ = fit.refine(x.split(24), current, reference, torch.ones(3), lambda a, b: b)
    assert change.abs().max() < 0.5


def test_output_distance_is_the_squared_error_over_the_variance():
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 2)

        def forward(self, x):
            return {"a": self.a(x), "rest": (self.b(x) + 1e4, x.long())}

    dense, other, x = Two(), Two(), torch.randn(30, 3)
    got = output_distance(other, dense, [x[:11], x[11:]])
    with torch.no_grad():
        y = [torch.cat([m(x)["a"], m(x)["rest"][0]], 1).double() for m in (dense, other)]
    expected = (y[1] - y[0]).square().sum() / (y[0] - y[0].mean(0)).square().sum()
    assert got == pytest.approx(float(expected), rel=1e-4)
    with torch.no_grad():
        other.a.weight.fill_(math.inf)
    assert output_distance(other, dense, [x]) == math.inf


@pytest.mark.parametrize("repair", ["ridge+bn", "patch+bn", "sequential", "joint"])
def test_a_repair_that_does_harm_is_held_back_and_said(repair, monkeypatch):
    """A wrong fit of any kind ends as ``bn``."""
    net, x = conv_net(), batches(64, 32)
    dense, masks = remove_channels(net, X, {"conv1": [0, 2]})
    expected = copy.deepcopy(net)
    repair_network(expected, dense, masks, "bn", loader=RepairImages(x, None, False).fit_batches, progress=False)

    distances = iter([2.0, 1.0])
    monkeypatch.setattr("tp_twoaxis.repair.repair.output_distance", lambda *_: next(distances))
    report = repair_network(net, dense, masks, repair, loader=x, progress=False)
    assert report.distance is not None
    assert report.distance.held_back
    assert {c.repair for c in report.consumers} == {"none"}
    assert any("held back" in note and "BatchNorm statistics alone" in note for note in report.notes)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name])


def test_without_images_nothing_judges_and_that_is_said():
    net = conv_net()
    stats = calibrate(net, batches(64, 32), target=None, consumers=True, progress=False)
    dense, masks = remove_channels(net, X, {"conv1": [0, 2]})
    report = repair_network(net, dense, masks, "ridge", stats=stats, progress=False)
    assert report.distance is None
    assert any("nothing judged the repair" in note for note in report.notes)


def test_networks_of_few_images_are_no_worse_than_with_bn():
    """With random weights little can be repaired from a dozen images; what is tried must not show."""
    for seed in range(3):
        torch.manual_seed(seed)
        dense = conv_net()
        x, fresh = batches(20, 10), batches(200, 100)
        distances = {}
        for repair in ("bn", "sequential", "joint"):
            net = copy.deepcopy(dense)
            prune_to_flops(net, X, "l2", flops=0.4, repair=repair, loader=x, progress=False)
            distances[repair] = guard.output_distance(net, dense, [b[0] for b in fresh])
        assert distances["sequential"] <= 1.1 * distances["bn"]
        assert distances["joint"] <= 1.1 * distances["bn"]
