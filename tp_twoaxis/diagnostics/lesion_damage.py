"""What the damage of a removed channel goes with: rank correlations, and pairs of channels with equal capture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from tp_twoaxis.diagnostics.axis_coordinates import cell_correlation
from tp_twoaxis.diagnostics.lesion_probe import by_cell
from tp_twoaxis.diagnostics.run_aggregates import share_estimate

# columns of the probe that damage is compared with
SCORES = ("norm", "capture", "overlap", "hull_size", "compact_support", "compact_local", "task_mi")
# of these, the side that the paper calls replaceable is the larger one
REPLACEABLE = ("overlap", "hull_size", "compact_support")


def spearman(first: pd.Series, second: pd.Series) -> float:
    """Spearman's rank correlation of two columns; NaN below three channels or where a column never varies.

    Example:
        >>> spearman(pd.Series([1.0, 2.0, 5.0]), pd.Series([3.0, 2.0, 1.0]))
        -1.0
    """
    return cell_correlation(*(torch.tensor(column.to_numpy(np.float64)) for column in (first, second)))


def damage_by_layer(channels: pd.DataFrame) -> pd.DataFrame:
    """Say how much removals cost in each cell, and for how many channels the images can tell.

    Args:
        channels: from :func:`~tp_twoaxis.diagnostics.lesion_probe.lesion_probe`.

    Returns:
        One row a cell: channels that vary; mean, median and largest damage and its mean standard error over images, in
        nats; the shares of channels that do ``harm`` or ``good`` by leaving, beyond two of their standard errors. The
        rest is too close to 0 for these images.

    Example:
        >>> table = pd.DataFrame({"layer": "conv1", "depth": 0.0, "constant": False,
        ...                       "damage": [0.0, 0.4], "damage_error": 0.1})
        >>> damage_by_layer(table)[["mean", "error", "harm", "good"]].round(3).values.tolist()
        [[0.2, 0.1, 0.5, 0.0]]
    """
    rows = []
    for names, part in by_cell(channels):
        damage, error = part.damage, part.damage_error
        rows.append(
            {
                **names,
                "channels": len(part),
                "mean": damage.mean(),
                "median": damage.median(),
                "largest": damage.max(),
                "error": error.mean(),
                "harm": (damage > 2 * error).mean(),
                "good": (damage < -2 * error).mean(),
            }
        )
    return pd.DataFrame(rows)


def damage_correlations(channels: pd.DataFrame) -> pd.DataFrame:
    """Correlate the damage with scores, by rank over the probed channels of each cell (paper, figure 5A).

    Args:
        channels: from :func:`~tp_twoaxis.diagnostics.lesion_probe.lesion_probe`.

    Returns:
        One row a cell; for each of :data:`SCORES` Spearman's correlation with the damage, in [-1, 1]. A score that says
        what is safe to remove, as ``compact_local``, should be below 0.

    Example:
        >>> table = pd.DataFrame({"layer": "conv1", "depth": 0.0, "constant": False, "damage": [1.0, 2.0, 3.0],
        ...                       **dict.fromkeys(SCORES, 1.0), "capture": [0.1, 0.2, 0.3]})
        >>> damage_correlations(table)[["layer", "capture", "overlap"]].values.tolist()
        [['conv1', 1.0, nan]]
    """
    rows = [
        {**names, "channels": len(part), **{score: spearman(part.damage, part[score]) for score in SCORES}}
        for names, part in by_cell(channels)
    ]
    return pd.DataFrame(rows)


def matched_pairs(channels: pd.DataFrame) -> pd.DataFrame:
    """Compare channels of a cell that capture nearly equally much (paper, appendices J and K.2).

    A cell is sorted by capture, and the first and second, third and fourth, ... channels are pairs, each channel in one
    pair, so that pairs are independent (ours). A pair is won where the channel with more overlap, a larger hull or more
    compact support is the one whose removal costs less; pairs with equal values on either side say nothing and are
    left out.

    Args:
        channels: from :func:`~tp_twoaxis.diagnostics.lesion_probe.lesion_probe`.

    Returns:
        One row a cell and property: ``pairs`` and ``wins``.

    Example:
        >>> table = pd.DataFrame({"layer": "conv1", "depth": 0.0, "constant": False, "capture": [0.1, 0.2, 0.3, 0.4],
        ...                       "overlap": [1.0, 2.0, 1.0, 2.0], "hull_size": 3, "compact_support": 0.3,
        ...                       "damage": [2.0, 1.0, 1.0, 2.0]})
        >>> matched_pairs(table)[["property", "pairs", "wins"]].values.tolist()
        [['overlap', 2, 1], ['hull_size', 0, 0], ['compact_support', 0, 0]]
    """
    rows = []
    for names, part in by_cell(channels):
        ordered = part.sort_values("capture", kind="stable")
        ordered = ordered.iloc[: len(ordered) // 2 * 2]
        damage = _differences(ordered.damage)
        for score in REPLACEABLE:
            product = damage * _differences(ordered[score])
            pairs, wins = int((product != 0).sum()), int((product < 0).sum())
            rows.append({**names, "property": score, "pairs": pairs, "wins": wins})
    return pd.DataFrame(rows)


def pooled_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """Put the pairs of all cells together.

    Args:
        pairs: from :func:`matched_pairs`.

    Returns:
        One row a property: ``pairs``, ``wins``, ``win_rate``, ``lower``, ``upper``.

    Example:
        >>> pairs = pd.DataFrame({"layer": ["a", "b"], "property": "overlap", "pairs": [3, 7], "wins": [2, 4]})
        >>> pooled_pairs(pairs).round(3).values.tolist()
        [['overlap', 10, 6, 0.6, 0.313, 0.832]]
    """
    total = pairs.groupby("property", sort=False)[["pairs", "wins"]].sum().reset_index()
    rates = [share_estimate(wins, count) for count, wins in zip(total["pairs"], total.wins, strict=True)]
    return total.assign(
        win_rate=[rate.value for rate in rates],
        lower=[rate.lower for rate in rates],
        upper=[rate.upper for rate in rates],
    )


def _differences(values: pd.Series) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Signs of second minus first of each two."""
    pairs = np.asarray(values, dtype=np.float64).reshape(-1, 2)
    return np.sign(pairs[:, 1] - pairs[:, 0])
