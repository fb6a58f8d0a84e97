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


class Mixed(nn.Module):
    """A sound branch, a feature that is an output, a wrongly mapped one, and a norm by hand before a reader."""

    def __init__(self):
        super().__init__()
        self.stem, self.sound, self.sum = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 48, 1)
        self.shown, self.hidden = nn.Conv2d(8, 9, 1), nn.Conv2d(9, 48, 1)
        self.pixels, self.wrong, self.read = Pixels(), nn.Conv2d(48, 10, 1), nn.Linear(640, 4)

    def forward(self, x):
        x = self.stem(x)
        shown = self.shown(x)
        x = self.sum(self.sound(x)) + self.hidden(shown)
        x = x - x.mean(1, keepdim=True)
        return shown, self.read(self.pixels(self.wrong(x)))


def test_every_group_gets_its_own_verdict():
    torch.manual_seed(0)
    net, x = Mixed().eval(), torch.randn(1, 3, 8, 8)
    groups, notes = verified_groups(build_graph(net, x), net, x, [])
    assert [note.split(",")[0] for note in sorted(notes)] == ["shown: stays whole", "wrong: stays whole"]
    assert "outputs of the model too" in next(note for note in notes if "shown" in note)
    assert "inputs of read" in next(note for note in notes if "wrong" in note)
    assert {group.name for group in groups} >= {"stem", "sound"}
    assert len(groups) == 3


def test_marks_in_outputs_count_for_nothing_where_the_model_writes_nan_itself():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.b(self.a(x)), torch.full((len(x),), torch.nan)

    net, x = Own().eval(), torch.randn(1, 3, 8, 8)
    groups, notes = verified_groups(build_graph(net, x), net, x, [])
    assert [group.name for group in groups] == ["a"]
    assert notes == []


def test_one_mark_tells_where_a_third_reaches_everything():
    """A vector becomes a map with channels last: a third of it covers every channel."""

    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.v, self.o = nn.Linear(6, 24), nn.Linear(24, 36), nn.Conv2d(9, 3, 1)

        def forward(self, x):
            x = self.v(self.e(x).relu())
            return self.o(x.view(len(x), 2, 2, -1).permute(0, 3, 1, 2))

    net, x = Map().eval(), torch.randn(2, 6)
    groups, notes = verified_groups(build_graph(net, x), net, x, [])
    assert [group.name for group in groups] == ["e"]
    assert "o (inputs): stays whole, because Torch-Pruning maps it to the wrong inputs of o" in notes


class Heads(nn.Module):
    """Two heads that run in training only; the buffer of the second counts its runs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 4, 1)
        self.bn, self.first, self.unused = nn.BatchNorm2d(12), nn.Conv2d(8, 5, 1), nn.Linear(12, 3)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        x = self.a(x)
        y = self.out(self.bn(self.b(x)))
        if self.training:
            self.runs += 1
            return y, self.first(x)
        return y


def test_what_is_read_in_training_stays_whole_and_nothing_trains():
    net, x = Heads().eval(), torch.randn(2, 3, 8, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    groups, notes = verified_groups(build_graph(net, x), net, x, [])
    assert [group.name for group in groups] == ["b"]
    assert any(note.startswith("a: stays whole, because first reads it in training mode") for note in notes)
    assert any(note.startswith("unused did not run on example_inputs") for note in notes)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.training


def test_a_group_whose_width_the_code_holds_is_found_by_trial():
    """The code holds the width of one layer in the middle."""

    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(i, o, 1) for i, o in ((3, 9), (9, 12), (12, 6), (6, 4)))

        def forward(self, x):
            y = self.b(self.a(x))
            z = self.c(y)
            if y.shape[1] != 12:
                raise ValueError("12 are needed")
            return self.d(z)

    net, x = Held().eval(), torch.randn(1, 3, 8, 8)
    groups, notes = verified_groups(build_graph(net, x), net, x, [], try_all=True)
    assert {group.name for group in groups} == {"a", "c"}
    assert notes == ["b: stays whole, because the network does not go on with fewer (ValueError: 12 are needed)"]
