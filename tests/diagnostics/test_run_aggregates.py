"""Cells condensed over models and backbones, against resampling by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from tp_twoaxis.diagnostics.evidence import mean_estimate
from tp_twoaxis.diagnostics.run_aggregates import (
    aggregate_runs,
    best_estimate,
    best_share,
    model_bootstrap,
    run_means,
    share_estimate,
)


def cells(backbones: dict[str, int], layers: int = 4, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    rows = [
        {"network": name, "seed": number, "layer": layer, "rho": generator.normal(shift, 0.1)}
        for shift, (name, seeds) in enumerate(backbones.items())
        for number in range(seeds)
        for layer in range(layers)
    ]
    return pd.DataFrame(rows)


def test_models_are_drawn_within_backbones():
    table = cells({"resnet18": 5, "vgg16": 3})
    models = [table[table.network == name].groupby("seed").rho.mean().to_numpy() for name in ("resnet18", "vgg16")]
    generator = np.random.default_rng(1)
    draws = np.mean([generator.choice(m, size=(20_000, len(m))).mean(1) for m in models], axis=0)
    found = model_bootstrap(table, "rho")
    assert found.value == pytest.approx(np.mean([m.mean() for m in models]))
    assert found.lower == pytest.approx(np.quantile(draws, 0.025), abs=0.003)
    assert found.upper == pytest.approx(np.quantile(draws, 0.975), abs=0.003)
    assert len(run_means(table, "rho")) == 8


def test_a_backbone_of_one_model_counts_and_does_not_vary():
    both, alone = cells({"a": 4, "b": 1}), cells({"a": 4})
    mixed, varying = model_bootstrap(both, "rho"), model_bootstrap(alone, "rho")
    assert mixed.upper - mixed.lower == pytest.approx((varying.upper - varying.lower) / 2, rel=0.1)
    assert math.isnan(model_bootstrap(cells({"a": 1, "b": 1}), "rho").lower)


def test_two_trainings_have_no_interval_of_their_own():
    two = cells({"a": 2, "b": 2})
    assert math.isnan(model_bootstrap(two, "rho").lower)
    assert best_estimate(two, "rho") == mean_estimate(two.rho.tolist())
    assert not math.isnan(model_bootstrap(cells({"a": 3, "b": 2}), "rho").lower)


def test_shares_are_over_models_where_they_can_be():
    table = cells({"a": 5}).assign(high=lambda t: t.rho > 0)
    assert best_share(table, "high") == model_bootstrap(table.assign(high=table.high.astype(float)), "high")
    alone = table[table.seed == 0]
    assert best_share(alone, "high") == share_estimate(int(alone.high.sum()), 4)


def test_table_3_has_a_row_for_each_way():
    table = cells({"a": 2, "b": 2, "c": 2})
    table.loc[0, "rho"] = math.nan
    found = aggregate_runs(table, ["rho"]).set_index("over")
    assert found.index.tolist() == ["cells", "models", "without a", "without b", "without c"]
    assert found.loc["cells", "count"] == 23
    assert found.loc["cells", "sem"] == pytest.approx(table.rho.std() / math.sqrt(23))
    rest = table[table.network != "b"].groupby(["network", "seed"]).rho.mean().groupby("network").mean().mean()
    assert found.loc["without b", "mean"] == pytest.approx(rest)
    one = aggregate_runs(table[["layer", "rho"]], ["rho"])  # a single network: over its layers alone
    assert one.over.tolist() == ["cells"]


def test_the_interval_is_over_models_where_it_can_be():
    table = cells({"a": 3})
    assert best_estimate(table, "rho") == model_bootstrap(table, "rho")
    assert best_estimate(table[["rho"]], "rho").lower < table.rho.mean()
    same = best_estimate(pd.DataFrame({"rho": [0.5, 0.5, 0.5, math.nan]}), "rho")
    assert (same.value, same.lower, same.upper) == (0.5, 0.5, 0.5)
    assert math.isnan(best_estimate(pd.DataFrame({"rho": [math.nan]}), "rho").value)


@pytest.mark.parametrize(("hits", "count"), [(19, 20), (0, 7), (425, 425)])
def test_shares_have_wilsons_interval(hits, count):
    z, p = 1.959964, hits / count
    centre = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    found = share_estimate(hits, count)
    assert (found.value, found.lower, found.upper) == pytest.approx((p, centre - half, centre + half), abs=1e-6)
