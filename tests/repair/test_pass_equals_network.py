"""A repair that fits layers during a pass leaves a network that computes what its own pass computed."""

import copy
import threading

import pytest
import timm
import torch
import torchvision
from timm.models.resnet import Bottleneck
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

from tp_twoaxis import prune_to_flops
from tp_twoaxis.models.cifar_resnet import cifar_resnet20_conv_shortcut
from tp_twoaxis.reconstruction.patch_fit import PatchFit
from tp_twoaxis.repair.chunk_memory import ChunkMemory
from tp_twoaxis.runtime.kernels import kernel_input, own_forward_obstacle
from tp_twoaxis.runtime.weights import cannot_refit


class InvertedResiduals(nn.Module):
    """Linear outputs of blocks go into a sum and into the next expansion."""

    def __init__(self):
        super().__init__()

        def block(i, h, o):
            return nn.Sequential(
                nn.Conv2d(i, h, 1, bias=False), nn.BatchNorm2d(h), nn.ReLU6(),
                nn.Conv2d(h, h, 3, padding=1, groups=h, bias=False), nn.BatchNorm2d(h), nn.ReLU6(),
                nn.Conv2d(h, o, 1, bias=False), nn.BatchNorm2d(o))  # fmt: skip

        self.a, self.b, self.c, self.fc = block(3, 12, 8), block(8, 24, 8), block(8, 24, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(x)
        x = x + self.b(x)
        x = x + self.c(x)
        return self.fc(x.mean((2, 3)))


class ReadAgain(nn.Module):
    """An operand of a sum, and the input of a rectifier, are read a second time, before or after it."""

    def __init__(self, when):
        super().__init__()
        self.when = when
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 12, 3, padding=1),
            nn.Conv2d(16, 12, 1),
        )
        self.c, self.d = nn.Conv2d(24, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.a(x)
        early = self.d(y) if self.when == "before" else 0
        z = torch.relu(y + self.b(x))
        out = self.c(torch.cat([z, y if self.when == "after" else z], 1))
        return self.fc((torch.relu(out) + 0.1 * out + early).mean((2, 3)))


class PreActivation(nn.Module):
    """Sums are normalised and rectified for one reader and taken as they are by another."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.n1, self.a = nn.BatchNorm2d(12), nn.Conv2d(12, 16, 3, padding=1)
        self.n2, self.b = nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, padding=1)
        self.n3, self.c, self.fc = nn.BatchNorm2d(12), nn.Conv2d(12, 16, 1), nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(self.n2(self.a(self.n1(x).relu())).relu())
        return self.fc(self.c(self.n3(x).relu()).mean((2, 3)))


class SamePad(nn.Conv2d):
    def forward(self, x):
        h, w = x.shape[-2] % 2, x.shape[-1] % 2
        return F.conv2d(F.pad(x, (0, 1 + w, 0, 1 + h)), self.weight, self.bias, self.stride, self.padding)


class Halved(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight / 2, self.bias, self.stride, self.padding)


def plain(kind, kernel, **options):
    layers = []
    for i, o in ((3, 16), (16, 16), (16, 16)):
        layers += [kind(i, o, kernel, bias=False, **options), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def small(name, **options):
    return timm.create_model(name, num_classes=5, **options)


NETWORKS = {
    "inverted residuals": (InvertedResiduals, 12),
    "operand read before": (lambda: ReadAgain("before"), 12),
    "operand read after": (lambda: ReadAgain("after"), 12),
    "pre-activation": (PreActivation, 12),
    "same padding": (lambda: plain(SamePad, 2), 12),
    "other weights": (lambda: plain(Halved, 3, padding=1), 12),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25), 32),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5), 32),
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=5), 48),
    "resnet": (lambda: cifar_resnet20_conv_shortcut(5), 16),
    "bottlenecks": (lambda: timm.models.ResNet(Bottleneck, (1, 1, 1, 1), 5, channels=(8, 8, 16, 16)), 32),
    "mobilenetv2, padding inside forward": (lambda: small("mobilenetv2_035", pad_type="same"), 32),
    "mobilenetv3": (lambda: small("mobilenetv3_small_050"), 32),
}


def settled(name):
    """A float64 network in eval mode whose BatchNorms agree with some images."""
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    net = make().double().train()
    x = torch.randn(24, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(4):
            net(x)
    return net.eval(), x


@pytest.mark.parametrize("repair", ["sequential", "joint"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_what_the_pass_computed(name, repair, monkeypatch):
    """Images run in chunks of at most 8, and half of them join on the way."""
    monkeypatch.setattr("tp_twoaxis.repair.repair.output_distance", lambda *_: 0.0)  # never held back
    monkeypatch.setattr("tp_twoaxis.repair.chunk_memory.CHUNK_IMAGES", 8)
    monkeypatch.setattr(ChunkMemory, "has_room", lambda memory, place, running, more: running < 10 + 8 * place)
    net, x = settled(name)
    seen = []

    def keep(module, inputs, output):
        if module is net and threading.current_thread() is not threading.main_thread():
            seen.append((inputs[0].detach().clone(), output.detach().clone()))

    handle = net.register_forward_hook(keep)
    report = prune_to_flops(net, x[:1], "l2", flops=0.6, repair=repair, loader=[x], progress=False)
    handle.remove()
    rehearsed, *seen = seen
    assert len(rehearsed[0]) == 2
    assert sum(len(images) for images, _ in seen) == len(x)
    assert len(seen) == 5
    assert f"{repair} repair ran on 20 images; its first layers, whose activations are large, on 8 (max_memory)" in (
        report.notes
    )
    with torch.no_grad():
        for images, output in seen:
            assert float((net(images) - output).norm() / output.norm()) < 1e-6


@pytest.mark.parametrize("name", NETWORKS)
def test_no_network_is_left_worse_than_with_bn(name):
    """On the images that judge; these few random ones cannot make any repair good."""
    dense, x = settled(name)
    net = copy.deepcopy(dense)
    report = prune_to_flops(net, x[:1], "l2", flops=0.6, repair="sequential", loader=[x], progress=False)
    assert all(torch.isfinite(t).all() for t in tree_leaves(net(x)))
    assert report.achieved == pytest.approx(0.6, rel=0.05)


@torch.no_grad()
def test_what_reaches_the_kernel_is_what_is_fitted():
    torch.manual_seed(0)
    dense, layer = SamePad(3, 4, 2, stride=2), SamePad(3, 4, 2, stride=2)
    x = torch.randn(40, 3, 7, 7)
    fit = PatchFit(layer, images=40, ridge=1e-9)
    fit.update(kernel_input(layer, (x,), {}), dense(x))
    shift = fit.solve()
    torch.testing.assert_close(layer.weight, dense.weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias + shift.float(), dense.bias, rtol=1e-4, atol=1e-4)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(-1))


class OtherStride(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, stride=2)


class Broken(nn.Linear):
    def forward(self, x):
        raise ValueError("needs another shape")


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 4, 3), None),
        (SamePad(3, 4, 2), None),
        (Halved(3, 4, 3), "other weights"),
        (Scaled(3, 4, 3), "does not end with its one convolution"),
        (Twice(3, 4, 3), "does not end with its one convolution"),
        (OtherStride(3, 4, 3), "other options"),
        (Broken(3, 4), "cannot be examined"),
        (timm.layers.StdConv2d(3, 4, 3), "other weights"),
        (timm.layers.ScaledStdConv2d(3, 4, 3), "other weights"),
        (timm.layers.Conv2dSame(3, 4, 3, stride=2), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_forwards_of_other_kinds_are_found_out(layer, reason):
    found = own_forward_obstacle(layer)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("name", ["spectral_norm", "weight_norm", "prune"])
def test_weights_that_are_computed_from_others_are_left_alone(name):
    layer = nn.Conv2d(3, 4, 3)
    if name == "prune":
        prune.l1_unstructured(layer, "weight", 0.5)
    else:
        getattr(nn.utils, name)(layer)
    assert cannot_refit(layer) == "its weight is computed from other parameters"
