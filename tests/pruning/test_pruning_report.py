"""The report for people and for programs."""

import json

from tp_twoaxis import PruningReport
from tp_twoaxis.pruning.pruning_report import GroupReport, Size


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
