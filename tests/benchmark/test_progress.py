"""The preview while a sweep runs."""

from __future__ import annotations

import io
import sys

import pytest
from bench_cases import tiny_config, write_folders
from rich.console import Console

from tp_twoaxis.benchmark import Method, run_benchmark
from tp_twoaxis.benchmark.progress import Monitor
from tp_twoaxis.benchmark.results import claim_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("progress")
    config = tiny_config(
        write_folders(root / "data"), methods=(Method("l2"), Method("bench_cases:broken")), seeds=(42,)
    )
    return run_benchmark(config, root / "out", progress=False).folder


def text(renderable):
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    return console.file.getvalue()


def test_the_bar_counts_and_the_table_fills(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    live = claim_folder(tmp_path / "out", folder.config)
    trials = folder.config.trials()
    live.file(trials[0]).write_bytes(folder.file(trials[0]).read_bytes())
    with Monitor(live, trials, trials[1:], enabled=True) as monitor:
        assert "0/3" in text(monitor._draw())
        for trial in trials[1:]:
            live.file(trial).write_bytes(folder.file(trial).read_bytes())
        monitor.look()
        shown = text(monitor._draw())
    assert "3/3" in shown
    assert "1 trials were there before, 2 failed" in shown
    accuracy = folder.read(trials[0])["accuracy"]["pruned"]
    assert f"{100 * accuracy:.1f}" in shown
    assert "0.7" in shown
    assert capsys.readouterr().out == ""


def test_lines_without_a_terminal(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tp_twoaxis.runtime.progress_bar.INTERVAL", 0.0)
    live = claim_folder(tmp_path / "out", folder.config)
    trials = folder.config.trials()
    with Monitor(live, trials, trials, enabled=True) as monitor:
        for trial in trials:
            live.file(trial).write_bytes(folder.file(trial).read_bytes())
            monitor.look()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("bench: trial 0 of 4, 00:00 elapsed")
    assert lines[-1].startswith("bench: trial 4 of 4")
    assert lines[-1].endswith("2 failed")


def test_nothing_is_drawn_without_a_terminal_or_work(folder, capsys):
    trials = folder.config.trials()
    for missing, enabled in ((trials, False), ([], True)):
        with Monitor(folder, trials, missing, enabled=enabled) as monitor:
            monitor.look()
    assert capsys.readouterr() == ("", "")
