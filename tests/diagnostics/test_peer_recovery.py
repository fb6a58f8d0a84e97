"""What peers give back: thresholds, medians, ranks in cells and bins, by loops."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from lesion_cases import lesion_table
from reference_lesions import matched_recovery, mean_ranks, wilson

from tp_twoaxis.diagnostics.peer_recovery import damaged_channels, matched_recovery_table, recovery_table

NAMES = {"peer_explanation": "e8", "capture": "i", "task_mi": "m"}


@pytest.fixture(scope="module")
def table():
    return lesion_table(channels=40)


def kept(table, threshold):
    part = table[~table.constant & (table.damage > threshold)]
    return part, np.array([(d - p) / d for d, p in zip(part.damage, part.peer_damage, strict=True)])


def test_thresholds_are_three_in_nats_and_three_shares(table):
    found = list(damaged_channels(table))
    assert [names["threshold"] for names, _ in found[:3]] == [0.001, 0.005, 0.02]
    varying = (~table.constant).sum()
    for (names, part), share in zip(found[3:], (0.52, 0.39, 0.23), strict=True):
        assert len(part) == pytest.approx(share * varying, abs=1)
        assert part.damage.min() > names["threshold"]
    worse = table.assign(damage=table.damage - 1.0)  # every removal helps
    assert all(len(part) == 0 and names["threshold"] >= 0 for names, part in damaged_channels(worse))


def test_shares_recovered(table):
    for row in recovery_table(table).itertuples():
        part, share = kept(table, row.threshold)
        assert row.channels == len(part)
        assert row.share == pytest.approx(np.median(share))
        assert row.helped == pytest.approx((part.peer_damage < part.damage).mean())
        assert (row.helped_lower, row.helped_upper) == pytest.approx(wilson((share > 0).sum(), len(part)))
        ranks = mean_ranks(list(share))
        for name in ("peer_explanation", "task_mi"):
            expected = np.corrcoef(ranks, mean_ranks(list(part[name])))[0, 1]
            assert getattr(row, name) == pytest.approx(expected, abs=1e-12)
        assert row.advantage == pytest.approx(row.peer_explanation - row.task_mi, abs=1e-12)
        assert row.share_lower <= row.share <= row.share_upper
        assert row.advantage_lower < row.advantage < row.advantage_upper


def test_the_medians_interval_is_that_of_resampled_medians(table):
    row = recovery_table(table).iloc[0]
    _, share = kept(table, row.threshold)
    medians = np.median(np.random.default_rng(5).choice(share, (20_000, len(share))), axis=1)
    assert row.share_lower == pytest.approx(np.quantile(medians, 0.025), abs=0.02)
    assert row.share_upper == pytest.approx(np.quantile(medians, 0.975), abs=0.02)


def test_matched_correlations_are_those_of_loops(table):
    for row in matched_recovery_table(table).itertuples():
        cells = []
        part, share = kept(table, row.threshold)
        for layer in part.layer.unique():
            own = (part.layer == layer).to_numpy()
            arrays = {short: part[name].to_numpy()[own] for name, short in NAMES.items()}
            cells.append({"share": share[own], **arrays})
        found, trials, wins = matched_recovery(cells)
        for name, short in NAMES.items():
            assert getattr(row, name) == pytest.approx(found[short], abs=1e-12), name
        assert (row.bins, row.win_rate) == (trials, pytest.approx(wins / trials))
        assert (row.win_rate_lower, row.win_rate_upper) == pytest.approx(wilson(wins, trials))


def test_intervals_cover_the_correlation_and_shrink_with_channels(table):
    large = matched_recovery_table(lesion_table(channels=320)).iloc[0]
    small = matched_recovery_table(table).iloc[0]
    widths = [row.peer_explanation_upper - row.peer_explanation_lower for row in (small, large)]
    assert widths[1] == pytest.approx(widths[0] / np.sqrt(large.channels / small.channels), rel=0.25)
    assert widths[1] == pytest.approx(2 * 1.96 / np.sqrt(large.channels), rel=0.2)


def test_matching_takes_the_effect_of_task_information_away():
    """The share follows M alone, and E_8 follows M: without bins E_8 seems to tell the share."""
    rng = np.random.default_rng(0)
    table = lesion_table(channels=400, constant=False, damage=1.0)
    task = table.task_mi.rank() / len(table)
    table["peer_explanation"] = task + rng.normal(0, 0.02, len(table))
    table["peer_damage"] = 1.0 - task + rng.normal(0, 0.5, len(table))
    assert recovery_table(table).peer_explanation[0] > 0.4
    matched = matched_recovery_table(table).iloc[0]
    assert abs(matched.peer_explanation) < 0.25
    explained = table.assign(peer_damage=1.0 - table.peer_explanation)
    assert matched_recovery_table(explained).win_rate[0] == 1.0


def test_cells_may_differ_in_scale_and_order(table):
    scaled = table.assign(
        capture=np.where(table.layer == "conv2", 100 * table.capture + 7, table.capture),
        peer_explanation=np.where(table.layer == "conv1", table.peer_explanation / 10, table.peer_explanation),
    ).iloc[::-1]
    names = ["channels", "bins", "win_rate", *NAMES]
    pd.testing.assert_frame_equal(matched_recovery_table(table)[names], matched_recovery_table(scaled)[names])


def test_few_damaged_channels_say_nothing():
    found = matched_recovery_table(lesion_table(("conv",), 3, damage=-1.0))
    assert found.channels.tolist() == [0] * 6
    assert found.bins.tolist() == [0] * 6
    assert found[["peer_explanation", "win_rate", "task_mi_lower"]].isna().all(axis=None)
    recovered = recovery_table(lesion_table(("conv",), 3, damage=-1.0))
    assert recovered[["share", "helped", "advantage"]].isna().all(axis=None)
    few = lesion_table(("conv",), 8, damage=1.0, constant=False)
    matched = matched_recovery_table(few).iloc[0]
    assert not np.isnan(matched.peer_explanation)
    assert np.isnan(matched.peer_explanation_lower)
    # of equal shares no correlation is defined
    same = recovery_table(lesion_table(("conv",), 12, damage=1.0, peer_damage=0.5, constant=False)).iloc[0]
    assert same["share"] == same["share_lower"] == 0.5
    assert np.isnan(same["advantage"])
