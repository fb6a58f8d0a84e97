"""Files of a report: readable back, self-contained, honest about what is missing."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from bench_cases import tiny_config, write_parquet

from tp_twoaxis import TwoAxisError
from tp_twoaxis.benchmark import cross, run_benchmark
from tp_twoaxis.benchmark.curves import curves_figure
from tp_twoaxis.benchmark.methods import Method
from tp_twoaxis.benchmark.report import make_report, markdown_table, wide_table, write_report
from tp_twoaxis.benchmark.results import claim_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    methods = (*cross(["capture", "l2"], repairs=[(), ("bn",)]), Method("bench_cases:broken"))
    config = tiny_config(write_parquet(root / "data"), methods=methods)
    return run_benchmark(config, root / "out", progress=False).folder


def test_files(folder):
    report = make_report(folder.path)
    files = {path.name: path for path in write_report(report)}
    assert {path.parent for path in files.values()} == {folder.path / "report"}
    assert set(files) == {
        "report.html", "report.md", "cells.parquet", "cells.csv", "summary.csv", "auc.csv", "axes.csv", "signs.csv",
        "selector.csv", "selected.csv", "wins.csv", "timing.csv", "curves-net.png", "families-net.png",
    }  # fmt: skip
    pd.testing.assert_frame_equal(pd.read_parquet(files["cells.parquet"]), report.trials)
    summary = pd.read_csv(files["summary.csv"], keep_default_na=False)
    assert summary.accuracy.tolist() == pytest.approx(report.summary.accuracy.tolist())
    assert files["curves-net.png"].read_bytes().startswith(b"\x89PNG")
    html = files["report.html"].read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "<script" not in html
    for text in ("this criterion never works", "4 trials failed", "capture+bn", folder.config.digest(), "thop"):
        assert text in html
    assert make_report(folder.path).trials.equals(report.trials)


def test_markdown_carries_its_provenance(folder):
    text = make_report(folder.path).markdown()
    assert "| method | 0.7 | 0.4 |" in text
    assert re.search(r"\| l2\+bn \| \d+\.\d ± \d+\.\d \| ", text)
    for part in ("Seeds 42, 123", "commit", "torch", "test images", "cores"):
        assert part in text
    assert "broken" not in text


def test_unfinished_sweeps_have_reports_and_say_so(folder, tmp_path):
    partial = claim_folder(tmp_path / "out", folder.config)
    with pytest.raises(TwoAxisError, match="tp-twoaxis bench"):
        make_report(partial.path)
    for trial in folder.config.trials()[:3]:
        partial.file(trial).write_bytes(folder.file(trial).read_bytes())
    report = make_report(partial.path)
    assert report.notes[0] == "17 of 20 trials were not run yet"
    assert len(write_report(report, tmp_path / "elsewhere")) == 14
    with pytest.raises(TwoAxisError, match=r"no config\.json"):
        make_report(tmp_path)
    with pytest.raises(TwoAxisError, match="folder"):
        write_report(report, tmp_path / "no" / "such")


def test_a_table_of_trials_stands_for_them(folder, tmp_path):
    whole = make_report(folder.path)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "config.json").write_bytes((folder.path / "config.json").read_bytes())
    (kept / "cells.csv").write_text(whole.trials.to_csv(index=False))
    again = make_report(kept)
    for name in ("summary", "axes", "failures", "wins"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(whole, name))
    pd.testing.assert_frame_equal(again.auc.table, whole.auc.table)
    assert again.notes == whole.notes
    assert again.markdown() == whole.markdown()
    (kept / "cells.csv").write_text("a,b\n1,2\n")
    with pytest.raises(TwoAxisError, match="lacks accuracy, achieved"):
        make_report(kept)
    (kept / "cells.csv").write_text("")
    with pytest.raises(TwoAxisError, match="reading it failed"):
        make_report(kept)


def test_only_failures(folder, tmp_path):
    failed = claim_folder(tmp_path / "out", folder.config)
    trials = [trial for trial in folder.config.trials() if "broken" in trial.method.criterion]
    for trial in trials:
        failed.file(trial).write_bytes(folder.file(trial).read_bytes())
    html = write_report(make_report(failed.path))[0].read_text()
    assert "nothing to show" in html
    assert "this criterion never works" in html


def test_tables_are_escaped():
    assert markdown_table(pd.DataFrame({"a|b": ["c|d"]})) == "| a\\|b |\n| --- |\n| c\\|d |"


def holed_summary():
    """Two methods on two seeds; b lacks one seed at 0.7 and both at 0.5."""
    rows = []
    for method, seeds in {"a": {0.9: 2, 0.7: 2, 0.5: 2, 0.3: 2}, "b": {0.9: 2, 0.7: 1, 0.3: 2}}.items():
        for keep, number in seeds.items():
            accuracy = keep / 2 + (0.3 if method == "b" and keep == 0.7 else 0.0)
            rows.append([method, keep, number, keep, accuracy, 0.01 if number > 1 else float("nan")])
    names = ["criterion", "keep", "seeds", "achieved", "accuracy", "std"]
    summary = pd.DataFrame(rows, columns=names)
    return summary.assign(network="net", method=summary.criterion, treatment="bn", dense=0.9)


def test_means_over_fewer_seeds_are_marked():
    wide = wide_table(holed_summary()).set_index("method")
    assert wide.loc["a"].tolist() == ["45.0 ± 1.0", "35.0 ± 1.0", "25.0 ± 1.0", "15.0 ± 1.0"]
    assert wide.loc["b"].tolist() == ["45.0 ± 1.0", "65.0 (1 of 2 seeds)", "-", "15.0 ± 1.0"]


def test_curves_do_not_bridge_holes():
    figure = curves_figure(holed_summary(), "net")
    (panel,) = figure.axes
    first, second = (container.lines[0] for container in panel.containers)
    assert first.get_xdata().tolist() == [30.0, 50.0, 70.0, 90.0]
    assert np.isnan(second.get_ydata(orig=False)).tolist() == [False, True, True, False]
    hollow = [line for line in panel.lines if line.get_markerfacecolor() == "white"]
    assert [line.get_ydata(orig=False).tolist() for line in hollow if len(line.get_ydata())] == [[pytest.approx(65.0)]]
    # b's mean is higher over what it has; it has less
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_wide_table_and_curves(folder):
    summary = make_report(folder.path).summary
    wide = wide_table(summary)
    assert wide.columns.tolist() == ["method", "0.7", "0.4"]
    assert wide.method.tolist() == ["capture", "capture+bn", "l2", "l2+bn"]
    figure = curves_figure(summary, "net")
    assert sorted(axes.get_title() for axes in figure.axes) == ["bn", "none"]
    assert [len(axes.containers) for axes in figure.axes] == [2, 2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["capture", "l2"]
