"""Constant channels leave first: by every criterion that knows activations and every normaliser."""

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tp_twoaxis import TwoAxisImportance, calibrate, prune_to_flops
from tp_twoaxis.importance import CRITERIA, find_criterion
from tp_twoaxis.importance.constant_channels import constant_roots, normalize_varying, rank_first
from tp_twoaxis.importance.normalize import NAMES, normalize
from tp_twoaxis.importance.pruning_state import PruningState
from tp_twoaxis.scores import SCORES

# Torch-Pruning's own, with its own formula
KNOWING = [
    name
    for name, criterion in CRITERIA.items()
    if ("statistics" in criterion.needs or "images" in criterion.needs) and name != "host-activation"
]
SIGNED = (None, "softmax", "standarization", "gaussian")


class Chain(nn.Module):
    """Three convolutions, of which some channels of the middle one, in the middle of its order, never vary."""

    constant = (1, 4, 5, 6, 11, 13, 20, 21, 22)

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.middle, self.last = nn.Conv2d(16, 24, 3), nn.Conv2d(24, 20, 3)
        self.fc = nn.Linear(20, 5)

    def forward(self, x):
        x = self.last(self.middle(self.bn(self.stem(x)).relu()).relu())
        return self.fc(x.relu().mean((2, 3)))


def chain():
    torch.manual_seed(0)
    net = Chain().eval()
    with torch.no_grad():
        net.middle.bias.abs_()
        net.middle.weight[list(Chain.constant)] = 0.0
        net.middle.bias[list(Chain.constant)] = 0.3  # what they hold is not little
        net.last.bias.fill_(2.0)  # so that no ReLU makes other channels constant
    return net


def images():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(24, 3, 9, 9, generator=generator), torch.randint(5, (24,), generator=generator))] * 2


def importance_of(expression, net, max_images=48):
    state = PruningState(net, images(), max_images=max_images, progress=False)
    return find_criterion(expression).build(state)


def group_of(net, layer="middle", size=9):
    graph = tp.DependencyGraph().build_dependency(net, torch.zeros(1, 3, size, size), verbose=False)
    module = net.get_submodule(layer)
    return graph.get_pruning_group(module, tp.prune_conv_out_channels, list(range(module.out_channels)))


def gone(report, layer):
    return set(next(group.removed for group in report.groups if group.name == layer))


@pytest.mark.parametrize("name", KNOWING)
def test_they_are_lowest_of_their_group(name):
    net = chain()
    importance = importance_of(name, net)
    group = group_of(net)
    scores = importance(group)
    constant = torch.zeros(24, dtype=torch.bool).index_fill(0, torch.tensor(Chain.constant), True)
    assert torch.equal(importance.constant_channels(group), constant)
    assert scores[constant].max() < scores[~constant].min()
    assert len(set(scores[constant].tolist())) == 1


@pytest.mark.parametrize("name", KNOWING)
def test_they_leave_before_any_other_channel(name):
    net = chain()
    report = prune_to_flops(
        net,
        torch.zeros(1, 3, 9, 9),
        importance_of(name, net),
        flops=0.8,  # the nine alone free 22 %
        repair=(),
        tolerance=0.2,
        progress=False,
    )
    assert gone(report, "middle") <= set(Chain.constant)
    assert not gone(report, "stem")
    assert not gone(report, "last")


def gone_from_the_middle(name, normalizer):
    net = chain()
    importance = TwoAxisImportance(calibrate(net, images(), progress=False), name, normalizer=normalizer)
    report = prune_to_flops(net, torch.zeros(1, 3, 9, 9), importance, flops=0.6, repair=(), progress=False)
    return gone(report, "middle")


@pytest.mark.parametrize("normalizer", [*NAMES, "sentinel_0.5", None, lambda scores: scores - 5.0])
@pytest.mark.parametrize("name", ["capture", "variance"])
def test_by_every_normalizer(normalizer, name):
    assert set(Chain.constant) <= gone_from_the_middle(name, normalizer)


@pytest.mark.parametrize("normalizer", SIGNED)
@pytest.mark.parametrize("name", [name for name, entry in SCORES.items() if entry.allocation])
def test_by_signed_scores_with_every_normalizer(normalizer, name):
    assert set(Chain.constant) <= gone_from_the_middle(name, normalizer)


@pytest.mark.parametrize("name", [name for name in CRITERIA if name not in KNOWING and not name.startswith("host")])
def test_criteria_without_statistics_claim_nothing(name):
    net = chain()
    state = PruningState(net, images(), progress=False)
    importance = find_criterion(name).build(state)
    if hasattr(importance, "constant_channels"):
        assert not importance.constant_channels(group_of(net)).any()


def test_in_torch_prunings_own_pruner():
    net = chain()
    weight = net.middle.weight.detach().clone()
    pruner = tp.pruner.BasePruner(
        net,
        torch.zeros(1, 3, 9, 9),
        importance=importance_of("norm-local", net),
        pruning_ratio=9 / 60,
        global_pruning=True,
        ignored_layers=[net.fc],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )
    pruner.step()
    assert (net.stem.out_channels, net.middle.out_channels, net.last.out_channels) == (16, 15, 20)
    stay = [k for k in range(24) if k not in Chain.constant]
    assert torch.equal(net.middle.weight, weight[stay])


class Stream(nn.Module):
    """Two producers of one stream: channels 0 to 3 are constant in the first, 2 to 5 in the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 12, 1), nn.Linear(12, 5)

    def forward(self, x):
        return self.fc((self.first(x) + self.second(x)).relu().mean((2, 3)))


def test_what_one_producer_of_a_sum_varies_is_not_constant():
    torch.manual_seed(0)
    net = Stream()
    with torch.no_grad():
        net.first.weight[:4], net.second.weight[2:6] = 0.0, 0.0
    group = group_of(net, "first")
    for name in ("capture", "cap-qgw", "vbp"):
        importance = importance_of(name, net)
        assert importance.constant_channels(group).nonzero()[:, 0].tolist() == [2, 3]
        assert importance(group).argsort()[:2].sort().values.tolist() == [2, 3]


@pytest.mark.parametrize(
    "name", ["cap-qgw", "cap-qgw(clusters='plane')", "norm-local", "hull", "spectral-rs", "hybrid"]
)
def test_layers_that_are_constant_throughout_stay_finite(name):
    net = chain()
    with torch.no_grad():
        net.middle.weight.zero_()
    scores = importance_of(name, net)(group_of(net))
    assert torch.isfinite(scores).all()
    assert len(set(scores.tolist())) == 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12), st.integers(0, 2**12 - 1))
@settings(max_examples=50, deadline=None)
def test_constants_do_not_move_the_others(values, bits):
    scores = torch.tensor(values, dtype=torch.float64)
    constant = torch.tensor([bool(bits >> k & 1) for k in range(len(values))])
    for normalizer in SIGNED:
        got = normalize_varying(scores, constant, normalizer)
        if not constant.all():
            assert torch.equal(got[~constant], normalize(scores[~constant], normalizer))
        if constant.any() and not constant.all():
            assert got[constant].max() <= min(0.0, float(got[~constant].min())) - 1.0


def test_ranks_and_roots_by_hand():
    constant = torch.tensor([False, True, True, False])
    assert rank_first(torch.tensor([-3.0, 8.0, -9.0, 1.0]), constant).tolist() == [-3.0, -6.0, -6.0, 1.0]
    assert rank_first(torch.tensor([2.0, 3.0]), torch.tensor([True, True])).tolist() == [-1.0, -1.0]
    repeated = (torch.tensor([False, True, False, False]), torch.tensor([0, 0, 1, 1]))  # features of two maps
    assert constant_roots([repeated], 3).tolist() == [False, True, False]
    assert constant_roots([], 2).tolist() == [False, False]
