"""The report for people and for programs."""

import json
import sys

import numpy as np
import pytest

from tp_twoaxis import PruningReport
from tp_twoaxis.importance import DistortionCurve
from tp_twoaxis.pruning.pruning_report import COLUMNS, SHOWN_ROWS, GroupReport, Size
from tp_twoaxis.repair.repair_report import ConsumerRepair, RemovedChannel


def report(**changes):
    values = {
        "importance": "capture",
        "flops": 0.5,
        "achieved": 0.4975,
        "before": Size(2_000_000, 1000, 2_010_000, 2_005_000),
        "after": Size(995_000, 400, 1_000_000, 990_000),
        "groups": [GroupReport("conv1", ["conv1 (writes)", "conv2 (reads)"], [0, 2, 3], [1])],
        "removed_channels": {"conv1": [1]},
        "repair": ["bn"],
        "seconds": {"plan": 0.25},
        **changes,
    }
    return PruningReport(**values)


def test_json_round_trip():
    original = report(latency_ms={"batch 1": (2.0, 1.5)}, notes=["a note"])
    data = json.loads(original.to_json())
    rebuilt = PruningReport(
        **{
            **data,
            "before": Size(**data["before"]),
            "after": Size(**data["after"]),
            "groups": [GroupReport(**group) for group in data["groups"]],
            "latency_ms": {key: tuple(value) for key, value in data["latency_ms"].items()},
        }
    )
    assert rebuilt == original


def test_text_has_every_number_a_reader_wants():
    text = str(report(latency_ms={"batch 64": (20.0, 15.0)}, notes=["attention keeps its heads"]))
    for part in (
        "capture: kept 49.75% of the MACs (asked for 50.00%)",
        "2,000,000",
        "995,000",
        "thop's MACs",
        "75.0%",
        "conv1",
        "3 of 4",
        "note: attention keeps its heads",
        "plan 0.25",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100


def test_missing_counters_and_latency_leave_no_rows():
    text = str(report(before=Size(10, 1, 10, None), after=Size(5, 1, 5, None)))
    assert "thop" not in text
    assert "batch" not in text


def test_frame_has_a_row_a_group():
    groups = [
        GroupReport("conv1", ["conv1 (producer)", "conv2 (consumer)", "conv3 (consumer)"], [0, 2, 3], [1]),
        GroupReport("conv2", ["conv2 (producer)", "fc (consumer)"], [0, 1], []),
    ]
    removed = [RemovedChannel(1, 0.8, [(0, 0.5)])]
    consumers = [
        ConsumerRepair("conv2", "ridge", "", 64, 3, removed, 0.1, 0.2, 0.3),
        ConsumerRepair("conv3", "none", "too few rows", 64, 3, [RemovedChannel(1, 0.4, [])], None, None, 0.7),
        ConsumerRepair("elsewhere", "ridge", "", 64, 3, removed, 0.1, 0.2, 0.9),
    ]
    curve = DistortionCurve("conv1", 4, (0, 2, 3), (0.0, 0.1, 0.2), (0.0, 0.0, 0.0), (0.0, 0.2, 0.3), 32)
    frame = report(groups=groups, consumers=consumers, sensitivity=[curve]).to_frame()
    assert list(frame.columns) == COLUMNS
    assert frame.iloc[0].tolist() == ["conv1", 4, 3, 1, 0.25, pytest.approx(0.1), pytest.approx(0.6), 0.7]
    assert frame.iloc[1].tolist()[:5] == ["conv2", 2, 2, 0, 0.0]
    assert np.isnan(frame.iloc[1].tolist()[5:]).all()
    assert list(report(groups=[]).to_frame().columns) == COLUMNS


def test_repr_is_short_however_many_groups_there_are():
    many = report(groups=[GroupReport(f"conv{k}", [], [0, 2, 3], [1]) for k in range(300)], notes=["a"] * 40)
    assert repr(many).splitlines() == [
        "PruningReport(capture, repair bn: kept 49.75% of the MACs;",
        "  MACs 2,000,000 -> 995,000, parameters 1,000 -> 400;",
        "  300 of 1200 channels in 300 groups removed, 40 notes)",
    ]


def test_notebooks_show_a_short_table():
    many = report(groups=[GroupReport(f"<b>größe{k}", [], [0, 2, 3], [1]) for k in range(300)])
    html = many._repr_html_()
    assert "&lt;b&gt;größe299" in html
    assert "<b>" not in html
    assert html.count("<tr") == 1 + SHOWN_ROWS + 1  # head, rows, the dots between first and last
    assert "macs saved" not in html  # of which nothing is known
    assert "995,000" in html


def test_notebooks_without_pandas_show_the_repr(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert report()._repr_html_() is None
