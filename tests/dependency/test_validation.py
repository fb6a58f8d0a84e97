"""Wrong channel maps of Torch-Pruning are found; right ones are not suspected."""

import pytest
import timm
import torch
import torchvision
from cases import conv_net
from torch import nn

from tp_twoaxis import TwoAxisError, prune_to_flops
from tp_twoaxis.dependency.graph import build_graph, prunable_groups
from tp_twoaxis.dependency.validation import routing_faults, verified_groups
from tp_twoaxis.models import cifar_resnet20_option_a


class Chunked(nn.Module):
    """Torch-Pruning takes the halves in the order in which it walks back to them."""

    def __init__(self, swap):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1)
        self.out = nn.Linear(8, 5)
        self.swap = swap

    def forward(self, x):
        left, right = self.conv(x).relu().chunk(2, dim=1)
        left, right = self.left(left), self.right(right)
        return self.out((right + left if self.swap else left + right).mean((2, 3)))


class Padded(nn.Module):
    """Option A written with F.pad: channel i of the narrow stream is channel i + 2 of the wide one."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.read, self.out = nn.Conv2d(12, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.narrow(x).relu()
        x = (nn.functional.pad(x, (0, 0, 0, 0, 2, 2)) + self.wide(x)).relu()
        return self.out(self.read(x).mean((2, 3)))


class Odd(nn.Module):
    """Refuses NaN."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1))

    def forward(self, x):
        x = self.net[0](x)
        assert torch.isfinite(x).all()
        return self.net[1](x).mean((2, 3))


def check(net, size=8):
    x = torch.randn(1, 3, size, size)
    groups, _ = prunable_groups(build_graph(net.eval(), x), net, [])
    return {key: list(fault.misread) for key, fault in routing_faults(groups, net, x).items()}


def simple_flatten():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Pixels(), nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 5)
    )


class Pixels(nn.Module):
    """[n, C, H, W] -> [n, H W C]."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


def test_flatten_after_permute():
    assert check(simple_flatten()) == {"0": ["3"]}


def test_chunk_in_one_of_the_two_orders():
    torch.manual_seed(0)
    found = [check(Chunked(swap)) for swap in (False, True)]
    assert sorted(map(len, found)) == [0, 1]
    assert {name for f in found for name in f} == {"conv"}


def test_padded_shortcut():
    torch.manual_seed(0)
    net, x = Padded().eval(), torch.randn(1, 3, 8, 8)
    groups, notes = verified_groups(build_graph(net, x), net, x, [])
    assert [group.name for group in groups] == ["read"]
    assert any("narrow" in note and "stays whole" in note for note in notes)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (conv_net, 8),
        (cifar_resnet20_option_a, 16),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), 32),
        (lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5), 32),
        (
            lambda: timm.models.vision_transformer.VisionTransformer(
                32, 8, num_classes=5, embed_dim=24, depth=2, num_heads=3
            ),
            32,
        ),
        (lambda: timm.models.convnext.ConvNeXt(num_classes=5, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), 32),
        (lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5), 32),
        (Odd, 8),
    ],
)
def test_sound_networks_are_not_suspected(make, size):
    torch.manual_seed(0)
    net = make()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    assert check(net, size) == {}
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == hooks


def test_pruning_leaves_such_a_group_whole_and_says_so():
    net = simple_flatten()
    dense = {name: value.clone() for name, value in net.state_dict().items()}

    def scores(group):
        return torch.arange(len(group[0].idxs)).float()

    report = prune_to_flops(net, torch.randn(1, 3, 8, 8), scores, flops=0.8, repair=(), progress=False)
    assert net[0].out_channels == 8
    assert net[3].out_features < 16
    assert "0: stays whole" in report.notes[0]
    assert "inputs of 3" in report.notes[0]
    assert torch.equal(net[3].weight, dense["3.weight"][report.groups[0].kept])
    with pytest.raises(TwoAxisError, match=r"between 0.* 0: stays whole"):
        prune_to_flops(net, torch.randn(1, 3, 8, 8), scores, flops=0.1, repair=(), progress=False)
