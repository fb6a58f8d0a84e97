"""Tables of cells condensed: over cells, over trained models within backbones, and with one backbone left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest, bootstrap

from tp_twoaxis.diagnostics.evidence import RESAMPLES, Estimate, mean_estimate

RUN = ["network", "seed"]
"""Columns that tell trained models apart: the backbone, and which training of it."""
FEWEST_MODELS = 3
"""Of some backbone, for an interval over models: that of two would be their two values."""


def with_runs(cells: pd.DataFrame) -> pd.DataFrame:
    """Give a table the columns of :data:`RUN`, empty where it is of one model and has none.

    Example:
        >>> with_runs(pd.DataFrame({"rho": [0.5]})).columns.tolist()
        ['rho', 'network', 'seed']
    """
    return cells.assign(**{key: cells.get(key, "") for key in RUN})


def run_means(cells: pd.DataFrame, column: str) -> pd.DataFrame:
    """Average a column over the cells of each trained model.

    Args:
        cells: one row a cell; columns ``network`` (the backbone) and ``seed`` where there are several models.
        column: of numbers; NaN is left out.

    Returns:
        Columns ``network``, ``seed`` and ``value``, one row a model.

    Example:
        >>> cells = pd.DataFrame({"network": ["a", "a", "a"], "seed": [1, 1, 2], "rho": [0.0, 0.2, 0.5]})
        >>> run_means(cells, "rho").value.round(3).tolist()
        [0.1, 0.5]
    """
    means = with_runs(cells).groupby(RUN, sort=False)[column].mean()
    return means.dropna().rename("value").reset_index()


def model_bootstrap(cells: pd.DataFrame, column: str, *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Average over backbones with an interval that says what other trainings would give.

    Models are drawn with replacement within each backbone (10,000 resamples, percentile interval); a model counts with
    the mean of its cells and each backbone as much as any other, which is ours. A backbone with one model cannot vary.

    Args:
        cells: see :func:`run_means`.
        column: of numbers.
        level: of the interval, in (0, 1).
        seed: of the resamples.

    Returns:
        The estimate; without an interval where no backbone has three models.

    Example:
        >>> cells = pd.DataFrame({"network": list("aaab"), "seed": [1, 2, 3, 1], "rho": [0.0, 0.2, 0.4, 0.6]})
        >>> str(model_bootstrap(cells, "rho"))
        '0.400 [0.300, 0.500]'
    """
    models = run_means(cells, column)
    backbones = [group.to_numpy() for _, group in models.groupby("network").value]
    if not backbones:
        return Estimate(math.nan)
    several = [values for values in backbones if len(values) > 1]
    single = sum(float(values[0]) for values in backbones if len(values) == 1)
    value = float(np.mean([values.mean() for values in backbones]))
    if max(map(len, backbones)) < FEWEST_MODELS:
        return Estimate(value)

    def mean_of_backbones(*drawn: Any, axis: int = -1) -> Any:
        return (single + sum(values.mean(axis=axis) for values in drawn)) / len(backbones)

    found = bootstrap(
        several, mean_of_backbones, n_resamples=RESAMPLES, confidence_level=level, method="percentile", rng=seed
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high))


def aggregate_runs(cells: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Condense columns the ways of table 3.

    Args:
        cells: one row a cell, of one model or of several; see :func:`run_means`.
        columns: of numbers.

    Returns:
        A row for each column and way, with the columns ``quantity``, ``over``, ``count``, ``mean``, ``sd``, ``sem``,
        ``lower`` and ``upper``. Ways: ``cells``, all alike, with the bootstrap over them; where there are several
        models, ``models``, bootstrapped within backbones; where there are several backbones, ``without NAME``, the
        same without one.

    Example:
        >>> cells = pd.DataFrame({"network": list("aabb"), "seed": [1, 2, 1, 2], "rho": [0.0, 0.2, 0.4, 0.6]})
        >>> aggregate_runs(cells, ["rho"])[["over", "mean"]].round(3).values.tolist()
        [['cells', 0.3], ['models', 0.3], ['without a', 0.5], ['without b', 0.1]]
    """
    rows = []
    for column in columns:
        known = cells[column].dropna()
        rows.append(_row(column, "cells", known, mean_estimate(known.tolist())))
        models = run_means(cells, column)
        if len(models) < 2:
            continue
        rows.append(_row(column, "models", models.value, model_bootstrap(cells, column)))
        backbones = models.network.unique()
        for name in backbones if len(backbones) > 1 else ():
            rest = cells[cells.network != name]
            rows.append(_row(column, f"without {name}", run_means(rest, column).value, model_bootstrap(rest, column)))
    return pd.DataFrame(rows)


def best_estimate(cells: pd.DataFrame, column: str) -> Estimate:
    """Estimate a column's mean over models where its interval can be had, otherwise over cells.

    Three or more cells that are exactly alike, as those of an identity are, have an interval without width.

    Example:
        >>> best_estimate(pd.DataFrame({"rho": [0.25, 0.5, 0.75]}), "rho").value
        0.5
    """
    models = model_bootstrap(cells, column)
    if not math.isnan(models.lower):
        return models
    known = cells[column].dropna()
    if len(known) > 2 and known.nunique() == 1:
        return Estimate(*[float(known.iloc[0])] * 3)
    return mean_estimate(known.tolist())


def best_share(cells: pd.DataFrame, column: str) -> Estimate:
    """Share of cells that meet a condition, over models where its interval can be had, otherwise Wilson's over cells.

    Args:
        cells: see :func:`run_means`.
        column: of booleans.

    Example:
        >>> str(best_share(pd.DataFrame({"few": [True] * 19 + [False]}), "few"))
        '0.950 [0.764, 0.991]'
    """
    models = model_bootstrap(cells.assign(**{column: cells[column].astype(float)}), column)
    return share_estimate(int(cells[column].sum()), len(cells)) if math.isnan(models.lower) else models


def share_estimate(hits: int, count: int, level: float = 0.95) -> Estimate:
    """Share of cells that meet a condition with its Wilson score interval (Wilson 1927).

    Args:
        hits: how many meet it.
        count: of how many.
        level: of the interval, in (0, 1).

    Example:
        >>> str(share_estimate(19, 20)), str(share_estimate(0, 0))
        ('0.950 [0.764, 0.991]', 'nan')
    """
    if not count:
        return Estimate(math.nan)
    result = binomtest(hits, count)
    interval = result.proportion_ci(level, method="wilson")
    return Estimate(float(result.statistic), float(interval.low), float(interval.high))


def _row(column: str, over: str, values: pd.Series, estimate: Estimate) -> dict[str, Any]:
    spread = values.std(ddof=1) if len(values) > 1 else math.nan
    return {
        "quantity": column,
        "over": over,
        "count": len(values),
        "mean": estimate.value,
        "sd": spread,
        "sem": spread / math.sqrt(len(values)) if len(values) else math.nan,
        "lower": estimate.lower,
        "upper": estimate.upper,
    }
