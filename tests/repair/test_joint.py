"""Two layers fitted together: the error falls, the pass sees it, and layers with other consumers do not change."""

import pytest
import torch
from cases import batches
from repair_cases import Residual, remove_channels
from torch import nn

from tp_twoaxis.reconstruction.patch_fit import PatchFit
from tp_twoaxis.repair import joint, sequential
from tp_twoaxis.repair.images import RepairImages
from tp_twoaxis.repair.joint import (
    ProducerOutput,
    RectifiedInput,
    backpropagate,
    has_transpose,
    joint_reconstruction,
)
from tp_twoaxis.repair.op_interceptor import OpInterceptor


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, (3, 1), groups=4, dilation=2),
        nn.Conv1d(4, 3, 3),
        nn.Linear(5, 3),
    ],
    ids=str,
)
def test_backpropagation_is_the_transpose(layer):
    shape = {nn.Linear: (7, 5), nn.Conv1d: (3, 4, 9), nn.Conv2d: (3, 4, 9, 9)}[type(layer)]
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    residual = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, residual)
    with torch.no_grad():
        torch.testing.assert_close(backpropagate(layer, x, residual), expected)


def test_which_layers_have_a_known_transpose():
    assert has_transpose(nn.Linear(2, 2))
    assert has_transpose(nn.Conv2d(2, 2, 3, padding=1))
    assert not has_transpose(nn.Conv2d(2, 2, 3, padding="same"))
    assert not has_transpose(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))


def equal(current, reference):
    return reference


@pytest.mark.parametrize(("groups", "few"), [(1, False), (2, False), (1, True)])
@torch.no_grad()
def test_each_round_lowers_the_error_and_current_is_what_the_layers_compute(groups, few, monkeypatch):
    torch.manual_seed(0)
    if few:  # the rounds work on the first chunk, the others follow
        monkeypatch.setattr(joint, "FEWEST_IMAGES", 10)
        monkeypatch.setattr(joint, "rows_wanted", lambda layer: 1)
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, padding=1, groups=groups)
    dense = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU6(), nn.Conv2d(12, 6, 3, padding=1))
    x = 2 * torch.randn(128, 3, 8, 8)
    scale, factor = torch.tensor([1.0, 0.5, -2.0, 1.0]), torch.tensor([1.0, 2.0, -1.0, 0.5, 1.0, 1.0])
    reference = 3 * dense(x)

    def run():
        before = scale.reshape(-1, 1, 1) * first(x)
        read = before.clamp(0, 6)
        return before, read, factor.reshape(-1, 1, 1) * second(read) + 1

    before, read, current = (tensor.split(50) for tensor in run())
    fit = PatchFit(first, images=128)
    for part in x.split(50):
        fit.update(part, first(part))
    producer = ProducerOutput(first, fit, list(x.split(50)), None, torch.ones(4, dtype=torch.bool), scale)
    rectified = RectifiedInput(producer, list(before), 0.0, 6.0)
    outputs = PatchFit(second, images=128)
    for part in read:
        outputs.update(part, second(part))
    pair = ProducerOutput(second, outputs, list(read), None, torch.ones(6, dtype=torch.bool), factor, rectified)
    errors = [float((torch.cat(current) - reference).square().mean())]
    for _ in range(4):
        pair = joint_reconstruction(pair, list(current), reference.split(50), equal, 1)
        errors.append(float((torch.cat(current) - reference).square().mean()))
        again = run()
        torch.testing.assert_close(again[0], torch.cat(before), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again[2], torch.cat(current), rtol=1e-4, atol=1e-4)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.97 * errors[1]  # the second layer alone is done after one round


class Shared(nn.Module):
    """The rectified outputs of the first layer have one consumer or two."""

    def __init__(self, twice):
        super().__init__()
        self.twice = twice
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.c, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        y = torch.relu_(self.a(x))
        z = torch.relu(self.b(y))
        return self.head((z + self.c(y) if self.twice else z).mean((2, 3)))


@pytest.mark.parametrize(
    ("twice", "joint", "changes"), [(False, True, True), (False, False, False), (True, True, False)]
)
def test_a_layer_with_two_consumers_does_not_change(twice, joint, changes):
    torch.manual_seed(1)
    net = Shared(twice)
    dense, masks = remove_channels(net, torch.randn(1, 3, 8, 8), {"a": [0, 3, 5]})
    before = net.a.weight.clone()
    sequential.refit_in_order(net, dense, masks, RepairImages([batches(128, 128)[0][0]], None, False), joint=joint)
    assert (not torch.allclose(net.a.weight, before, rtol=1e-3)) is changes


def test_fitting_together_is_worth_its_rounds():
    x = batches(256, 256)[0][0]

    def error(joint):
        torch.manual_seed(3)
        net = Residual()
        for layer in (net.stem, net.b, net.d):
            nn.init.kaiming_normal_(layer.weight)
        dense, masks = remove_channels(net, torch.randn(1, 3, 8, 8), {"a": [0, 1, 2], "c": [3]})
        sequential.refit_in_order(net, dense, masks, RepairImages([x], None, False), joint=joint)
        with torch.no_grad():
            return float((net(x) - dense(x)).square().mean())

    assert error(True) < 0.9 * error(False)


@torch.no_grad()
def test_reads_and_results_are_intercepted():
    read, rectified = [], []
    x = torch.randn(2, 3)

    with OpInterceptor(on_rectified=rectified.append, on_read=lambda t: read.append(t is x)):
        y = torch.relu(x)
        z = torch.relu_(y + 1)
    assert rectified[0] is y
    assert rectified[1] is z
    assert read == [True, False, False]
