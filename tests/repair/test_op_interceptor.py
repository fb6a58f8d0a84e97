"""Sums and rectifiers are intercepted in every spelling, and corrections there are what the network then computes."""

import math

import pytest
import torch
from cases import batches
from repair_cases import Residual, remove_channels
from torch import nn
from torch.nn import functional as F

from tp_twoaxis.reconstruction.patch_fit import PatchFit
from tp_twoaxis.repair import output_corrector, sequential
from tp_twoaxis.repair.images import RepairImages
from tp_twoaxis.repair.op_interceptor import OpInterceptor, unintercepted


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.act, self.act6 = nn.ReLU(inplace=True), nn.ReLU6()

    def forward(self, x):
        y = self.norm(self.conv(x))
        z = y + y
        z += y
        z = torch.add(self.act(z), self.act6(z) + 1)
        return F.relu(z).relu_() + torch.ones(4, 1, 1)  # broadcasts: a shift, no sum of two branches


@torch.no_grad()
def test_every_spelling_is_intercepted():
    seen = []
    interceptor = OpInterceptor(
        on_add=lambda a, b, out: seen.append("sum"),
        on_rectifier=lambda x, low, high: seen.append((low, high)),
        on_norm=lambda x, out, scale: seen.append(scale.shape),
    )
    net = Everything().eval()
    with interceptor:
        net(torch.randn(2, 3, 4, 4))
    assert seen == [(4,), "sum", "sum", (0.0, math.inf), (0.0, 6.0), "sum", (0.0, math.inf), (0.0, math.inf)]


@torch.no_grad()
def test_the_scale_is_that_of_the_norm():
    norm = nn.BatchNorm2d(3).eval()
    norm.running_var, norm.weight.data = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([1.0, -2.0, 0.0])
    scales = []
    x = torch.randn(2, 3, 4, 4)
    with OpInterceptor(on_norm=lambda x, out, scale: scales.append(scale)):
        difference = norm(x + 1) - norm(x)
        norm.train()(x)  # by the batch's own statistics: none
    (scale, _) = scales
    torch.testing.assert_close(difference.mean((0, 2, 3)), scale)


@torch.no_grad()
def test_callbacks_change_the_pass_and_hooks_are_not_intercepted():
    seen = []

    def double(x, low, high):
        seen.append("rectifier")
        x.mul_(2)

    layer = nn.Identity()
    layer.register_forward_pre_hook(unintercepted(lambda module, inputs: torch.relu(inputs[0] + inputs[0])))
    with OpInterceptor(on_add=lambda a, b, out: seen.append("sum"), on_rectifier=double):
        out = torch.relu(layer(torch.ones(2)) * 1)
    assert out.tolist() == [2.0, 2.0]
    assert seen == ["rectifier"]


def equal(current, reference):
    return reference


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=2), nn.Linear(5, 4)], ids=str
)
def test_a_refinement_is_least_squares_on_what_became_of_the_outputs(layer):
    torch.manual_seed(0)
    layer = layer.double()
    linear = isinstance(layer, nn.Linear)
    x = torch.randn(40, 6, 5).double() if linear else torch.randn(40, layer.in_channels, 6, 6).double()
    scale = torch.tensor([0.5, -2.0, 1.0, 0.0]).double()
    shape = (-1,) if linear else (-1, 1, 1)
    with torch.no_grad():
        fit = PatchFit(layer, images=40, ridge=1e-12)
        fit.update(x, torch.randn_like(layer(x)))
        fit.solve()
        reference, shortcut = torch.randn_like(layer(x)), torch.randn_like(layer(x))
        start = layer.weight.clone()
        current = scale.reshape(shape) * layer(x) + shortcut
        change, shift = fit.refine([x], [current], [reference], scale, equal)
        after = scale.reshape(shape) * (layer(x) + shift.reshape(shape)) + shortcut
    torch.testing.assert_close(layer.weight, start + change)
    # the inputs do not explain the residual, but in the channel of scale 0
    difference = reference - after
    residual = difference.flatten(0, -2) if linear else difference.movedim(1, -1).flatten(0, -2)
    rows = x.flatten(0, -2) if linear else None
    assert residual.mean(0)[:3].abs().max() < 1e-9
    if rows is not None:
        assert (residual[:, :3].T @ (rows - rows.mean(0))).abs().max() < 1e-7
    assert change[3].abs().max() == 0.0


def test_each_round_lowers_the_error_behind_a_rectifier():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3)
    x, reference = torch.randn(64, 3, 8, 8), 2 * torch.randn(64, 8, 6, 6)

    def error(rounds):
        net = nn.Conv2d(3, 8, 3)
        net.load_state_dict(layer.state_dict())
        with torch.no_grad():
            fit = PatchFit(net, images=64)
            fit.update(x, reference)
            current = net(x) + fit.solve().float().reshape(-1, 1, 1)
            for _ in range(rounds):
                change, shift = fit.refine([x], [current], [reference], torch.ones(8), rectified)
                current = current + F.conv2d(x, change) + shift.float().reshape(-1, 1, 1)
            return float((current.relu() - reference.relu()).square().mean())

    def rectified(current, reference):
        return torch.where(reference > 0, reference, current.clamp(max=0))

    errors = [error(rounds) for rounds in (0, 1, 2, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.98 * errors[0]


def refitted():
    """Repair a residual network; give the logits that the pass of the repair saw, and those that the network has."""
    torch.manual_seed(3)
    net = Residual()
    for layer in (net.stem, net.b, net.d):
        nn.init.kaiming_normal_(layer.weight)
    dense, masks = remove_channels(net, torch.randn(1, 3, 8, 8), {"stem": [5, 2], "a": [0, 1], "c": [3]})
    x = batches(256, 256)[0][0]
    read = []
    handle = net.head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].clone()))
    sequential.refit_in_order(net, dense, masks, RepairImages([x], None, False, hold_out=False))
    handle.remove()
    with torch.no_grad():
        wide, narrow = dense_features(dense, x), dense_features(net, x)
    kept = [0, 1, 3, 4]
    return read[-1], narrow, float((narrow - wide[:, kept]).square().mean())


def dense_features(net, x):
    found = []
    handle = net.head.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].clone()))
    net(x)
    handle.remove()
    return found[0]


def test_the_pass_saw_what_the_network_now_computes():
    seen, computed, _ = refitted()
    torch.testing.assert_close(seen, computed, rtol=1e-4, atol=1e-5)


def test_sums_and_rectifiers_are_worth_their_corrections(monkeypatch):
    *_, corrected = refitted()
    monkeypatch.setattr(output_corrector.OutputCorrector, "_correct", lambda *_: None)
    *_, alone = refitted()
    assert corrected < 0.95 * alone
