"""What changes from the first layer of a network to its last, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from tp_twoaxis.diagnostics.evidence import RESAMPLES, Estimate
from tp_twoaxis.diagnostics.rank_agreement import FEWEST_CHANNELS, rank_correlation
from tp_twoaxis.diagnostics.run_aggregates import RUN, model_bootstrap, with_runs


def depth_trend(depth: Sequence[float], values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Correlate a quantity with depth by ranks, with a percentile bootstrap interval over layers (10,000 resamples).

    Args:
        depth: a number a layer.
        values: a number a layer; NaN is left out.
        level: of the interval, in (0, 1).
        seed: of the resamples.

    Returns:
        Spearman's correlation in [-1, 1]: 1 where the quantity always rises; NaN for fewer than 3 layers.

    Example:
        >>> depth_trend([0.0, 0.5, 1.0], [3.0, 2.0, 1.0]).value
        -1.0
    """
    known = [(d, v) for d, v in zip(depth, values, strict=True) if not math.isnan(v)]
    if len(known) < FEWEST_CHANNELS:
        return Estimate(math.nan)
    pairs = torch.tensor(known, dtype=torch.float64)
    drawn = np.random.default_rng(seed).integers(len(known), size=(RESAMPLES, len(known)))
    resampled = pairs[torch.from_numpy(drawn)]
    found = rank_correlation(resampled[..., 0], resampled[..., 1]).numpy()
    found = found[~np.isnan(found)]  # one layer drawn throughout has no ranks
    value = float(rank_correlation(pairs[None, :, 0], pairs[None, :, 1]))
    if not len(found):
        return Estimate(value)
    lower, upper = np.quantile(found, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Estimate(value, float(lower), float(upper))


def best_trend(cells: pd.DataFrame, column: str, *, seed: int = 0) -> Estimate:
    """Correlate a column with depth, over models where its interval can be had, otherwise over the layers of all.

    Args:
        cells: one row a layer with the column ``depth``, of one model or of several; see
            :func:`~tp_twoaxis.diagnostics.run_aggregates.run_means`.
        column: of numbers.
        seed: of the resamples.

    Example:
        >>> best_trend(pd.DataFrame({"depth": [0.0, 0.5, 1.0], "size": [1.0, 2.0, 4.0]}), "size").value
        1.0
    """
    rows = []
    for run, part in with_runs(cells).dropna(subset=column).groupby(RUN, sort=False):
        values = torch.tensor(part[["depth", column]].to_numpy(dtype=np.float64)).T
        rho = float(rank_correlation(values[:1], values[1:])) if len(part) >= FEWEST_CHANNELS else math.nan
        rows.append({**dict(zip(RUN, run, strict=True)), "rho": rho})
    models = model_bootstrap(pd.DataFrame(rows), "rho") if rows else Estimate(math.nan)
    if not math.isnan(models.lower):
        return models
    return depth_trend(cells.depth.tolist(), cells[column].tolist(), seed=seed)
