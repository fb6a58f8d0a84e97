"""The planner against brute force, its floors, portions and messages."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_twoaxis import TwoAxisError
from tp_twoaxis.dependency.cost import CostModel, Side, Term
from tp_twoaxis.errors import UnreachableTargetError
from tp_twoaxis.pruning.plan import least_share, make_plan
from tp_twoaxis.pruning.portions import ScoredGroup


def problem(scores, blocks=(), seed=0):
    """A chain of layers, one a group: layer i reads group i - 1 and writes group i; a fixed head reads the last."""
    rng = np.random.default_rng(seed)
    groups, terms, before = [], [Term(50.0, ())], None
    for i, values in enumerate(scores):
        values = np.asarray(values, dtype=float)
        block = blocks[i] if blocks else 1
        groups.append(ScoredGroup(f"g{i}", values, block))
        side = Side(len(values), {f"g{i}": np.ones(len(values))})
        macs = float(rng.integers(500, 2000) * len(values))
        terms.append(Term(macs, (side,) if before is None else (before, side)))
        before = side
    terms.append(Term(300.0, (before,)))
    return groups, CostModel(terms)


def random_problem(seed, sizes=(16, 24, 32)):
    rng = np.random.default_rng(seed)
    return problem([rng.gamma(2.0, size=n) for n in sizes], seed=seed)


def kept(plan):
    return {name: int((~mask).sum()) for name, mask in plan.removed.items()}


def by_threshold(groups, threshold, min_keep):
    """Everything with a score up to the threshold leaves, lowest first, down to each floor."""
    removed = {}
    for group in groups:
        floor = max(1, int(np.ceil(min_keep * len(group.scores))))
        order = np.argsort(group.scores, kind="stable")[: len(group.scores) - floor]
        removed[group.name] = np.zeros(len(group.scores), dtype=bool)
        removed[group.name][[k for k in order if group.scores[k] <= threshold]] = True
    return removed


@given(st.integers(0, 10_000), st.floats(0.3, 0.95))
@settings(max_examples=40, deadline=None)
def test_nearest_threshold_by_brute_force(seed, flops):
    groups, cost = random_problem(seed, sizes=(6, 8, 9))
    thresholds = [-np.inf, *np.concatenate([g.scores for g in groups])]
    errors = [abs(cost.macs(by_threshold(groups, t, 0.1)) - flops * cost.dense) for t in thresholds]
    plan = make_plan(groups, cost, flops=flops, tolerance=10.0)  # so wide that no gap is filled
    assert abs(plan.macs - plan.target) == pytest.approx(min(errors), abs=1e-6)
    chosen = thresholds[int(np.argmin(errors))]
    if sorted(errors)[1] > min(errors) + 1e-6:
        for name, mask in by_threshold(groups, chosen, 0.1).items():
            assert plan.removed[name].tolist() == mask.tolist()


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_filling_never_is_worse_and_comes_close(seed):
    groups, cost = random_problem(seed)
    for flops in (0.8, 0.5, 0.3):
        coarse = make_plan(groups, cost, flops=flops, tolerance=10.0)
        fine = make_plan(groups, cost, flops=flops, tolerance=0.01)
        assert not fine.notes
        assert fine.error <= coarse.error + 1e-12
        assert fine.error <= 0.01
        assert fine.macs == pytest.approx(cost.macs(fine.removed))
        for group in groups:  # inside a group the lowest scores leave
            mask = fine.removed[group.name]
            if mask.any() and not mask.all():
                assert group.scores[mask].max() <= group.scores[~mask].min()


def test_macs_rise_with_flops_and_cuts_are_nested():
    groups, cost = random_problem(3)
    plans = [make_plan(groups, cost, flops=f, tolerance=10.0) for f in np.linspace(0.1, 1.0, 19)]
    assert all(a.macs <= b.macs for a, b in itertools.pairwise(plans))
    for less, more in itertools.pairwise(plans):
        assert all((less.removed[n] | ~more.removed[n]).all() for n in less.removed)
    assert plans[-1].macs == cost.dense
    assert plans[-1].threshold == -np.inf


def test_ties_are_cut_in_order_and_deterministically():
    groups, cost = problem([np.ones(10), np.ones(10)])
    plan = make_plan(groups, cost, flops=0.6, tolerance=10.0)
    assert plan.removed["g0"].any()
    assert not plan.removed["g1"].any() or plan.removed["g0"].sum() == 9
    assert plan.removed["g0"].tolist() == sorted(plan.removed["g0"], reverse=True)
    again = make_plan(groups, cost, flops=0.6, tolerance=10.0)
    assert all((plan.removed[n] == again.removed[n]).all() for n in plan.removed)


@pytest.mark.parametrize("min_keep", [0.1, 0.34, 0.5, 1.0])
def test_floors(min_keep):
    groups, cost = problem([np.full(16, 0.001) + np.arange(16) * 1e-6, 5 + np.arange(16.0)])
    try:
        plan = make_plan(groups, cost, flops=0.35, min_keep=min_keep, tolerance=0.03)
    except UnreachableTargetError:
        assert min_keep > 0.34
        return
    assert min(kept(plan).values()) >= np.ceil(min_keep * 16)
    plain = make_plan(groups, cost, flops=0.1, min_keep=min_keep, tolerance=100.0)
    assert kept(plain) == {"g0": np.ceil(min_keep * 16), "g1": max(np.ceil(min_keep * 16), kept(plain)["g1"])}


def test_one_channel_always_stays():
    groups, cost = problem([[0.0, 0.0], [1.0]])
    assert kept(make_plan(groups, cost, flops=0.55, min_keep=1e-9, tolerance=1.0)) == {"g0": 1, "g1": 1}


@pytest.mark.parametrize("size", [16, 20, 30, 33])
def test_round_to_also_where_the_width_is_no_multiple(size):
    rng = np.random.default_rng(0)
    groups, cost = problem([rng.random(size), rng.random(64)])
    for flops in (0.9, 0.6, 0.4):
        plan = make_plan(groups, cost, flops=flops, round_to=8, tolerance=0.2)
        for group in groups:
            count, whole = kept(plan)[group.name], len(group.scores)
            assert count == whole or count % 8 == 0
            assert count > 0
    assert kept(make_plan(groups, cost, flops=1.0, round_to=8)) == {"g0": size, "g1": 64}


def every_allocation(groups, round_to, min_keep):
    """All masks that floors and rounding allow, lowest scores first in each group."""
    options = []
    for group in groups:
        size, order = len(group.scores), np.argsort(group.scores, kind="stable")
        floor = max(1, int(np.ceil(min_keep * size)))
        widths = [size] + [kept for kept in range(size - 1, floor - 1, -1) if kept % round_to == 0]
        options.append([np.isin(np.arange(size), order[: size - kept]) for kept in widths])
    names = [group.name for group in groups]
    return [dict(zip(names, masks, strict=True)) for masks in itertools.product(*options)]


@given(st.integers(0, 10_000), st.sampled_from([0.8, 0.65, 0.5, 0.35]))
@settings(max_examples=40, deadline=None)
def test_rounded_groups_meet_a_target_that_any_allocation_meets(seed, flops):
    rng = np.random.default_rng(seed)
    groups, cost = random_problem(seed, sizes=8 * rng.integers(3, 9, size=3))
    errors = [abs(cost.macs(masks) / cost.dense - flops) / flops for masks in every_allocation(groups, 8, 0.1)]
    try:
        plan = make_plan(groups, cost, flops=flops, round_to=8)
    except UnreachableTargetError:
        assert min(errors) > 0.01
        return
    assert (plan.error <= 0.01) == (min(errors) <= 0.01)
    assert bool(plan.notes) == (plan.error > 0.01)
    for group in groups:
        count, mask = kept(plan)[group.name], plan.removed[group.name]
        assert count == len(mask) or (count % 8 == 0 and count > 0)
        if mask.any() and not mask.all():  # the lowest of a group still leave first
            assert group.scores[mask].max() <= group.scores[~mask].min()


def test_groups_exchange_the_portions_nearest_to_the_threshold():
    """10 of 46 MACs are to leave. Cuts in order take 9; a and d make 10, and so do c and e, farther from the cut."""
    portion = {"a": 2.0, "b": 3.0, "c": 4.0, "d": 8.0, "e": 6.0}
    scores = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 30.0}
    groups = [ScoredGroup(name, np.repeat([score, 40.0], 2)) for name, score in scores.items()]
    cost = CostModel([Term(2 * macs, (Side(4, {name: np.ones(4)}),)) for name, macs in portion.items()])
    plan = make_plan(groups, cost, flops=36 / 46, round_to=2)
    assert plan.macs == 36.0
    assert [int(plan.removed[name].sum()) for name in "abcde"] == [2, 0, 0, 2, 0]
    assert plan.threshold == 4.0
    coarse = make_plan(groups, cost, flops=36 / 46, round_to=2, tolerance=0.1)  # what is near enough is left alone
    assert [int(coarse.removed[name].sum()) for name in "abcde"] == [2, 2, 2, 0, 0]


def test_groups_narrower_than_round_to_stay_whole():
    groups, cost = problem([np.zeros(6), np.linspace(1, 2, 64)])
    assert kept(make_plan(groups, cost, flops=0.5, round_to=8, tolerance=0.1))["g0"] == 6


def test_blocks_and_round_to_combine():
    groups, cost = problem([np.random.default_rng(1).random(48)], blocks=[6])
    assert kept(make_plan(groups, cost, flops=0.5, round_to=4, tolerance=0.5))["g0"] % 12 == 0


def test_blocks_lose_the_same_places():
    scores = np.array([9, 1, 8, 7, 9, 1, 1, 9, 9, 3, 9, 9], dtype=float)  # 3 blocks of 4
    groups, cost = problem([scores], blocks=[3])
    mask = make_plan(groups, cost, flops=0.75, tolerance=0.1).removed["g0"].reshape(3, 4)
    assert (mask == mask[0]).all()
    assert mask[0].tolist() == [False, True, False, False]  # lowest mean: (1 + 1 + 3) / 3
    with pytest.raises(TwoAxisError, match="12 channels do not split into 5 blocks"):
        make_plan(*problem([scores], blocks=[5]), flops=0.5)


def test_runs_of_neighbours_leave_together():
    scores = np.array([9, 1, 2, 2, 8, 1, 3, 3, 5, 5, 5, 5], dtype=float)  # 6 runs of 2
    _, cost = problem([scores])
    mask = make_plan([ScoredGroup("g0", scores, run=2)], cost, flops=0.7, tolerance=0.2).removed["g0"].reshape(6, 2)
    assert (mask[:, 0] == mask[:, 1]).all()
    assert mask[:, 0].tolist() == [False, True, False, True, False, False]  # means 5, 2, 4.5, 3, 5, 5
    mask = make_plan([ScoredGroup("g0", scores, blocks=3, run=2)], cost, flops=0.6, tolerance=0.3).removed["g0"]
    assert mask.reshape(3, 2, 2).tolist() == [[[False, False], [True, True]]] * 3
    with pytest.raises(TwoAxisError, match="12 channels do not split into 1 blocks of runs of 5"):
        make_plan([ScoredGroup("g0", scores, run=5)], cost, flops=0.5)


def test_unreachable_target_gives_the_range():
    groups, cost = random_problem(0)
    with pytest.raises(UnreachableTargetError, match=r"between 0\.(\d+) and 1.*min_keep=0.9") as info:
        make_plan(groups, cost, flops=0.2, min_keep=0.9)
    least = float(str(info.value).split("between ")[1].split(" ")[0])
    assert least_share(groups, cost, min_keep=0.9) == pytest.approx(least, abs=5e-4)
    assert make_plan(groups, cost, flops=least + 0.002, min_keep=0.9).error <= 0.01
    with pytest.raises(UnreachableTargetError, match="round_to=8"):
        make_plan(groups, cost, flops=0.01, round_to=8)
    with pytest.raises(UnreachableTargetError, match=r"between 1\.000 and 1"):
        make_plan([], cost, flops=0.5)


def test_too_coarse_a_removal_is_said():
    groups, cost = problem([[1.0, 2.0]])
    plan = make_plan(groups, cost, flops=0.75)
    assert plan.error > 0.01
    assert "no removal near the threshold lies closer" in plan.notes[0]
    assert not make_plan(groups, cost, flops=1.0).notes


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"flops": 0.0}, r"flops: expected.*\(0, 1\], got 0.0"),
        ({"flops": 1.2}, "flops.*1.2"),
        ({"flops": float("nan")}, "flops.*nan"),
        ({"flops": 50}, "flops.*50"),
        ({"flops": 0.5, "min_keep": 0.0}, "min_keep"),
        ({"flops": 0.5, "min_keep": 1.5}, "min_keep"),
        ({"flops": 0.5, "round_to": 0}, "round_to"),
        ({"flops": 0.5, "tolerance": 0.0}, "tolerance"),
    ],
)
def test_arguments_are_checked(bad, message):
    with pytest.raises(TwoAxisError, match=message):
        make_plan(*random_problem(0), **bad)


def test_a_step_on_the_way_stays_above_its_target_and_fills_no_gap():
    coarse = ScoredGroup("coarse", np.array([1.0, 2.0, 3.0, 4.0]))
    cheap = ScoredGroup("cheap", np.arange(10.0, 30.0))
    sides = Side(4, {"coarse": np.ones(4)}), Side(20, {"cheap": np.ones(20)})
    cost = CostModel([Term(800.0, sides[:1]), Term(200.0, sides[1:])])
    options = {"flops": 0.55, "min_keep": 0.05}
    assert make_plan([coarse, cheap], cost, **options).removed["cheap"].sum() == 5
    on_the_way = make_plan([coarse, cheap], cost, tolerance=None, **options)
    assert on_the_way.removed["coarse"].tolist() == [True, True, False, False]
    assert not on_the_way.removed["cheap"].any()
    assert (on_the_way.macs, on_the_way.notes) == (600.0, [])


def test_floors_and_targets_of_a_network_that_was_pruned_before():
    group = ScoredGroup("a", np.arange(6.0), width=10)
    cost = CostModel([Term(600.0, (Side(6, {"a": np.ones(6)}),))])
    plan = make_plan([group], cost, flops=0.5, min_keep=0.5, dense=1000.0)
    assert (plan.macs, plan.dense, plan.target) == (500.0, 1000.0, 500.0)
    with pytest.raises(UnreachableTargetError, match=r"between 0\.500 and 1"):
        make_plan([group], cost, flops=0.4, min_keep=0.5, dense=1000.0)


def test_blocks_that_need_not_be_aligned_lose_the_lowest_of_their_own():
    scores = np.array([9, 1, 8, 7, 9, 4, 1, 9, 2, 3, 9, 9], dtype=float)  # 3 blocks of 4
    _, cost = problem([scores], blocks=[3])
    group = ScoredGroup("g0", scores, blocks=3, aligned=False)
    mask = make_plan([group], cost, flops=0.75, tolerance=0.3).removed["g0"]
    assert np.flatnonzero(mask).tolist() == [1, 6, 8]
    mask = make_plan([group], cost, flops=0.5, tolerance=0.3).removed["g0"]
    assert np.flatnonzero(mask).tolist() == [1, 3, 5, 6, 8, 9]


@pytest.mark.parametrize(("aligned", "constant", "first"), [(True, [4, 5, 10], {4, 10}), (False, [4, 5, 6, 7], None)])
def test_constant_channels_leave_before_the_lowest_scores(aligned, constant, first):
    # two blocks; where they must stay aligned a place counts that is constant in both, else as many as in each
    groups, cost = problem([np.arange(12.0) + 100.0, np.arange(12.0)], blocks=[2, 1])
    groups[0] = replace(groups[0], constant=np.isin(np.arange(12), constant), aligned=aligned)
    first = first or set(constant)
    for share in np.linspace(0.99, 0.3, 30):
        plan = make_plan(groups, cost, flops=share, tolerance=None)
        gone = set(np.flatnonzero(plan.removed["g0"]))
        assert gone <= first or plan.removed["g1"].sum() == 10  # down to the floor
        assert gone >= first or not plan.removed["g1"].any()
        assert plan.threshold == (-np.inf if not plan.removed["g1"].any() else plan.threshold)


def test_a_wide_network_is_planned_without_masks_until_the_end(monkeypatch):
    groups, cost = random_problem(4, sizes=(512,) * 12)
    masked = []
    macs = CostModel.macs
    monkeypatch.setattr(CostModel, "macs", lambda self, removed: masked.append(removed) or macs(self, removed))
    for options in ({}, {"round_to": 64, "tolerance": 1e-4}, {"tolerance": 1e-9}):
        masked.clear()
        plan = make_plan(groups, cost, flops=0.5, **options)
        assert len(masked) == 1
        assert plan.macs == macs(cost, plan.removed)
        assert plan.notes or plan.error <= options.get("tolerance", 0.01)


def test_constant_channels_are_exchanged_at_no_distance_from_each_other():
    groups, cost = problem([np.arange(16.0), np.arange(16.0) + 20.0, np.arange(24.0)])
    groups = [replace(group, constant=np.arange(len(group.scores)) < 15) for group in groups]
    plan = make_plan(groups, cost, flops=0.62, round_to=4, tolerance=0.004)
    assert plan.threshold == -np.inf
