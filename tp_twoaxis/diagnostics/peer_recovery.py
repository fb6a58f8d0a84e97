"""What peers give back of a removed channel's damage, and what tells it: the paper's tables 15 and 16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from tp_twoaxis.diagnostics.evidence import RESAMPLES, Estimate
from tp_twoaxis.diagnostics.lesion_damage import spearman
from tp_twoaxis.diagnostics.lesion_probe import by_cell
from tp_twoaxis.diagnostics.rank_agreement import FEWEST_CHANNELS
from tp_twoaxis.diagnostics.run_aggregates import share_estimate

Array = np.ndarray[Any, np.dtype[np.float64]]

DAMAGES = (0.001, 0.005, 0.02)  # nats
KEPT = (0.52, 0.39, 0.23)  # shares of the channels; the paper's 1,409, 1,069 and 624 of 2,720
BATCH = 1_000  # resamples at a time
BINS = 5  # of task information, in a cell
FEWEST_RESAMPLED = 10  # channels that intervals are made for; ours
MATCHED = ("peer_explanation", "capture", "task_mi")


def damaged_channels(channels: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Keep the channels whose removal costs more than each of six thresholds.

    The paper's thresholds are lost, its numbers of channels are not; so there are three in nats, and the three
    quantiles of all probed channels that keep the same shares as in the paper. Below 0 there is no damage to give back,
    and no threshold is lower.

    Args:
        channels: from :func:`~tp_twoaxis.diagnostics.lesion_probe.lesion_probe`.

    Yields:
        What names the threshold, and the channels that vary and are above it, with a column ``share``: the part of the
        damage that the peers' prediction gives back, ``(damage - peer_damage) / damage``, at most about 1 and negative
        where it does more harm than the removal.

    Example:
        >>> table = pd.DataFrame({"constant": False, "damage": [-0.1, 0.004, 0.5], "peer_damage": [0.0, 0.001, 0.1]})
        >>> [(names["rule"], part.share.tolist()) for names, part in damaged_channels(table)][:2]
        [('above 0.001 nats', [0.75, 0.8]), ('above 0.005 nats', [0.8])]
    """
    varying = channels[~channels.constant]
    rules = {f"above {nats:g} nats": nats for nats in DAMAGES}
    rules |= {f"largest {share:.0%}": max(0.0, float(varying.damage.quantile(1.0 - share))) for share in KEPT}
    for rule, threshold in rules.items():
        part = varying[varying.damage > threshold]
        yield {"rule": rule, "threshold": threshold}, part.assign(share=1.0 - part.peer_damage / part.damage)


def recovery_table(channels: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Say how much of the damage 8 peers give back, and what goes with it (paper, table 15).

    Args:
        channels: from :func:`~tp_twoaxis.diagnostics.lesion_probe.lesion_probe`.
        seed: of the resamples.

    Returns:
        One row a threshold: number of channels, median ``share`` that is given back, share of channels that are
        ``helped`` (by any amount), Spearman's correlations of the share with E_8 and with M over all these channels,
        whatever their cell, and their difference ``advantage``; the share, ``helped`` and the difference with 95 %
        intervals (bootstrap over channels, Wilson's, bootstrap of the ranks; none by bootstrap below ten channels).

    Example:
        >>> table = pd.DataFrame({"constant": False, "damage": [0.1, 0.2, 0.5], "peer_damage": [0.3, 0.1, 0.1],
        ...                       "peer_explanation": [0.1, 0.5, 0.9], "task_mi": [0.3, 0.1, 0.2]})
        >>> recovery_table(table)[["channels", "share", "helped", "peer_explanation"]].round(3).values.tolist()[0]
        [3.0, 0.5, 0.667, 1.0]
    """
    rows = []
    for names, part in damaged_channels(channels):
        ranks = [_ranks(part[name]) for name in ("share", "peer_explanation", "task_mi")]
        median = _resampled(np.median, part.share.to_numpy(np.float64), seed=seed)
        helped = share_estimate(int((part.share > 0).sum()), len(part))
        rows.append(
            {
                **names,
                "channels": len(part),
                **_columns("share", median),
                **_columns("helped", helped),
                "peer_explanation": spearman(part.share, part.peer_explanation),
                "task_mi": spearman(part.share, part.task_mi),
                **_columns("advantage", _resampled(_advantage, *ranks, seed=seed)),
            }
        )
    return pd.DataFrame(rows)


def matched_recovery_table(channels: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Say what tells the recovered share among channels with equal task information (paper, table 16).

    The channels of a cell above the threshold are cut into five bins of equally many by M. Within a bin, share, E_8, I
    and M are ranked and their mean rank is taken away; correlations are of these ranks, over all bins and cells, and
    intervals resample channels with the ranks they have. A bin is won where the half with the larger E_8 gives back
    more, by the halves' medians; the middle one of an odd number is in neither half. A bin of one channel says nothing.
    The paper does not fix whether channels are binned or ranked before the threshold, nor how halves are compared:
    ours.

    Args:
        channels: from :func:`~tp_twoaxis.diagnostics.lesion_probe.lesion_probe`.
        seed: of the resamples.

    Returns:
        One row a threshold: number of channels, correlations of the share with ``peer_explanation``, ``capture`` and
        ``task_mi`` in [-1, 1], the ``win_rate`` over ``bins``, all with 95 % intervals; correlations of fewer than ten
        channels have none.

    Example:
        >>> table = pd.DataFrame({"layer": "conv1", "depth": 0.0, "constant": False, "damage": 1.0,
        ...                       "peer_damage": [0.9, 0.1] * 5, "peer_explanation": [0.2, 0.8] * 5,
        ...                       "capture": range(10), "task_mi": range(10)})
        >>> matched_recovery_table(table)[["bins", "win_rate", "peer_explanation"]].round(3).values.tolist()[0]
        [5.0, 1.0, 1.0]
    """
    rows = []
    for names, part in damaged_channels(channels):
        bins = [group for _, cell in by_cell(part) for group in _task_bins(cell)]
        ranks = {name: _stacked(_ranks(group[name]) for group in bins) for name in ("share", *MATCHED)}
        found = {name: _resampled(_correlation, ranks["share"], ranks[name], seed=seed) for name in MATCHED}
        results = [won for group in bins if (won := _upper_half_wins(group)) is not None]
        found["win_rate"] = share_estimate(sum(results), len(results))
        columns = {key: value for name, estimate in found.items() for key, value in _columns(name, estimate).items()}
        rows.append({**names, "channels": len(part), **columns, "bins": len(results)})
    return pd.DataFrame(rows)


def _task_bins(cell: pd.DataFrame) -> list[pd.DataFrame]:
    """Cut a cell into bins by task information, of equal numbers up to one; those of one channel are left out."""
    ordered = cell.sort_values("task_mi", kind="stable")
    number = np.arange(len(ordered)) * BINS // max(len(ordered), 1)
    return [ordered[number == bin_] for bin_ in range(BINS) if (number == bin_).sum() > 1]


def _upper_half_wins(group: pd.DataFrame) -> bool | None:
    """Whether the better explained half gives back more; None where both give the same."""
    half = len(group) // 2
    share = group.sort_values("peer_explanation", kind="stable").share.to_numpy(np.float64)
    low, high = float(np.median(share[:half])), float(np.median(share[-half:]))
    return None if low == high else high > low


def _ranks(values: pd.Series) -> Array:
    """Ranks less their mean."""
    ranks = np.asarray(rankdata(values.to_numpy(np.float64)), dtype=np.float64)
    return ranks - (len(ranks) + 1) / 2


def _stacked(parts: Iterator[Array]) -> Array:
    return np.concatenate([np.empty(0), *parts])


def _correlation(first: Array, second: Array, axis: int = -1) -> Array:
    """Pearson's correlation; NaN where a side never varies."""
    a, b = (values - values.mean(axis, keepdims=True) for values in (first, second))
    spread = np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
    found: Array = np.divide((a * b).sum(axis), spread, out=np.full_like(spread, np.nan), where=spread > 0)
    return found


def _advantage(share: Array, peers: Array, task: Array, axis: int = -1) -> Array:
    return _correlation(share, peers, axis) - _correlation(share, task, axis)


def _resampled(statistic: Callable[..., Array], *samples: Array, seed: int) -> Estimate:
    """Percentile bootstrap over channels, the samples' entries staying together; few channels have no interval."""
    count, rng = len(samples[0]), np.random.default_rng(seed)
    value = float(statistic(*samples)) if count >= FEWEST_CHANNELS else math.nan
    if math.isnan(value) or count < FEWEST_RESAMPLED:
        return Estimate(value)
    batches = (rng.integers(count, size=(BATCH, count)) for _ in range(RESAMPLES // BATCH))
    drawn = np.concatenate([statistic(*(sample[rows] for sample in samples), axis=-1) for rows in batches])
    lower, upper = np.nanpercentile(drawn, [2.5, 97.5])  # a resample in which nothing varies has no correlation
    return Estimate(value, float(lower), float(upper))


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_lower": estimate.lower, f"{name}_upper": estimate.upper}
