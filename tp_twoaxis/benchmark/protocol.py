"""The fixed protocol of a comparison: its grid, its seeds, the area under a curve, and intervals over seeds.

Everything here is arithmetic on numbers that were measured; nothing touches a model. Shares of MACs are of the
dense network, retention is accuracy over the dense network's accuracy, both without unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from tp_twoaxis.errors import TwoAxisError

SEEDS = (42, 123, 456, 789, 1011)
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Ten levels, as in the paper. There they are shares of channels; here, MACs being matched, of MACs (**ours**)."""
KEEP = tuple(round(1.0 - sparsity, 4) for sparsity in SPARSITIES)
FINETUNE_BATCHES = 200
FINETUNE_EPOCHS = 5
FINETUNE_LR = 0.01
BATCH_SIZE = 128
CALIBRATION_IMAGES = 5000


class Curve(NamedTuple):
    """One method's measurements on one seed, in any order.

    Attributes:
        removed: [n] shares of the dense MACs that were removed, in [0, 1].
        retention: [n] accuracy over dense accuracy.
    """

    removed: Sequence[float]
    retention: Sequence[float]


class Interval(NamedTuple):
    """A mean over seeds and its confidence interval; the bounds are NaN for a single seed."""

    mean: float
    low: float
    high: float


def covered(curve: Curve) -> tuple[float, float]:
    """Return the smallest and the largest share of MACs removed that a curve was measured at.

    Raises:
        TwoAxisError: the curve has no points.

    Example:
        >>> covered(Curve([0.5, 0.3], [0.6, 0.9]))
        (0.3, 0.5)
    """
    if len(curve.removed) == 0:
        raise TwoAxisError("curve: expected at least one measurement, got none; run its trials")
    return min(curve.removed), max(curve.removed)


def common_interval(curves: Mapping[str, Sequence[Curve]]) -> tuple[float, float]:
    """Find the interval of MACs removed that all methods cover on all their seeds.

    Args:
        curves: method -> its curves, one a seed.

    Returns:
        Lower and upper end, shares of the dense MACs.

    Raises:
        TwoAxisError: there is no such interval; the message names the methods that break it.

    Example:
        >>> a, b = Curve([0.3, 0.7], [0.9, 0.5]), Curve([0.2, 0.6], [0.8, 0.4])
        >>> common_interval({"a": [a], "b": [b]})
        (0.3, 0.6)
    """
    ranges: dict[str, tuple[float, float]] = {}
    for method, own in curves.items():
        ends = [covered(curve) for curve in own]
        if not ends:
            raise TwoAxisError(f"{method}: expected at least one curve, got none; run its trials")
        ranges[method] = max(low for low, _ in ends), min(high for _, high in ends)
    if not ranges:
        raise TwoAxisError("expected at least one method with measurements, got none; run the sweep first")
    low, high = _intersect(ranges)
    if low < high:
        return low, high
    alone = [method for method in ranges if ranges[method][0] >= ranges[method][1]]
    others = {m: _intersect({k: r for k, r in ranges.items() if k != m}) for m in ranges if len(ranges) > 1}
    # without this one the rest would agree
    breakers = [method for method, (start, end) in others.items() if start < end]
    last, first = max(ranges, key=lambda m: ranges[m][0]), min(ranges, key=lambda m: ranges[m][1])
    named = alone or breakers or [last, first]
    got = ", ".join(f"{method!r} covers {_percent(ranges[method])}" for method in named)
    rest = ""
    if len(named) == 1 and named[0] in others and others[named[0]][0] < others[named[0]][1]:
        rest = f" and the others {_percent(others[named[0]])}"
    raise TwoAxisError(
        f"expected an interval of removed MACs that all {len(ranges)} methods cover on all seeds, got none: "
        f"{got}{rest}; measure more values of keep there, or leave the method out of the table"
    )


def _intersect(ranges: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    return max(low for low, _ in ranges.values()), min(high for _, high in ranges.values())


def _percent(ends: tuple[float, float]) -> str:
    low, high = ends
    if low > high:
        return "nothing on all its seeds"
    return f"only {100 * low:.1f} %" if low == high else f"{100 * low:.1f} to {100 * high:.1f} %"


def retention_auc(curve: Curve, interval: tuple[float, float]) -> float:
    """Mean retention over an interval of MACs removed: the area under the straight lines between points, by width.

    Measurements at equal MACs are averaged first. 1 means that no accuracy was lost anywhere in the interval.

    Args:
        curve: the measurements.
        interval: lower and upper end, inside what the curve covers.

    Raises:
        TwoAxisError: the interval is empty or reaches beyond the curve.

    Example:
        >>> retention_auc(Curve([0.5, 0.0, 1.0], [0.5, 1.0, 0.0]), (0.0, 0.5))
        0.75
    """
    low, high = interval
    start, end = covered(curve)
    if not start <= low < high <= end:
        raise TwoAxisError(
            f"interval: expected one inside {start:.4f} to {end:.4f}, got {low:.4f} to {high:.4f}; "
            "take it from common_interval()"
        )
    y = np.asarray(curve.retention, dtype=np.float64)
    x, place = np.unique(np.asarray(curve.removed, dtype=np.float64), return_inverse=True)
    y = np.bincount(place, weights=y) / np.bincount(place)
    inside = x[(x > low) & (x < high)]
    knots = np.concatenate([[low], inside, [high]])
    heights = np.interp(knots, x, y)
    return float(np.sum(np.diff(knots) * (heights[1:] + heights[:-1]) / 2) / (high - low))


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean over seeds with Student's interval; see :func:`paired_interval`.

    Example:
        >>> mean_interval([0.5, 0.5, 0.5])
        Interval(mean=0.5, low=0.5, high=0.5)
    """
    return _student(np.asarray(values, dtype=np.float64), level)


def paired_interval(first: Sequence[float], second: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean difference of two methods and Student's paired interval over seeds.

    Each seed brings both methods' numbers, so what is easy or hard about a seed cancels. The interval is
    ``mean -+ t(n - 1) s / sqrt(n)`` with s the sample standard deviation of the n differences (Student 1908). It covers
    the mean over all seeds in ``level`` of all repetitions where differences are normal, also at two seeds, where it is
    wide because two numbers say little of their spread; a percentile bootstrap covers 52 % there instead of 95, and 85
    at five. It says nothing of other networks.

    Args:
        first: [seeds] of one method.
        second: [seeds] of the other, in the same order.
        level: of confidence.

    Returns:
        The mean of ``first - second`` and its interval.

    Raises:
        TwoAxisError: the lengths differ or are 0.

    Example:
        >>> paired_interval([0.8, 0.7, 0.9], [0.7, 0.6, 0.8]).low > 0
        True
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise TwoAxisError(f"expected the same seeds of both methods, got {a.size} and {b.size}; run what is missing")
    return _student(a - b, level)


def _student(values: Any, level: float) -> Interval:
    if values.ndim != 1 or values.size == 0:
        raise TwoAxisError(f"expected one number a seed, got shape {list(values.shape)}; run the trials first")
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, math.nan, math.nan)
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    half = stdtrit(values.size - 1, (1 + level) / 2) * values.std(ddof=1) / math.sqrt(values.size)
    return Interval(mean, float(mean - half), float(mean + half))
