"""Curves of measured distortion, against repaired networks, and what the importance makes of them."""

import copy

import pytest
import torch
import torch_pruning as tp
from cases import batches, conv_net
from repair_cases import double
from torch import nn

from tp_twoaxis import (
    AnticipatingImportance,
    HybridImportance,
    TwoAxisError,
    TwoAxisImportance,
    calibrate,
    prune_to_flops,
)
from tp_twoaxis.dependency.graph import build_graph, prunable_groups
from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.importance.distortion import Distortion
from tp_twoaxis.models import cifar_resnet20_option_a

X = torch.zeros(1, 3, 8, 8)
LOADER = batches(images=64, batch_size=24)


@pytest.fixture(scope="module")
def stats():
    return calibrate(conv_net(), LOADER, target=None, consumers=True, progress=False)


def group_of(net, layer="conv1"):
    graph = tp.DependencyGraph().build_dependency(net, X)
    module = net.get_submodule(layer)
    return graph.get_pruning_group(module, tp.prune_conv_out_channels, list(range(module.out_channels)))


def importance_of(net, stats, **options):
    return AnticipatingImportance(stats, loader=LOADER, model=net, progress=False, **options)


def mlp():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    double(net[1], 7, 2)
    return net.eval()


def test_a_replaceable_channel_leaves_for_nothing():
    net = mlp()
    stats = calibrate(net, LOADER, target=None, consumers=True, progress=False)
    distortion = Distortion(net, stats, LOADER, progress=False)
    missing = torch.zeros(12, dtype=torch.bool)
    missing[7] = True
    assert distortion({"3": missing}) < 1e-6
    group = tp.DependencyGraph().build_dependency(net, X)
    group = group.get_pruning_group(net[1], tp.prune_linear_out_channels, list(range(12)))
    scores = importance_of(net, stats, ranking="reconstruction")(group)
    assert int(scores.argmin()) in (2, 7)  # twins: one of them


@pytest.mark.parametrize("ranking", ["hull", "reconstruction"])
def test_scores_rise_in_the_order_of_the_ranking(stats, ranking):
    net = conv_net()
    importance = importance_of(net, stats, ranking=ranking)
    for layer in ("conv1", "reduce"):
        group = group_of(net, layer)
        scores = importance(group)
        assert scores.shape == (len(group[0].idxs),)
        assert scores.dtype == torch.float32
        assert bool((scores >= 0).all())
        assert len(scores.unique()) == len(scores)
        curve = importance.curve(group)
        assert curve.removed[0] == 0
        assert curve.removed[-1] == len(scores) - 1
        assert curve.distortion[0] == 0.0
        assert curve.distortion[-1] > 0.0
        assert importance.curves[layer] == curve
    if ranking == "hull":
        order = importance._ranked(group).argsort(stable=True)
        assert scores.argsort().tolist() == order.tolist()


def test_a_curve_is_measured_once_for_all_copies(stats, monkeypatch):
    net = conv_net()
    importance = importance_of(net, stats)
    first = importance(group_of(net))
    monkeypatch.setattr(Distortion, "measure", lambda *_: pytest.fail("measured again"))
    other, again = copy.deepcopy((net, importance))
    assert torch.equal(again(group_of(other)), first)


def test_the_price_is_what_a_channel_costs(stats):
    net = conv_net()
    by_macs, by_channels = importance_of(net, stats), importance_of(net, stats, cost="channels")
    ratios = {}
    for layer in ("conv1", "reduce"):
        group = group_of(net, layer)
        ratio = by_channels(group) / by_macs(group)
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        ratios[layer] = float(ratio[0])
    # 64 pixels: the stream is written by conv1 and conv2, kept by the depthwise layer, read by conv2 and reduce
    total = 64 * (27 * 16 + 9 * 256 + 9 * 16 + 16 * 8) + 32 * 5
    assert ratios["conv1"] == pytest.approx(64 * (27 + 9 * 16 + 9 * 16 + 9 + 8) / total, rel=1e-6)
    assert ratios["reduce"] == pytest.approx((64 * 16 + 4 * 5) / total, rel=1e-6)


def test_groups_that_share_a_root_layer_are_asked_apart():
    torch.manual_seed(0)
    net = cifar_resnet20_option_a().eval()
    loader = [torch.randn(48, 3, 16, 16)]
    x = loader[0][:1]
    stats = calibrate(net, loader, target=None, consumers=True, progress=False)
    groups, _ = prunable_groups(build_graph(net, x), net, [])
    apart = [g for g in groups if len(g.channels) < len(g.group[0].idxs)]
    assert [len(g.own[0].idxs) for g in apart] == [len(g.channels) for g in apart] == [16, 32]
    importance = AnticipatingImportance(stats, loader=loader, model=net, levels=2, images=16, progress=False)
    assert importance(apart[0].own).shape == (16,)
    report = prune_to_flops(net, x, importance, flops=0.6, repair=(), progress=False)
    assert report.achieved == pytest.approx(0.6, abs=0.006)


def test_attention_is_asked_with_all_that_it_reads():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc1, self.fc2, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 5)

        def forward(self, x):
            x = self.embed(x.flatten(2).transpose(1, 2))
            x = x + self.attention(x, x, x, need_weights=False)[0]
            x = x + self.fc2(self.fc1(x).relu())
            return self.head(x.mean(1))

    net = Block().eval()
    loader = [torch.randn(32, 3, 4, 4)]
    stats = calibrate(net, loader, target=None, consumers=True, progress=False)
    report = prune_to_flops(
        net,
        loader[0][:1],
        AnticipatingImportance(stats, loader=loader, model=net, progress=False),
        flops=0.7,
        repair=(),
        progress=False,
    )
    assert report.achieved == pytest.approx(0.7, rel=0.1)


def test_a_group_that_nothing_but_attention_reads_is_ordered_by_capture():
    torch.manual_seed(0)

    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.embed(x.flatten(2).transpose(1, 2))
            return self.attention(x, x, x, need_weights=False)[0].mean(1)

    net = Only().eval()
    loader = [torch.randn(32, 3, 4, 4)]
    stats = calibrate(net, loader, target=None, consumers=True, progress=False)
    graph = tp.DependencyGraph().build_dependency(net, loader[0][:1])
    group = graph.get_pruning_group(net.embed, tp.prune_linear_out_channels, list(range(8)))
    scores = AnticipatingImportance(stats, loader=loader, model=net, progress=False)(group)
    assert torch.equal(scores.argsort(), TwoAxisImportance(stats, "capture")(group).argsort())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": "watts"}, "cost: expected one of macs, channels, got 'watts'"),
        ({"levels": 0}, "levels >= 1, images >= 2 and passes > 0, got 0, 128 and 2000"),
        ({"ranking": "glue"}, "got 'glue'"),
        ({"images": 2, "max_images": 1}, "images that the network tells apart, got 1"),
    ],
)
def test_bad_arguments(stats, options, message):
    net = conv_net()
    with pytest.raises(TwoAxisError, match=message):
        importance_of(net, stats, **options)(group_of(net))


def test_what_it_needs_is_said():
    net = conv_net()
    with pytest.raises(TwoAxisError, match=r"calibrate\(model, loader, consumers=True\)"):
        importance_of(net, calibrate(net, LOADER, progress=False))
    with pytest.raises(TwoAxisError, match="call it first"):
        importance_of(net, calibrate(net, LOADER, consumers=True, progress=False)).curve(group_of(net))


def test_stale_statistics_are_refused(stats):
    net = conv_net()
    importance = importance_of(net, stats)
    with torch.no_grad():
        net.conv1.weight.mul_(2)
    with pytest.raises(StaleStatisticsError):
        importance(group_of(net))


def test_the_repair_takes_its_statistics_and_a_later_step_new_ones(stats):
    net, loader = conv_net(), [x for x, _ in LOADER]
    importance = AnticipatingImportance(stats, loader=loader, model=net, levels=2, images=24, progress=False)
    report = prune_to_flops(net, X, importance, flops=0.6, repair=("ridge",), loader=loader, steps=2, progress=False)
    assert report.achieved == pytest.approx(0.6, rel=0.1)
    assert report.importance == repr(importance)
    assert importance.stats is stats


@pytest.mark.parametrize("hybrid", [False, True])
def test_pruning_has_the_curves_of_all_groups_measured_together(stats, hybrid, monkeypatch):
    together = []
    measure = AnticipatingImportance._measure
    monkeypatch.setattr(
        AnticipatingImportance,
        "_measure",
        lambda self, groups: (together.append(len(groups)), measure(self, groups))[1],
    )
    net = conv_net()
    importance = importance_of(net, stats)
    given = HybridImportance(importance, "l2") if hybrid else importance
    report = prune_to_flops(net, X, given, flops=0.6, repair=(), loader=LOADER, progress=False)
    assert together == [len(report.groups)]
    assert sorted(importance.curves) == sorted(group.name for group in report.groups)
