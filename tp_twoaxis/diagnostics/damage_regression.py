"""How much of the damage a few scores predict together: one more score at a time (paper, appendix J)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from tp_twoaxis.diagnostics.evidence import mean_estimate
from tp_twoaxis.diagnostics.lesion_probe import by_cell
from tp_twoaxis.diagnostics.rank_agreement import FEWEST_CHANNELS

# in the order in which they join
PREDICTORS = {
    "log_norm": "ln norm",
    "capture": "I",
    "overlap": "R",
    "compact_support": "K",
    "task_mi": "M",
}


def standardised(channels: pd.DataFrame) -> pd.DataFrame:
    """Standardise damage and predictors within each cell, mean 0 and deviation 1.

    Args:
        channels: from :func:`~tp_twoaxis.diagnostics.lesion_probe.lesion_probe`.

    Returns:
        What names the cell, ``cell`` (a number), ``damage`` and :data:`PREDICTORS`; a column that does not vary in a
        cell is 0 there. Cells of fewer than three channels are left out.

    Example:
        >>> table = pd.DataFrame({"layer": "conv1", "depth": 0.0, "constant": False, "damage": [1.0, 2.0, 3.0],
        ...                       "norm": 1.0, "capture": [0.1, 0.2, 0.3], "overlap": 1.0, "compact_support": 0.5,
        ...                       "task_mi": 0.2})
        >>> standardised(table)[["damage", "log_norm"]].round(2).values.tolist()
        [[-1.22, 0.0], [0.0, 0.0], [1.22, 0.0]]
    """
    frames = []
    for number, (names, part) in enumerate(by_cell(channels)):
        if len(part) < FEWEST_CHANNELS:
            continue
        columns = part.assign(log_norm=np.log(part.norm))[["damage", *PREDICTORS]].astype(float)
        spread = columns.std(ddof=0)
        spread = spread.where(spread > 1e-9 * columns.abs().max(), math.inf)
        frames.append(((columns - columns.mean()) / spread).assign(cell=number, **names))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["cell", "damage", *PREDICTORS])


def damage_regression(channels: pd.DataFrame) -> pd.DataFrame:
    """Regress standardised damage on standardised scores, one more at a time; least squares, no ridge.

    Args:
        channels: from :func:`~tp_twoaxis.diagnostics.lesion_probe.lesion_probe`.

    Returns:
        One row a cell and set of predictors (``predictors``, the last that joined last): ``held_out``, the R^2 in this
        cell of coefficients from all others, ``1 - SSE / SST``, at most 1 and below 0 where the prediction is worse
        than the cell's mean; NaN where there is no other cell. ``fitted`` is the R^2 over all cells of coefficients
        from all cells, the same in every row of a set.

    Example:
        >>> part = pd.DataFrame({"depth": 0.0, "constant": False, "damage": [1.0, 2.0, 3.0], "norm": [1.0, 2.0, 1.0],
        ...                      "capture": [0.1, 0.2, 0.3], "overlap": 1.0, "compact_support": 0.5, "task_mi": 0.2})
        >>> table = pd.concat([part.assign(layer="conv1"), part.assign(layer="conv2")])
        >>> damage_regression(table).query("layer == 'conv2'")[["predictors", "held_out"]].round(3).values.tolist()[:2]
        [['ln norm', 0.0], ['ln norm + I', 1.0]]
    """
    table = standardised(channels)
    names = [name for name in ("network", "seed", "layer", "depth") if name in table]
    rows = []
    for count in range(1, len(PREDICTORS) + 1):
        chosen = list(PREDICTORS)[:count]
        fitted = _explained(table, table, chosen)
        for number, cell in table.groupby("cell", sort=False):
            rows.append(
                {
                    **cell[names].iloc[0].to_dict(),
                    "predictors": " + ".join(PREDICTORS[name] for name in chosen),
                    "held_out": _explained(table[table.cell != number], cell, chosen),
                    "fitted": fitted,
                }
            )
    return pd.DataFrame(rows, columns=[*names, "predictors", "held_out", "fitted"])


def regression_summary(regression: pd.DataFrame) -> pd.DataFrame:
    """Average over cells.

    Args:
        regression: from :func:`damage_regression`.

    Returns:
        One row a set of predictors: ``fitted``; the mean of ``held_out`` with its interval, ``lower`` to ``upper``.

    Example:
        >>> rows = pd.DataFrame({"predictors": "ln norm", "fitted": 0.5, "held_out": [0.1, 0.2, 0.3]})
        >>> regression_summary(rows)[["predictors", "held_out"]].round(3).values.tolist()
        [['ln norm', 0.2]]
    """
    rows = []
    for predictors, part in regression.groupby("predictors", sort=False):
        mean = mean_estimate(list(part.held_out))
        rows.append(
            {
                "predictors": predictors,
                "fitted": part.fitted.iloc[0],
                "held_out": mean.value,
                "lower": mean.lower,
                "upper": mean.upper,
            }
        )
    return pd.DataFrame(rows, columns=["predictors", "fitted", "held_out", "lower", "upper"])


def _explained(training: pd.DataFrame, test: pd.DataFrame, chosen: list[str]) -> float:
    """R^2 on one table of coefficients from another; no intercept, since every cell's means are 0."""
    total = float(test.damage.pow(2).sum())
    if training.empty or total == 0.0:
        return math.nan
    coefficients = np.linalg.lstsq(training[chosen].to_numpy(), training.damage.to_numpy(), rcond=None)[0]
    residual = test.damage.to_numpy() - test[chosen].to_numpy() @ coefficients
    return 1.0 - float(residual @ residual) / total
