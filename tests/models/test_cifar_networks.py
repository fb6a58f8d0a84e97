"""The larger CIFAR networks: sizes by hand, shapes by stage, and pruning by Torch-Pruning."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from tp_twoaxis.dependency.flops import count_macs
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.models import build_model
from tp_twoaxis.models.factory import BUILT_IN
from tp_twoaxis.pruning.prune import prune_to_flops

NAMES = ("cifar_resnet18", "cifar_vgg16_bn", "cifar_mobilenet_v2")
IMAGE = torch.zeros(1, 3, 32, 32)


class Tally:
    """Parameters and MACs of layers put down by hand."""

    def __init__(self):
        self.parameters = self.macs = 0

    def conv(self, wide, out, kernel, side, groups=1, bias=False):
        """With its BatchNorm; ``side`` is that of the output."""
        weights = wide // groups * out * kernel**2
        self.parameters += weights + 2 * out + bias * out
        self.macs += weights * side**2

    def linear(self, wide, out):
        self.parameters += wide * out + out
        self.macs += wide * out


def resnet18(classes):
    tally = Tally()
    tally.conv(3, 64, 3, 32)
    for before, width, side in ((64, 64, 32), (64, 128, 16), (128, 256, 8), (256, 512, 4)):
        for wide, out in ((before, width), (width, width), (width, width), (width, width)):
            tally.conv(wide, out, 3, side)
        if before != width:
            tally.conv(before, width, 1, side)
    tally.linear(512, classes)
    return tally


def vgg16_bn(classes):
    tally, before = Tally(), 3
    for side, width, layers in ((32, 64, 2), (16, 128, 2), (8, 256, 3), (4, 512, 3), (2, 512, 3)):
        for _ in range(layers):
            tally.conv(before, width, 3, side, bias=True)
            before = width
    tally.linear(512, classes)
    return tally


def mobilenet_v2(classes):
    tally, before, side = Tally(), 32, 32
    tally.conv(3, 32, 3, 32)
    stages = (
        (1, 16, 1, 32),
        (6, 24, 2, 32),
        (6, 32, 3, 16),
        (6, 64, 4, 8),
        (6, 96, 3, 8),
        (6, 160, 3, 4),
        (6, 320, 1, 4),
    )
    for expansion, width, blocks, out_side in stages:
        for _ in range(blocks):
            hidden = expansion * before
            if expansion > 1:
                tally.conv(before, hidden, 1, side)
            side = out_side
            tally.conv(hidden, hidden, 3, side, groups=hidden)
            tally.conv(hidden, width, 1, side)
            before = width
    tally.conv(320, 1280, 1, 4)
    tally.linear(1280, classes)
    return tally


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(("name", "by_hand"), zip(NAMES, (resnet18, vgg16_bn, mobilenet_v2), strict=True))
def test_parameters_and_macs_by_hand(name, by_hand, classes):
    model, expected = build_model(name, num_classes=classes), by_hand(classes)
    assert sum(p.numel() for p in model.parameters()) == expected.parameters
    assert count_macs(model, IMAGE).total == expected.macs
    assert model(IMAGE.expand(2, -1, -1, -1)).shape == (2, classes)


@pytest.mark.parametrize(("name", "millions"), zip(NAMES, (11.22, 14.77, 2.35), strict=True))
def test_parameters_as_published(name, millions):
    model = build_model(name, num_classes=100)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert model.training


def test_they_are_built_by_name():
    assert set(NAMES) <= set(BUILT_IN)
    with pytest.raises(TwoAxisError, match="cifar_resnet18"):
        build_model("cifar_resnet8")


@pytest.mark.parametrize("name", NAMES)
def test_stems_keep_the_resolution_and_activations_their_scale(name):
    torch.manual_seed(0)
    model = build_model(name)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))
    # He et al.'s fan-out: the replaced stem like the layers that torchvision initialises
    fan_out = first.out_channels * 9
    assert float(first.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    logits = model(torch.randn(8, 3, 32, 32))
    assert 1e-3 < float(logits.detach().std()) < 10


@pytest.mark.parametrize("name", NAMES)
def test_half_the_macs_are_pruned_by_torch_pruning(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=100).eval()
    before = count_macs(model, IMAGE).total
    report = prune_to_flops(model, IMAGE, "l2", flops=0.5, repair=(), progress=False)
    kept = count_macs(model, IMAGE).total / before
    assert abs(kept - 0.5) <= 0.005
    assert report.groups
    assert model(IMAGE).shape == (1, 100)
    model.train()(torch.randn(4, 3, 32, 32)).sum().backward()


def test_a_missing_torchvision_is_one_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(TwoAxisError, match=r"cifar_vgg16_bn: needs torchvision.*install tp-twoaxis\[cli\]"):
        build_model("cifar_vgg16_bn")
