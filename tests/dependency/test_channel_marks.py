"""Marks tell which channels a layer receives, what they miss is said, and nothing of them stays in the model."""

import copy

import pytest
import torch
from pruning_cases import assert_unchanged, everything
from removal_cases import CASES
from torch import nn

from tp_twoaxis.dependency.channel_marks import (
    first_third,
    follow_marks,
    marked_roots,
    scattered_third,
    single_units,
)
from tp_twoaxis.dependency.graph import build_graph, prunable_groups

X = torch.randn(2, 3, 8, 8)


def listed(net, x=X):
    return prunable_groups(build_graph(net.eval(), x), net, [])[0]


def test_a_third_is_marked_in_every_block():
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(2, 12), nn.Conv2d(12, 4, 1))
    (group,) = listed(net)
    assert marked_roots(group, first_third).nonzero()[:, 0].tolist() == [0, 1, 6, 7]
    scattered = marked_roots(group, scattered_third)
    assert scattered.sum() == 4
    assert torch.equal(scattered[:6], scattered[6:])
    assert [marked_roots(group, choose).sum() for choose in single_units(6)] == [2] * len(single_units(6))


def test_nothing_is_seen_where_all_is_right_and_all_comes_back():
    case = CASES["torchvision mobilenet_v3"]
    net, x = case.network().float().train(), case.inputs().float()
    before = everything(net)
    seen = follow_marks(listed_in(net, x), first_third, net, x)
    assert not seen
    assert_unchanged(net, before)


def listed_in(net, x):
    return prunable_groups(build_graph(net, x), net, [])[0]


class Both(nn.Module):
    """A feature is read, and is an output too; read is how the output takes it."""

    def __init__(self, read=lambda x: x):
        super().__init__()
        self.a, self.b, self.read = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1), read

    def forward(self, x):
        x = self.a(x)
        return {"feature": self.read(x), "out": self.b(x)}


@pytest.mark.parametrize("read", [lambda x: x, lambda x: x.relu().amax((2, 3)), lambda x: x[:, 2:5] * 0.0])
def test_marks_come_out_of_outputs(read):
    net = Both(read)
    assert follow_marks(listed(net), first_third, net, X).outputs


def test_a_layer_that_torch_pruning_does_not_know_is_noticed():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.mix = nn.Conv2d(3, 12, 1), nn.Linear(12, 4), nn.Bilinear(12, 3, 4)

        def forward(self, x):
            feature = self.a(x).mean((2, 3))
            return self.b(feature) + self.mix(feature, x.mean((2, 3)))

    net = Hidden()
    assert list(follow_marks(listed(net), first_third, net, X).misread) == ["mix"]


def test_all_marks_or_none_prove_nothing():
    class Mean(nn.Module):
        def forward(self, x):
            return x - x.mean(1, keepdim=True)

    net = nn.Sequential(nn.Conv2d(3, 12, 1), Mean(), nn.Conv2d(12, 4, 1))
    seen = follow_marks(listed(net), first_third, net, X)
    assert list(seen.blind) == ["2"]
    assert not seen.misread

    class Swallow(nn.Module):
        def forward(self, x):
            return x.nan_to_num(0.0)

    net[1] = Swallow()
    assert list(follow_marks(listed(net), first_third, net, X).blind) == ["2"]


def test_a_model_that_refuses_nan_is_an_error_that_is_seen():
    class Strict(nn.Module):
        def forward(self, x):
            if x.isnan().any():
                raise FloatingPointError("NaN")
            return x

    net = nn.Sequential(nn.Conv2d(3, 12, 1), Strict(), nn.Conv2d(12, 4, 1))
    before = copy.deepcopy(net.state_dict())
    seen = follow_marks(listed(net), first_third, net, X)
    assert isinstance(seen.error, FloatingPointError)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_inputs_by_keyword_are_followed():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

        def forward(self, x):
            return self.b(input=self.a(input=x))

    net = Keyword()
    groups = listed(net)
    assert not follow_marks(groups, first_third, net, X)
