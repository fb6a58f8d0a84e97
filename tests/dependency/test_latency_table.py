"""The table of a device, on a clock that the layers move on: its cost is what pruned networks take."""

import copy

import numpy as np
import pytest
import torch
from cases import conv_net
from latency_cases import CHAIN_INPUT, chain, fake_time, true_seconds
from torch import nn

from tp_twoaxis.dependency.graph import build_graph, group_key, prunable_groups
from tp_twoaxis.dependency.latency_table import GroupLatency, measure_latency_table
from tp_twoaxis.dependency.removal import remove


def table_of(net, inputs, widths):
    graph = build_graph(net, inputs)
    groups, _ = prunable_groups(graph, net, [])
    sizes = {group_key(group): len(group.channels) for group in groups}
    return measure_latency_table(graph, groups, net, inputs, widths(sizes)), groups


def every_width(sizes):
    return {name: list(range(size - 1, 0, -1)) for name, size in sizes.items()}


def first(size, gone):
    return np.arange(size) < gone


def pruned(net, inputs, gone):
    copied = copy.deepcopy(net)
    graph = build_graph(copied, inputs)
    groups, _ = prunable_groups(graph, copied, [])
    remove(graph, groups, {group_key(group): first(len(group.channels), gone[group_key(group)]) for group in groups})
    return copied


@pytest.mark.parametrize("cost", [lambda width: width, lambda width: 8 * -(-width // 8)], ids=["even", "stairs"])
def test_its_cost_is_what_a_pruned_network_takes(monkeypatch, cost):
    """Layers take a product of what their sides cost, so that the table is exact; the head keeps its outputs."""
    net = chain(16, 24, 16)
    rng = np.random.default_rng(0)
    with fake_time(monkeypatch, width_cost=cost) as clock:
        table, groups = table_of(net, CHAIN_INPUT, every_width)
        assert table.cost.dense == pytest.approx(1000 * true_seconds(clock, net))
        for _ in range(4):
            gone = {group_key(group): int(rng.integers(len(group.channels))) for group in groups}
            masks = {group_key(g): first(len(g.channels), gone[group_key(g)]) for g in groups}
            expected = 1000 * true_seconds(clock, pruned(net, CHAIN_INPUT, gone))
            assert table.cost.macs(masks) == pytest.approx(expected)


def test_groups_take_what_their_layers_take(monkeypatch):
    net = chain(16, 24)
    with fake_time(monkeypatch) as clock:
        table, _ = table_of(net, CHAIN_INPUT, every_width)
        by_name = {group.name: group for group in table.groups}
        conv, last = by_name["0"], by_name["2"]
        assert conv.widths == tuple(range(16, 0, -1))
        both = [true_seconds(clock, net[0]), true_seconds(clock, net[2], torch.zeros(2, 16, 6, 6))]
        assert conv.milliseconds[0] == pytest.approx(1000 * sum(both))
    # what is no multiple of eight takes longer than the next one, and is never chosen
    assert conv.quick_widths() == [16, 8]
    assert last.quick_widths() == [24, 16, 8]


def test_coupled_and_depthwise_layers_and_the_rest_are_counted(monkeypatch):
    net, inputs = conv_net(width=16), torch.zeros(1, 3, 8, 8)
    with fake_time(monkeypatch, width_cost=lambda width: width, overhead=1e-4) as clock:
        table, groups = table_of(net, inputs, every_width)
        assert table.cost.dense == pytest.approx(1000 * true_seconds(clock, net, inputs))
        gone = {"depthwise": 8, "reduce": 4}
        true = 1000 * true_seconds(clock, pruned(net, inputs, gone), inputs)
        found = table.cost.macs({group_key(g): first(len(g.channels), gone[group_key(g)]) for g in groups})
    # two norms and the pooling are taken to fall with the layers' outputs, which the clock's do not
    assert true - 3 * 0.1 < found < true


def test_layers_that_do_not_run_alone_are_part_of_the_rest(monkeypatch):
    class Own(nn.Conv2d):
        def forward(self, x):
            assert x.shape[1] == 16, "only in its network"
            return super().forward(x)

    net = chain(16, 24)
    net[2] = Own(16, 24, 3, padding=1)
    with fake_time(monkeypatch, width_cost=lambda width: width) as clock:
        table, _ = table_of(net, CHAIN_INPUT, every_width)
        assert table.cost.dense == pytest.approx(1000 * true_seconds(clock, net))
    last = next(group for group in table.groups if group.name == "2")
    assert last.milliseconds[0] > last.milliseconds[12] > last.milliseconds[-1]


def test_a_quick_width_is_quicker_than_all_wider_ones():
    rng = np.random.default_rng(0)
    for _ in range(20):
        times = tuple(rng.random(10))
        widths = tuple(range(10, 0, -1))
        slow = [w for k, w in enumerate(widths) if all(times[k] < times[j] for j in range(k))]
        assert GroupLatency("a", widths, times).quick_widths() == slow


def test_layers_of_groups_that_stay_whole_cost_what_they_cost(monkeypatch):
    net = chain(16, 24, 16)
    with fake_time(monkeypatch, width_cost=lambda width: width) as clock:
        table, groups = table_of(net, CHAIN_INPUT, lambda sizes: {"0": [8]})
        gone = {group_key(group): 8 * (group_key(group) == "0") for group in groups}
        expected = 1000 * true_seconds(clock, pruned(net, CHAIN_INPUT, gone))
    assert table.cost.macs({"0": first(16, 8)}) == pytest.approx(expected)
    assert [(group.name, group.widths) for group in table.groups] == [("0", (16, 8))]
