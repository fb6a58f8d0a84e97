"""Slopes of both axes against autograd on covariances of patches, and the loss's against backward()."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from cases import batches, conv_net
from torch import nn
from torch.nn import functional as F

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.diagnostics.axis_gradients import (
    alignment_table,
    capture_gradient,
    gradients_by_epoch,
    gradients_section,
    information_gradient,
    weight_gradients,
)
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.repair.batch_norm import reestimate_batch_norm
from tp_twoaxis.statistics.targets import task_variables


def covariance(x, y):
    return (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)


def by_autograd(patches, pooled, weights, variable):
    """I and M as functions of the weights of one block of channels; patches [n, p, d], weights [C, d]."""
    weights = weights.clone().requires_grad_()
    rows = patches.flatten(0, 1)
    power = ((weights @ covariance(rows, rows)) * weights).sum(1)
    noise = power.detach().quantile(0.5)
    capture = 0.5 * torch.log1p(power / noise).sum()
    a = weights @ covariance(pooled, variable)[:, 0]
    variance = ((weights @ covariance(pooled, pooled)) * weights).sum(1)
    rho2 = a.square() / (variance * covariance(variable, variable))[0]
    information = -0.5 * torch.log1p(-rho2).sum()
    return [torch.autograd.grad(value, weights, retain_graph=True)[0] for value in (capture, information)]


def test_the_formulas_are_the_slopes():
    torch.manual_seed(0)
    patches = torch.randn(60, 9, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 3.0
    pooled, weights = patches.mean(1), torch.randn(7, 5, dtype=torch.float64)
    variable = pooled[:, :1] + torch.randn(60, 1, dtype=torch.float64)
    rows = patches.flatten(0, 1)
    capture = capture_gradient(weights, weights @ covariance(rows, rows))
    products, c = weights @ covariance(pooled, pooled), covariance(pooled, variable)[:, 0]
    information = information_gradient(weights, products, c.expand_as(weights), covariance(variable, variable)[0, 0])
    for slopes, expected in zip((capture, information), by_autograd(patches, pooled, weights, variable), strict=True):
        np.testing.assert_allclose(slopes.numpy(), expected.numpy(), rtol=1e-9)
    assert float((weights * information).sum(1).abs().max()) < 1e-12


class Mixed(nn.Module):
    """Strides, groups, padding that reflects, dilation, a depthwise layer, rectifiers that work in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 8, (3, 1), padding=(1, 0), groups=2, padding_mode="reflect", bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        self.rectify = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.rectify(self.stem(x))
        x = self.rectify(self.grouped(x))
        return self.fc(self.rectify(self.norm(self.depthwise(x))).mean((2, 3)))


def unfolded(x, layer):
    """Patches [n, p, C_in, taps] by index, padded by hand."""
    pads = layer._reversed_padding_repeated_twice
    x = F.pad(x, pads, mode="reflect" if layer.padding_mode == "reflect" else "constant")
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    patches = []
    for top in range(height):
        for left in range(width):
            taps = [x[:, :, top * sh + i * dh, left * sw + j * dw] for i in range(kh) for j in range(kw)]
            patches.append(torch.stack(taps, 2))
    return torch.stack(patches, 1)


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_of_every_kind_equal_autograd(frozen):
    net = Mixed().double().eval().requires_grad_(not frozen)
    data = [(x.double() + 2, y) for x, y in batches(48)]
    images, labels = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    found = weight_gradients(net, data, progress=False)
    assert list(found) == ["stem", "grouped", "depthwise"]
    assert all(parameter.grad is None for parameter in net.parameters())
    read = {}
    twin = copy.deepcopy(net).requires_grad_()
    for name in found:
        twin.get_submodule(name).register_forward_pre_hook(
            lambda layer, inputs, name=name: read.update({name: inputs[0].detach().clone()})
        )
    logits = twin(images)
    F.cross_entropy(logits, labels).backward()
    variable = task_variables(logits, labels)["margin"]
    for name, slopes in found.items():
        layer = twin.get_submodule(name)
        np.testing.assert_allclose(slopes.loss, layer.weight.grad.flatten(1), rtol=1e-9, atol=1e-14)
        patches = unfolded(read[name], layer)
        inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        weights = layer.weight.detach().flatten(1)
        noise = []
        for block in range(layer.groups):
            rows = patches[:, :, block * inputs : (block + 1) * inputs].flatten(2)
            own = slice(block * outputs, (block + 1) * outputs)
            capture, information = by_autograd(rows, rows.mean(1), weights[own], variable)
            np.testing.assert_allclose(slopes.information[own], information, rtol=1e-7, atol=1e-13)
            # the noise floor is the whole layer's, and only scales each channel's slope
            cosines = F.cosine_similarity(slopes.capture[own], capture)
            assert float((cosines - 1).abs().max()) < 1e-12
            flat = rows.flatten(0, 1)
            noise.append(((weights[own] @ covariance(flat, flat)) * weights[own]).sum(1))
        power = torch.cat(noise)
        along = (slopes.capture * weights).sum(1)
        np.testing.assert_allclose(along, power / (power + power.quantile(0.5)), rtol=1e-9)
        assert float((weights * slopes.information).sum(1).abs().max()) < 1e-10


def test_batches_do_not_matter_and_the_model_comes_back():
    net = conv_net().train()
    before = copy.deepcopy(net.state_dict())
    cut, whole = (weight_gradients(net, batches(48, size), progress=False) for size in (7, 48))
    for name, slopes in whole.items():
        for kind in ("capture", "information", "loss"):
            first, second = getattr(cut[name], kind), getattr(slopes, kind)
            np.testing.assert_allclose(first, second, rtol=2e-3, atol=2e-4 * float(second.abs().max()))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in net.modules())
    assert len(weight_gradients(net, batches(48), layers=["conv2"], max_images=20, progress=False)) == 1


def test_the_table_is_of_mean_cosines_and_leaves_constant_channels_out():
    net = conv_net()
    with torch.no_grad():
        net.conv2.weight[3] = 0.0
    slopes = weight_gradients(net, batches(48), layers=["conv2"], progress=False)
    row = alignment_table(slopes, {"conv2": 0.25}).iloc[0]
    assert (row.layer, row.depth, row.channels, row.weights) == ("conv2", 0.25, 15, 144)

    def cosine(a, b):
        lengths = math.sqrt(float(a @ a) * float(b @ b))
        return float(a @ b) / lengths if lengths else math.nan  # the loss of a channel that is never read stands still

    found = slopes["conv2"]
    kept = [k for k in range(16) if k != 3]
    across = [cosine(found.capture[k], found.information[k]) for k in kept]
    assert row.capture_information == pytest.approx(np.mean(across))
    assert row.absolute == pytest.approx(np.mean(np.abs(across)))
    assert row.descent_capture == pytest.approx(np.nanmean([cosine(-found.loss[k], found.capture[k]) for k in kept]))
    descent = [cosine(-found.loss[k], found.information[k]) for k in kept]
    assert row.descent_information == pytest.approx(np.nanmean(descent))
    draws = np.random.default_rng(0).normal(size=(4000, 144))
    unrelated = np.abs(draws[:, 0] / np.linalg.norm(draws, axis=1)).mean()
    assert row.chance == pytest.approx(unrelated, rel=0.05)


def test_the_section_follows_snapshots():
    net, data = conv_net(), batches(104)
    snapshots = {epoch: conv_net(epoch).state_dict() for epoch in (0, 1, 4)}
    inputs = EvidenceInputs(net, calibrate(net, data, progress=False), data, snapshots=snapshots, progress=False)
    section = gradients_section(inputs)
    assert list(section.tables) == ["gradients", "gradients_by_epoch"]
    over = section.tables["gradients_by_epoch"]
    assert over.groupby("epoch").layer.apply(list).tolist() == [["conv1", "conv2", "depthwise", "reduce"]] * 3
    end = conv_net(4)
    reestimate_batch_norm(end, data, progress=False)
    last = alignment_table(weight_gradients(end, data, progress=False), dict.fromkeys(over.layer, 0.0))
    np.testing.assert_allclose(over[over.epoch == 4].descent_capture, last.descent_capture)
    assert len(section.claims) == 3
    assert [len(drawing.draw().axes) for drawing in section.drawings] == [1, 1]
    inputs.snapshots = {}
    assert list(gradients_section(inputs).tables) == ["gradients"]
    inputs.snapshots = {0: {}, 1: {}, 2: {}}
    with pytest.raises(NotApplicableError, match="another network"):
        gradients_by_epoch(inputs)
    stands = gradients_section(inputs)  # what is of the trained network alone
    assert list(stands.tables) == ["gradients"]
    assert "The course of training is left out: the snapshot of epoch 0" in stands.fails


def test_bad_input():
    net = conv_net()
    with pytest.raises(NotApplicableError, match="no two-dimensional convolution"):
        weight_gradients(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), batches(), progress=False)
    with pytest.raises(TwoAxisError, match="target: expected one of"):
        weight_gradients(net, batches(), target="one_vs_rest", progress=False)
    with pytest.raises(TwoAxisError, match="expected labels"):
        weight_gradients(net, [x for x, _ in batches()], progress=False)
    with torch.no_grad():
        net.fc.weight.zero_()
    with pytest.raises(NotApplicableError, match="same for all 48 images"):
        weight_gradients(net, [(x, torch.zeros_like(y)) for x, y in batches()], progress=False)
    net = conv_net()
    net.unused = nn.Conv2d(3, 3, 1)
    assert "unused" not in weight_gradients(net, batches(), progress=False)
    with pytest.raises(NotApplicableError, match="none of the convolutions ran"):
        weight_gradients(net, batches(), layers=["unused"], progress=False)
