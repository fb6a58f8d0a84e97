"""Areas and intervals against slow twins."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_twoaxis import TwoAxisError
from tp_twoaxis.benchmark.protocol import (
    KEEP,
    SEEDS,
    SPARSITIES,
    Curve,
    common_interval,
    mean_interval,
    paired_interval,
    retention_auc,
)


def slow_auc(curve, low, high, steps=20_000):
    """Midpoint rule on the piecewise linear curve, written out."""
    points = {}
    for x, y in zip(*curve, strict=True):
        points.setdefault(x, []).append(y)
    knots = [(x, sum(ys) / len(ys)) for x, ys in sorted(points.items())]
    total = 0.0
    for i in range(steps):
        at = low + (high - low) * (i + 0.5) / steps
        for (x0, y0), (x1, y1) in itertools.pairwise(knots):
            if x0 <= at <= x1:
                total += y0 + (y1 - y0) * (at - x0) / (x1 - x0)
                break
    return total / steps


def test_the_paper_s_grid_and_seeds():
    assert SEEDS == (42, 123, 456, 789, 1011)
    assert (len(SPARSITIES), SPARSITIES[0], SPARSITIES[-1]) == (10, 0.1, 0.95)
    assert [round(1 - keep, 4) for keep in KEEP] == list(SPARSITIES)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10), st.floats(0, 1)), min_size=3, max_size=8).filter(
        lambda points: len({x for x, _ in points}) > 2
    )
)
def test_auc_is_that_of_the_slow_twin(points):
    curve = Curve([x / 10 for x, _ in points], [y for _, y in points])
    low, high = min(curve.removed), max(curve.removed)
    inside = (low + 0.03, high - 0.04) if high - low > 0.1 else (low, high)
    assert retention_auc(curve, inside) == pytest.approx(slow_auc(curve, *inside), abs=2e-4)


def test_auc_is_a_mean():
    flat = Curve([0.2, 0.5, 0.9], [0.7] * 3)
    assert retention_auc(flat, (0.3, 0.8)) == pytest.approx(0.7)
    shuffled = Curve([0.9, 0.2, 0.5], [0.1, 0.9, 0.4])
    assert retention_auc(shuffled, (0.2, 0.9)) == retention_auc(Curve([0.2, 0.5, 0.9], [0.9, 0.4, 0.1]), (0.2, 0.9))
    for wrong in ((0.1, 0.5), (0.5, 0.95), (0.5, 0.5)):
        with pytest.raises(TwoAxisError, match="inside"):
            retention_auc(flat, wrong)


def test_common_interval_is_covered_by_every_seed():
    a, b = Curve([0.3, 0.7], [1, 0]), Curve([0.35, 0.65], [1, 0])
    assert common_interval({"x": [a, b], "y": [a]}) == (0.35, 0.65)


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({"a": (0.1, 0.5), "b": (0.2, 0.4), "c": (0.6, 0.9)}, r"'c' covers 60.0 to 90.0 % and the others 20.0 to 40"),
        ({"a": (0.1, 0.4), "b": (0.5, 0.9)}, r"'a' covers 10.0 to 40.0 %.*'b' covers 50.0 to 90.0 %"),
        ({"a": (0.1, 0.9), "b": (0.5, 0.5)}, r"'b' covers only 50.0 % and the others 10.0 to 90.0 %"),
        ({"a": (0.1, 0.2), "b": (0.4, 0.5), "c": (0.7, 0.8)}, r"'c' covers 70.0 to 80.0 %, 'a' covers 10.0 to 20.0"),
        ({"a": (0.5, 0.5)}, "'a' covers only 50.0 %"),
    ],
)
def test_without_a_common_interval_the_culprit_is_named(curves, message):
    with pytest.raises(TwoAxisError, match=message):
        common_interval({name: [Curve(ends, (1, 0))] for name, ends in curves.items()})


def test_nothing_measured():
    for empty in ({}, {"a": []}, {"a": [Curve([], [])]}):
        with pytest.raises(TwoAxisError, match="at least one"):
            common_interval(empty)


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("values", [[0.1, 0.4], [0.1, 0.4, 0.2, 0.35, 0.5], [1.0, 2.0, 4.0, 8.0]])
def test_intervals_are_student_s(values, level):
    got, n = mean_interval(values, level=level), len(values)
    mean = sum(values) / n
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    low, high = scipy.stats.t.interval(level, n - 1, mean, error)
    assert got == pytest.approx((mean, low, high))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_what_they_say(seeds):
    """Of 4,000 repetitions 95 % hold the truth, within four standard errors."""
    rng = np.random.default_rng(seeds)
    held = 0
    for noise in rng.normal(size=(4000, seeds)):
        interval = paired_interval(0.7 + 0.02 * noise, np.full(seeds, 0.6))
        held += interval.low <= 0.1 <= interval.high
    assert abs(held / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_pairing_cancels_what_seeds_have_in_common():
    first = np.array([0.9, 0.5, 0.7, 0.2, 0.6])
    paired = paired_interval(first, first - [0.01, 0.02, 0.03, 0.02, 0.01])
    assert 0.007 < paired.low < paired.high < 0.029
    alone = mean_interval(first)
    assert alone.high - alone.low > 10 * (paired.high - paired.low)
    backwards = paired_interval(first - [0.01, 0.02, 0.03, 0.02, 0.01], first)
    assert backwards == pytest.approx((-paired.mean, -paired.high, -paired.low))


def test_degenerate_samples():
    one = mean_interval([0.4])
    assert one.mean == 0.4
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert mean_interval([0.25] * 5) == (0.25, 0.25, 0.25)
    for first, second in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(TwoAxisError, match="seed"):
            paired_interval(first, second)
