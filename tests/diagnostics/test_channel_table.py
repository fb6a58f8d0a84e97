"""The table of channels equals the scores it is made of, and survives the disk."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from cases import batches, conv_net

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.diagnostics.channel_table import COLUMNS, channel_table, layer_summary, records, write_table
from tp_twoaxis.scores import hull, local
from tp_twoaxis.scores.named_scores import SCORES, evaluate


@pytest.fixture(scope="module")
def stats():
    net = conv_net()
    with torch.no_grad():
        net.conv1.weight[3] = 0.0  # a constant channel
    return calibrate(net, batches(), progress=False)


@pytest.mark.parametrize("score", SCORES)
def test_columns_are_the_scores(stats, score):
    table = channel_table(stats, score)
    assert list(table) == list(COLUMNS)
    assert len(table) == sum(layer.num_channels for layer in stats.layers.values())
    for name, part in table.groupby("layer", sort=False):
        layer = stats[name]
        assert part.channel.tolist() == list(range(layer.num_channels))
        assert np.array_equal(part.score, evaluate(SCORES[score].function, layer))
        assert np.array_equal(part.capture, local.input_capture(layer.variance))
        assert np.array_equal(part.task_mi, SCORES["task-mi"].function(layer))
        assert np.array_equal(part.target_excess, SCORES["target-excess"].function(layer))
        assert np.array_equal(part.target_redundancy, SCORES["target-redundancy"].function(layer))
        assert np.array_equal(part.overlap, -SCORES["low-overlap"].function(layer))
        assert np.array_equal(part.rayleigh_quotient, local.rayleigh_quotient(layer.variance, layer.weight_power))
        hulls = hull.greedy_hulls(layer.correlation, active=layer.variance > 0)
        assert np.array_equal(part.hull_size, hulls.size)


def test_layers_restrict(stats):
    assert set(channel_table(stats, layers=["fc", "conv2"]).layer) == {"fc", "conv2"}
    with pytest.raises(TwoAxisError, match="no statistics of layer 'nope'"):
        channel_table(stats, layers=["nope"])


def test_summary_counts_and_correlates(stats):
    table = channel_table(stats)
    summary = layer_summary(table).set_index("layer")
    assert list(summary.index) == list(stats)
    assert summary.constant["conv1"] == 1
    part = table[table.layer == "conv2"]
    assert summary.capture["conv2"] == pytest.approx(part.capture.mean())
    assert summary.rank_correlation["conv2"] == pytest.approx(part.capture.corr(part.task_mi, method="spearman"))


def test_summary_is_of_the_channels_that_vary():
    net = conv_net()
    with torch.no_grad():
        net.conv1.weight[5:12] = 0.0
        net.reduce.weight.zero_()  # nothing varies
    with_constants = calibrate(net, batches(), progress=False)
    table = channel_table(with_constants)
    summary = layer_summary(table).set_index("layer")
    part = table[(table.layer == "conv1") & ~table.channel.between(5, 11)]
    row = summary.loc["conv1"]
    assert (row.channels, row.constant) == (16, 7)
    for column in ("capture", "overlap", "hull_explanation", "task_mi", "target_excess"):
        assert row[column] == pytest.approx(part[column].mean())
    assert row.one_peer == pytest.approx((part.hull_size == 1).mean())
    assert row.rank_correlation == pytest.approx(part.capture.corr(part.task_mi, method="spearman"))
    nothing = summary.loc["reduce"]
    assert (nothing.channels, nothing.constant) == (8, 8)
    assert nothing.drop(["channels", "constant"]).isna().all()


def test_without_a_target():
    stats = calibrate(conv_net(), batches(), target=None, progress=False)
    table = channel_table(stats)
    assert table[["task_mi", "target_excess", "target_redundancy"]].isna().all().all()
    rows = json.loads(json.dumps(records(layer_summary(table)), allow_nan=False))
    assert rows[0]["rank_correlation"] is None
    with pytest.raises(TwoAxisError, match="not recorded"):
        channel_table(stats, "task-mi")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_files_hold_the_table(stats, tmp_path, suffix):
    table = channel_table(stats)
    path = tmp_path / f"t{suffix}"
    write_table(table, path)
    read = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    pd.testing.assert_frame_equal(read, table, check_exact=True)


def test_other_suffixes_are_refused(stats, tmp_path):
    with pytest.raises(TwoAxisError, match=r"\.csv or \.parquet"):
        write_table(channel_table(stats), tmp_path / "t.xlsx")


def test_unknown_scores_are_refused(stats):
    with pytest.raises(TwoAxisError, match="did you mean"):
        channel_table(stats, "captur")
