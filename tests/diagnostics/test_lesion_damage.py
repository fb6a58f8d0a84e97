"""What damage goes with: correlations and pairs, by loops."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from lesion_cases import lesion_table
from reference_lesions import mean_ranks, pair_wins, wilson

from tp_twoaxis.diagnostics.lesion_damage import (
    REPLACEABLE,
    SCORES,
    damage_by_layer,
    damage_correlations,
    matched_pairs,
    pooled_pairs,
)


def cells_of(table):
    return {name: part[~part.constant] for name, part in table.groupby("layer", sort=False)}


def test_correlations_are_of_ranks_within_a_cell():
    table = lesion_table()
    found = damage_correlations(table).set_index("layer")
    assert list(found.index) == ["conv1", "conv2", "conv3"]
    for name, part in cells_of(table).items():
        assert found.channels[name] == len(part) < 24
        for score in SCORES:
            expected = np.corrcoef(mean_ranks(list(part.damage)), mean_ranks(list(part[score])))[0, 1]
            assert found.loc[name, score] == pytest.approx(expected, abs=1e-12), score


def test_pairs_are_neighbours_by_capture():
    table = lesion_table(channels=31)
    found = matched_pairs(table).set_index(["layer", "property"])
    for name, part in cells_of(table).items():
        for score in REPLACEABLE:
            expected = pair_wins(list(part.capture), list(part[score]), list(part.damage))
            assert tuple(found.loc[(name, score), ["pairs", "wins"]]) == expected
    ties = found.xs("hull_size", level="property")["pairs"].sum() < found.xs("overlap", level="property")["pairs"].sum()
    assert ties
    pooled = pooled_pairs(found.reset_index()).set_index("property")
    for score in REPLACEABLE:
        part = found.xs(score, level="property")
        row = pooled.loc[score]
        assert (row["pairs"], row.wins) == (part["pairs"].sum(), part.wins.sum())
        assert (row.lower, row.upper) == pytest.approx(wilson(row.wins, row["pairs"]))


def test_overlap_that_protects_wins_every_pair():
    table = lesion_table()
    table["damage"] = -table.overlap
    pairs = matched_pairs(table).query("property == 'overlap'")
    assert (pairs.wins == pairs["pairs"]).all()


def test_neither_order_nor_monotone_maps_matter():
    table = lesion_table()
    changed = table.sample(frac=1.0, random_state=1).assign(capture=lambda t: np.exp(t.capture))
    for function in (damage_correlations, matched_pairs):
        first, second = (
            function(t).sort_values(["layer"], kind="stable").reset_index(drop=True) for t in (table, changed)
        )
        pd.testing.assert_frame_equal(first, second, rtol=1e-12)


def test_harm_and_good_are_beyond_two_standard_errors():
    table = lesion_table(damage_error=0.01)
    found = damage_by_layer(table).set_index("layer")
    for name, part in cells_of(table).items():
        row, damages = found.loc[name], list(part.damage)
        assert (row["mean"], row["median"], row.largest) == pytest.approx(
            (sum(damages) / len(damages), np.median(damages), max(damages))
        )
        assert (row.harm, row.good) == pytest.approx(
            (sum(d > 0.02 for d in damages) / len(damages), sum(d < -0.02 for d in damages) / len(damages))
        )
        assert row.error == pytest.approx(0.01)


def test_too_few_channels_say_nothing():
    table = lesion_table(("conv",), 2, constant=False)
    assert math.isnan(damage_correlations(table).capture[0])
    one = lesion_table(("conv",), 1, constant=False)
    assert matched_pairs(one)["pairs"].tolist() == [0, 0, 0]
    assert pooled_pairs(matched_pairs(one)).win_rate.isna().all()
