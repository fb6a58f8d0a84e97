"""How often something comes out as predicted, with Wilson's interval."""

from __future__ import annotations

import math

from scipy.stats import binomtest

from tp_twoaxis.diagnostics.evidence import Estimate


def win_rate(wins: int, trials: int, *, level: float = 0.95) -> Estimate:
    """Share of trials that are won, with the interval of Wilson (1927), the paper's.

    Args:
        wins: 0 to ``trials``.
        trials: independent ones; of none there is no share, NaN.
        level: of the interval, in (0, 1).

    Example:
        >>> print(win_rate(134, 223))
        0.601 [0.535, 0.663]
    """
    if trials == 0:
        return Estimate(math.nan)
    interval = binomtest(int(wins), int(trials)).proportion_ci(level, method="wilson")
    return Estimate(wins / trials, float(interval.low), float(interval.high))
