"""Pruning to a latency, on a clock that the layers move on: widths, convergence, and what is said when it fails."""

import copy
import json

import numpy as np
import pytest
import torch
from cases import batches, conv_net
from latency_cases import CHAIN_INPUT, blocks_of_eight, chain, fake_time, true_seconds
from pruning_cases import assert_unchanged, everything
from torch import nn

from tp_twoaxis import TwoAxisError, prune_to_flops
from tp_twoaxis.dependency.cost import CostModel, Side, Term
from tp_twoaxis.dependency.latency_table import GroupLatency, LatencyTable
from tp_twoaxis.errors import UnreachableTargetError
from tp_twoaxis.pruning.latency_step import next_target, priced_groups, timed_widths
from tp_twoaxis.pruning.portions import ScoredGroup


def ascending(group):
    return torch.arange(len(group[0].idxs)).float()


def prune(net, inputs=CHAIN_INPUT, importance=ascending, **options):
    options = {"budget": "latency", "repair": (), "progress": False} | options
    return prune_to_flops(net, inputs, importance, **options)


def widths_of(net):
    return [module.out_channels for module in net.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
def test_the_outcome_takes_what_was_asked_for_and_no_slow_width_is_chosen(monkeypatch, share):
    net = chain(64, 96, 64)
    dense = copy.deepcopy(net)
    with fake_time(monkeypatch) as clock:
        report = prune(net, flops=share)
        measured = true_seconds(clock, net) / true_seconds(clock, dense)
    assert report.achieved == pytest.approx(measured)
    assert measured == pytest.approx(share, rel=0.05)
    assert all(width % 8 == 0 for width in widths_of(net))
    assert report.latency_ms["example"][1] / report.latency_ms["example"][0] == pytest.approx(measured)
    assert any("no quicker than wider ones" in note for note in report.notes)
    assert not any("instead of" in note for note in report.notes)


def test_single_channels_leave_where_every_width_is_worth_its_time(monkeypatch):
    net = chain(16, 16)
    with fake_time(monkeypatch, width_cost=lambda width: width):
        report = prune(net, flops=0.55)
    assert any(width % 8 for width in widths_of(net))
    assert report.achieved == pytest.approx(0.55, rel=0.05)


@pytest.mark.parametrize("overhead", [0.02, 0.06])
def test_what_the_table_does_not_know_is_found_by_timing_the_outcome(monkeypatch, overhead):
    """Rectifiers that take the same time at any width, the table takes for falling with it."""
    net = chain(64, 96, 64)
    dense = copy.deepcopy(net)
    with fake_time(monkeypatch, overhead=overhead) as clock:
        report = prune(net, flops=0.7)
        assert true_seconds(clock, net) / true_seconds(clock, dense) == pytest.approx(0.7, rel=0.05)
    assert report.achieved == pytest.approx(0.7, rel=0.05)


def test_an_unsteady_clock_does_not_keep_it_from_the_target(monkeypatch):
    net = chain(64, 96, 64)
    dense = copy.deepcopy(net)
    rng = np.random.default_rng(0)
    with fake_time(monkeypatch, overhead=0.02) as clock:
        clock.speed = lambda: float(rng.lognormal(0.0, 0.1))
        prune(net, flops=0.6)
        clock.speed = lambda: 1.0
        assert true_seconds(clock, net) / true_seconds(clock, dense) == pytest.approx(0.6, rel=0.08)


def test_what_cannot_be_reached_is_refused_with_the_floor_that_was_measured(monkeypatch):
    net = chain(64, 96, 64)
    before = everything(net)
    with (
        fake_time(monkeypatch, overhead=0.06),
        pytest.raises(UnreachableTargetError, match=r"flops=0\.2: expected a share of the latency between 0\.\d+"),
    ):
        prune(net, flops=0.2, min_keep=0.5)
    assert_unchanged(net, before)


def test_a_target_that_lies_between_coarse_widths_is_missed_and_said(monkeypatch):
    net = chain(64, 64)
    with fake_time(monkeypatch):
        report = prune(net, flops=0.85, round_to=32)
    assert abs(report.achieved - 0.85) > 0.05 * 0.85
    assert report.notes[-1].endswith("widths that were timed are coarse here, lower round_to")
    assert "of the latency instead of 0.85: none of" in report.notes[-1]


def test_steps_end_at_the_latency_too(monkeypatch):
    net = chain(64, 96, 64)
    dense = copy.deepcopy(net)
    with fake_time(monkeypatch, overhead=0.01) as clock:
        report = prune(net, flops=0.5, steps=3)
        assert true_seconds(clock, net) / true_seconds(clock, dense) == pytest.approx(0.5, rel=0.05)
    assert [group.widths[0] for group in report.latency_table] == [64, 96, 64]


def test_other_budgets_read_no_clock(monkeypatch):
    with fake_time(monkeypatch) as clock:
        clock.advance = None
        report = prune(chain(16, 16), budget="macs", flops=0.6)
    assert report.latency_table == []
    assert report.latency_ms == {}


def test_repairs_join_and_the_report_survives_json(monkeypatch):
    net, inputs = conv_net(width=32), torch.zeros(1, 3, 8, 8)
    with fake_time(monkeypatch):
        report = prune(net, inputs, "anticipating(levels=2)", flops=0.62, repair="ridge+bn", loader=batches(64))
    assert report.achieved == pytest.approx(0.62, rel=0.05)
    data = json.loads(report.to_json())
    rows = [(row["name"], tuple(row["widths"]), tuple(row["milliseconds"])) for row in data["latency_table"]]
    assert [GroupLatency(*row) for row in rows] == report.latency_table
    assert data["budget"] == "latency"
    text = str(report)
    assert "of the latency (asked for 62.00%)" in text
    assert "example, ms" in text


def test_an_unknown_budget_is_refused():
    with pytest.raises(TwoAxisError, match="budget: expected one of macs, channels, latency, got 'time'"):
        prune(chain(8), budget="time")


def test_scores_per_mac_become_scores_per_millisecond():
    """Twice the MACs in the same time: a channel's score per MAC is worth twice as much per millisecond."""
    macs = CostModel([Term(200.0, (Side(16, {"a": np.ones(16)}),)), Term(100.0, (Side(16, {"b": np.ones(16)}),))])
    time = CostModel([Term(5.0, (Side(16, {"a": np.ones(16)}),)), Term(5.0, (Side(16, {"b": np.ones(16)}),))])
    groups = [GroupLatency(name, (16, 12, 8), (5.0, 5.5, 2.5)) for name in "ab"]
    scored = [ScoredGroup(name, np.ones(16)) for name in "abc"]
    a, b, c = priced_groups(scored, LatencyTable(time, groups), macs)
    assert (a.scores / b.scores).tolist() == pytest.approx([2.0] * 16)
    assert (a.widths, b.widths, c.widths) == ((8,), (8,), ())
    same, *_ = priced_groups(scored, LatencyTable(time, groups), None)
    assert same.scores.tolist() == [1.0] * 16


def test_timed_widths_are_what_the_constraints_allow():
    assert timed_widths(ScoredGroup("a", np.arange(16.0)), 0.5, None) == [15, 14, 13, 12, 11, 10, 9, 8]
    assert timed_widths(ScoredGroup("a", np.arange(64.0)), 0.8, None) == list(range(63, 51, -1))
    assert timed_widths(ScoredGroup("a", np.arange(64.0)), 0.1, None) == list(range(60, 6, -4))
    assert timed_widths(ScoredGroup("a", np.arange(96.0)), 0.1, 32) == [64, 32]
    heads = ScoredGroup("a", np.arange(768.0), run=64, aligned=False)
    assert timed_widths(heads, 0.1, None) == list(range(704, 76, -64))


@pytest.mark.parametrize(
    "truth",
    [lambda t: t, lambda t: 0.4 + 0.6 * t, lambda t: t**2, lambda t: t**0.5, lambda t: 0.5 * t + 0.5 * round(t, 1)],
)
@pytest.mark.parametrize("asked", [0.9, 0.65, 0.5])
def test_corrections_converge_on_whatever_rises(truth, asked):
    tried, target = [], asked
    for _ in range(8):
        tried.append((target, truth(target)))
        if abs(tried[-1][1] - asked) <= 0.05 * asked:
            return
        target = next_target(tried, asked)
        assert 0.0 < target <= 1.0
    raise AssertionError(tried)


@pytest.mark.parametrize("asked", [0.7, 0.6])
def test_corrections_pass_a_jump_that_spans_what_was_asked_for(asked):
    """Up to a target a quick kernel serves, there a slow one, and some way beyond it a quick one again."""
    tried, target = [], asked
    for _ in range(10):
        slow = asked - 0.002 <= target < asked + 0.05
        tried.append((target, target * (1.1 if slow else 0.87)))
        if abs(tried[-1][1] - asked) <= 0.05 * asked:
            return
        target = next_target(tried, asked)
    raise AssertionError(tried)


def test_corrections_go_on_where_pruning_slowed_the_network_down():
    assert next_target([(0.8, 1.1)], 0.8) == pytest.approx(0.6)
    assert blocks_of_eight(9) > blocks_of_eight(16)
