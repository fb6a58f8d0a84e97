"""Trends over depth and shares of layers, with their intervals."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from tp_twoaxis.diagnostics.layer_trends import best_trend, depth_trend


def test_the_trend_is_spearmans_and_its_interval_that_of_resampled_layers() -> None:
    generator = np.random.default_rng(3)
    depth = np.linspace(0.0, 1.0, 15)
    values = depth + generator.normal(size=15) * 0.4
    found = depth_trend(list(depth), list(values))
    assert found.value == pytest.approx(spearmanr(depth, values).statistic)
    draws = []
    for _ in range(800):
        chosen = generator.integers(15, size=15)
        draws.append(spearmanr(depth[chosen], values[chosen]).statistic)
    assert (found.lower, found.upper) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.06)
    assert depth_trend([*depth, 0.5], [*values, math.nan]) == found


@pytest.mark.parametrize("values", [[], [1.0, 2.0], [1.0, math.nan, 2.0, math.nan]])
def test_two_layers_have_no_trend(values: list[float]) -> None:
    assert math.isnan(depth_trend([0.1 * place for place in range(len(values))], values).value)


def test_a_quantity_that_never_changes_has_no_trend() -> None:
    found = depth_trend([0.0, 0.5, 1.0], [2.0, 2.0, 2.0])
    assert math.isnan(found.value)
    assert math.isnan(found.lower)


def test_trends_are_over_models_where_they_can_be() -> None:
    generator = np.random.default_rng(0)
    tables = [
        pd.DataFrame({"network": "n", "seed": seed, "depth": np.linspace(0, 1, 8), "size": generator.normal(size=8)})
        for seed in range(3)
    ]
    own = [spearmanr(table.depth, table["size"]).statistic for table in tables]
    found = best_trend(pd.concat(tables), "size")
    assert (found.value, found.lower, found.upper) == pytest.approx((np.mean(own), min(own), max(own)))
    both = pd.concat(tables[:2])  # two trainings: over the layers of both
    assert best_trend(both, "size") == depth_trend(list(both.depth), list(both["size"]))
    assert math.isnan(best_trend(both.assign(size=math.nan), "size").value)
