"""Tables from invented records, against numbers worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from tp_twoaxis import TwoAxisError
from tp_twoaxis.benchmark.protocol import Curve, paired_interval, retention_auc
from tp_twoaxis.benchmark.tables import (
    auc_table,
    failure_table,
    measured,
    summary_table,
    timing_table,
    trial_table,
    warnings_of,
    win_matrix,
)

ACCURACY = {
    ("a", 1): {0.7: 0.90, 0.5: 0.80, 0.3: 0.60},
    ("a", 2): {0.7: 0.80, 0.5: 0.80, 0.3: 0.50},
    ("b", 1): {0.7: 0.85, 0.5: 0.80, 0.3: 0.30},
    ("b", 2): {0.7: 0.90, 0.5: 0.70, 0.3: 0.20},
}


def record(method, seed, keep, accuracy, *, network="net", failed=False, **changes):
    made = {
        "network": {"name": network},
        "seed": seed,
        "method": {
            "name": method,
            "criterion": method,
            "allocation": "global",
            "repair": ["bn"],
            "finetune_batches": 0,
        },
        "keep": keep,
        "grid": "macs",
        "status": "ok",
        "error": None,
        "achieved": keep,
        "macs": {"dense": 1000, "pruned": int(1000 * keep)},
        "host_macs": {"dense": 1100, "pruned": int(1100 * keep)},
        "thop_macs": {"dense": None, "pruned": None},
        "params": {"dense": 10, "pruned": 5},
        "accuracy": {"dense": 1.0, "before_finetuning": accuracy, "pruned": accuracy},
        "seconds": {"score": 1.0 + seed, "total": 3.0},
        "weights": "w",
        "provenance": {"commit": "c0ffee"},
    }
    if failed:
        for key in ("achieved", "macs", "host_macs", "thop_macs", "params", "accuracy", "weights"):
            del made[key]
        made |= {"status": "failed", "error": {"type": "ValueError", "message": "no"}, "seconds": {"total": 0.1}}
    return {**made, **changes}


@pytest.fixture
def records():
    return [
        record(method, seed, keep, accuracy)
        for (method, seed), row in ACCURACY.items()
        for keep, accuracy in row.items()
    ]


def test_summary(records):
    row = summary_table(trial_table(records)).set_index(["method", "keep"]).loc[("a", 0.7)]
    assert (row.seeds, row.accuracy, row.lowest, row.highest) == (2, pytest.approx(0.85), 0.8, 0.9)
    assert row["std"] == pytest.approx(np.std([0.9, 0.8], ddof=1))
    assert np.isnan(trial_table(records).thop_macs).all()


def test_auc_by_hand(records):
    result = auc_table(trial_table(records))
    low, high = result.intervals["net"]
    assert (low, high) == pytest.approx((0.3, 0.7))
    table = result.table.set_index("method")
    by_hand = {m: [(v[0.7] + 2 * v[0.5] + v[0.3]) / 4 for (n, _), v in ACCURACY.items() if n == m] for m in "ab"}
    assert table.auc["a"] == pytest.approx(np.mean(by_hand["a"]))
    assert table.behind_best["a"] == 0
    assert table.behind_best["b"] == pytest.approx(np.mean(by_hand["b"]) - np.mean(by_hand["a"]))
    interval = paired_interval(by_hand["b"], by_hand["a"])
    assert (table.behind_low["b"], table.behind_high["b"]) == pytest.approx((interval.low, interval.high))
    first = Curve([0.3, 0.5, 0.7], list(ACCURACY["b", 1].values()))
    assert by_hand["b"][0] == pytest.approx(retention_auc(first, (0.3, 0.7)))
    assert result.table.method.tolist() == ["a", "b"]


def test_methods_without_a_common_interval_are_named(records):
    far = [record("late", seed, keep, 0.1, achieved=keep / 3.5) for seed in (1, 2) for keep in (0.7, 0.5, 0.3)]
    single = [record("single", seed, 0.5, 0.1) for seed in (1, 2)]
    result = auc_table(trial_table(records + far))
    assert result.table.empty
    assert "'late' covers 80.0 to 91.4 %" in result.notes[0]
    result = auc_table(trial_table(records + single))
    assert result.table.method.tolist() == ["a", "b"]
    assert "single left out" in result.notes[0]


def test_a_method_that_failed_is_compared_where_it_did_not(records):
    records[-1] = record("b", 2, 0.3, 0, failed=True)
    trials = trial_table(records)
    assert (len(measured(trials)), len(failure_table(trials))) == (11, 1)
    assert failure_table(trials).error[0] == "ValueError: no"
    result = auc_table(trials)
    assert result.intervals["net"] == pytest.approx((0.3, 0.7))  # not cut short for all
    table = result.table.set_index("method")
    assert table.index.tolist() == ["a", "b"]
    assert table.seeds.to_dict() == {"a": 2, "b": 1}
    assert table.unmeasured.to_dict() == {"a": 0, "b": 1}
    whole = auc_table(trial_table([*records[:-1], record("b", 2, 0.3, 0.2)]))
    assert table.auc["a"] == whole.table.set_index("method").auc["a"]
    assert result.areas["net"]["b"] == pytest.approx({1: whole.areas["net"]["b"][1]})
    assert table.behind_best["b"] == pytest.approx(whole.areas["net"]["b"][1] - whole.areas["net"]["a"][1])
    assert "so last and in no family: b on 1" in result.notes[0]
    everything = trial_table([record("a", 1, 0.5, 0, failed=True)])
    assert summary_table(everything).empty
    assert auc_table(everything).table.empty
    assert win_matrix(everything).empty


@pytest.mark.parametrize("hole", ["failed", "missing"])
@pytest.mark.parametrize("where", [[0.6, 0.5, 0.4], [0.9], [0.3], [0.9, 0.8]])
def test_no_method_gains_by_a_hole(hole, where):
    """Two methods of equal accuracy, one with trials that failed or are not there; on one seed, or on both."""
    accuracy = {0.9: 0.9, 0.8: 0.8, 0.6: 0.3, 0.5: 0.2, 0.4: 0.1, 0.3: 0.1}
    for lost in ([1], [2], [1, 2]):
        records = []
        for method, seed, keep in itertools.product(["whole", "holed"], [1, 2, 3], accuracy):
            gone = method == "holed" and seed in lost and keep in where
            if not (gone and hole == "missing"):
                easier = 0.1 if seed == 3 else 0.0
                records.append(record(method, seed, keep, accuracy[keep] + easier, failed=gone))
        result = auc_table(trial_table(records))
        table = result.table.set_index("method")
        assert table.index[0] == "whole"
        assert table.behind_best.tolist() == pytest.approx([0.0, 0.0])
        seeds = [1, 2, 3] if hole == "failed" else [seed for seed in (1, 2, 3) if seed not in lost]
        assert list(result.areas["net"]["whole"]) == seeds
        assert list(result.areas["net"]["holed"]) == [seed for seed in (1, 2, 3) if seed not in lost]
        assert result.notes
        wins = win_matrix(trial_table(records))
        assert wins.loc["holed", "whole"] <= 0.5 <= wins.loc["whole", "holed"]
        assert (wins.loc["whole", "holed"] > 0.5) == (hole == "failed")


def test_seeds_that_are_not_finished_wait(records):
    """A method that the sweep came to first is not compared alone on its last seed."""
    more = [record("a", 3, keep, 0.1) for keep in (0.7, 0.5, 0.3)] + [record("b", 3, 0.7, 0.9)]
    result, before = auc_table(trial_table(records + more)), auc_table(trial_table(records))
    pd.testing.assert_frame_equal(result.table, before.table)
    assert result.notes == ["net: seeds 3 are not compared until all trials ran"]


def test_wins(records):
    wins = win_matrix(trial_table(records))
    # seed 1: win, tie, win; seed 2: loss, win, win
    assert wins.loc["a", "b"] == pytest.approx(4.5 / 6)
    assert wins.loc["a", "b"] + wins.loc["b", "a"] == pytest.approx(1)
    assert np.isnan(wins.loc["a", "a"])
    apart = win_matrix(trial_table([record("a", 1, 0.5, 0.5), record("b", 2, 0.5, 0.5)]))
    assert np.isnan(apart.loc["a", "b"])


def test_a_failed_trial_is_lost(records):
    records[-1] = record("b", 2, 0.3, 0, failed=True)
    records.append(record("c", 1, 0.7, 0, failed=True))
    wins = win_matrix(trial_table(records))
    assert wins.loc["a", "b"] == pytest.approx(4.5 / 6)
    assert "c" not in wins.index
    failed = [record(method, 4, 0.5, 0, failed=True) for method in "ab"]  # nobody's
    assert win_matrix(trial_table(records + failed)).equals(wins)


def test_timing(records):
    timing = timing_table(trial_table(records))
    assert timing.columns.tolist() == ["network", "method", "score", "total"]
    assert timing.score.tolist() == [2.5, 2.5]


def test_what_makes_trials_hard_to_compare_is_listed(records):
    assert warnings_of(trial_table(records)) == []
    odd = [record("a", 3, 0.5, 0.5, weights="v"), record("b", 3, 0.5, 0.5, achieved=0.6, provenance={"commit": "f00"})]
    notes = " ".join(warnings_of(trial_table(records + odd)))
    assert "2 different dense weights" in notes
    assert "2 commits: c0ffee, f00" in notes
    assert "1 trials keep other MACs" in notes


def test_seeds_that_are_all_alike_are_said_to_be():
    same = [record("a", seed, keep, accuracy) for seed in (1, 2) for keep, accuracy in ((0.7, 0.9), (0.5, 0.8))]
    random = [record("random", seed, 0.5, 0.1 * seed) for seed in (1, 2)]
    (note,) = warnings_of(trial_table(same + random))
    assert "same for all seeds" in note
    assert "calibration_draw" in note


def test_no_trials():
    with pytest.raises(TwoAxisError, match="run the sweep"):
        trial_table([])


def test_rows_hold_the_treatment():
    method = {"name": "x", "criterion": "l2", "allocation": "uniform", "repair": [], "finetune_batches": 200}
    trials = trial_table([{**record("x", 1, 0.5, 0.5), "method": method}])
    assert isinstance(trials, pd.DataFrame)
    assert trials.treatment[0] == "uniform ft200"
