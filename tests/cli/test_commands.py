"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType

import pandas as pd
import pytest
import torch
from cases import conv_net
from cli_cases import MODEL, TESTS, refused, run, succeed
from latency_cases import fake_time
from safetensors.torch import save_file

from tp_twoaxis import CalibrationStatistics, load_pruned
from tp_twoaxis.cli import main
from tp_twoaxis.cli.one_line_errors import OneLineErrors
from tp_twoaxis.pruning.checkpoint import read_header


def process(*arguments, **environment):
    command = [sys.executable, "-m", "tp_twoaxis", *map(str, arguments)]
    path = {"PYTHONPATH": TESTS, "TQDM_DISABLE": "0", **environment}
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **path}, timeout=120, check=False)


def test_version_and_help():
    assert succeed("--version").stdout.startswith("tp-twoaxis 0.")
    assert "calibrate" in succeed().stdout
    for command in ("calibrate", "score", "prune", "explain", "demo"):
        text = succeed(command, "--help").stdout
        assert f"Example: tp-twoaxis {command}" in text
        assert "--json" in text
        assert "--force" in text


def test_calibrate_writes_statistics(folder):
    payload = json.loads((folder / "calibrate.json").read_text())
    assert (payload["images"], payload["target"], payload["notes"]) == (40, "margin", [])
    stats = CalibrationStatistics.load(folder / "stats.safetensors")
    stats.verify(conv_net())
    assert [layer["name"] for layer in payload["layers"]] == list(stats)


def test_calibrate_options(folder, tmp_path):
    out = tmp_path / "s.safetensors"
    options = ("--images", 16, "--target", "none", "--layers", "conv1, fc", "--positions", 4, "--mean", "0.5,0.5,0.5")
    text = succeed("calibrate", MODEL, "--data", folder / "images", "--out", out, *options, "--std", "1,1,1").stdout
    assert "calibrated 21 channels of 2 layers on 16 images" in text
    stats = CalibrationStatistics.load(out)
    assert (stats.target, stats["conv1"].num_rows) == (None, 64)


def test_parquet_data(folder, tmp_path):
    images = sorted((folder / "images" / "train").rglob("*.png"))
    rows = {"image": [{"bytes": p.read_bytes(), "path": None} for p in images], "kind": range(40), "label": [0, 1] * 20}
    pd.DataFrame(rows).to_parquet(tmp_path / "data.parquet")
    data = ("--data", tmp_path / "data.parquet")
    payload = json.loads(succeed("score", MODEL, *data, "--label-column", "label", "--json").stdout)
    assert payload["images"] == 40
    assert "no integer" not in refused("score", MODEL, *data, "--label-column", "nope")
    assert "--eval-data" in refused("prune", MODEL, *data, "--out", tmp_path / "p.safetensors", "--eval-split", "test")


def test_random_weights_are_noted(folder, tmp_path):
    arguments = ("cifar_resnet20_option_a", "--data", folder / "images", "--images", 8, "--layers", "conv1")
    result = succeed("calibrate", *arguments, "--out", tmp_path / "s.safetensors")
    assert "note: the model has random weights" in result.stdout


def test_score_reads_statistics_alone(folder, tmp_path):
    stats = ("--stats", folder / "stats.safetensors")
    payload = json.loads(succeed("score", *stats, "--score", "hull", "--json").stdout)
    assert len(payload["channels"]) == 61
    assert payload["channels"][0]["layer"] == "conv1"
    result = succeed("score", MODEL, *stats, "--out", tmp_path / "c.csv", "--plot", tmp_path / "plots")
    assert len(result.stdout.splitlines()) == 62
    assert len(pd.read_csv(tmp_path / "c.csv")) == 61
    assert len(list((tmp_path / "plots").glob("*.png"))) == 6
    succeed("score", *stats, "--out", tmp_path / "c.parquet")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "c.csv"), pd.read_parquet(tmp_path / "c.parquet"))
    assert len(succeed("score", *stats, "--layers", "fc").stdout.splitlines()) == 6


def test_prune_writes_what_it_prints_and_continues_from_it(folder, tmp_path):
    out, report = tmp_path / "p.safetensors", tmp_path / "r.json"
    data = ("--data", folder / "images")
    options = (
        "--flops",
        0.6,
        "--stats",
        folder / "stats.safetensors",
        "--score",
        "hull",
        "--eval-split",
        "test",
        "--card",
    )
    result = succeed("prune", MODEL, *data, *options, "--out", out, "--report", report, "--json")
    payload = json.loads(result.stdout)
    assert payload == json.loads(report.read_text())
    assert payload["report"]["importance"] == "hull"
    assert payload["report"]["achieved"] == pytest.approx(0.6, rel=0.05)
    assert payload["accuracy"]["images"] == 20
    for counter in ("tp_macs", "thop_macs"):
        assert payload["report"]["after"][counter] < payload["report"]["before"][counter]
    card = out.with_suffix(".md").read_text()
    assert "on 20 images (test)" in card
    assert f"load_pruned(\"p.safetensors\", lambda: build_model('{MODEL}'))" in card
    pruned = load_pruned(out, conv_net)
    assert pruned(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    assert json.loads(read_header(out)["report"])["flops"] == 0.6
    options = ("--checkpoint", out, "--score", "taylor", "--flops", 0.8)
    again = succeed("prune", MODEL, *data, *options, "--out", tmp_path / "q.safetensors")
    assert "taylor: kept" in again.stdout
    assert sum(p.numel() for p in load_pruned(tmp_path / "q.safetensors", conv_net).parameters()) < sum(
        p.numel() for p in pruned.parameters()
    )
    shown = json.loads(succeed("score", MODEL, "--checkpoint", out, *data, "--json").stdout)
    assert len(shown["channels"]) < 61


def test_prune_writes_a_page_linked_with_one_a_layer(folder, tmp_path):
    out, page = tmp_path / "p.safetensors", tmp_path / "r.html"
    data = ("--data", folder / "images", "--stats", folder / "stats.safetensors", "--eval-split", "test")
    options = ("--score", "l2", "--repair", "bn", "--flops", 0.6, "--html", page, "--explain")
    result = succeed("prune", MODEL, *data, *options, "--out", out)
    assert f"wrote {out} and {page} and {tmp_path / 'r_layers'}" in result.stdout
    html = page.read_text()
    assert MODEL in html
    assert "Top-1 accuracy on 20 images (test)" in html
    pages = sorted((tmp_path / "r_layers").iterdir())
    assert pages
    for layer in pages:
        assert f'href="r_layers/{layer.name}"' in html
        assert 'href="../r.html"' in layer.read_text()
    assert "exists" in refused("prune", MODEL, *data, *options, "--out", tmp_path / "q.safetensors")
    assert "--html" in refused("prune", MODEL, *data, "--explain", "--out", tmp_path / "q.safetensors")


@pytest.mark.parametrize("score", ["cap-a", "taylor", "random"])
def test_prune_in_steps(folder, tmp_path, score):
    out, stats = tmp_path / "p.safetensors", folder / "stats.safetensors"
    options = ("--flops", 0.6, "--steps", 2, "--score", score, "--stats", stats, "--repair", "ridge+bn", "--json")
    payload = json.loads(succeed("prune", MODEL, "--data", folder / "images", *options, "--out", out).stdout)
    assert (payload["report"]["steps"], payload["report"]["importance"]) == (2, score)
    assert payload["report"]["achieved"] == pytest.approx(0.6, rel=0.05)
    assert load_pruned(out, conv_net)(torch.zeros(1, 3, 8, 8)).shape == (1, 5)


def test_criteria_that_need_gradients(folder, tmp_path):
    data = ("--data", folder / "images", "--repair", "none")
    line = refused("prune", MODEL, *data, "--score", "cap-qgw", "--stats", folder / "stats.safetensors", "--out", "p")
    assert "expected statistics with gradients" in line
    assert "tp-twoaxis calibrate --score" in line
    stats = tmp_path / "s.safetensors"
    succeed("calibrate", MODEL, *data[:2], "--gradients", "--out", stats)
    succeed("prune", MODEL, *data, "--score", "cap-qgw", "--stats", stats, "--out", tmp_path / "p.safetensors")
    succeed("prune", MODEL, *data, "--score", "cap-qgw", "--out", tmp_path / "q.safetensors")
    result = succeed("prune", MODEL, *data, "--score", "hybrid", "--stats", stats, "--out", tmp_path / "r.safetensors")
    assert "hybrid: kept" in result.stdout


def test_plain_weights(folder, tmp_path):
    save_file(conv_net(seed=1).state_dict(), tmp_path / "w.safetensors")
    options = ("--data", folder / "images", "--checkpoint", tmp_path / "w.safetensors")
    succeed("calibrate", MODEL, *options, "--out", tmp_path / "s.safetensors")
    CalibrationStatistics.load(tmp_path / "s.safetensors").verify(conv_net(seed=1))
    succeed("prune", MODEL, *options, "--out", tmp_path / "p.safetensors", "--score", "l1", "--repair", "none")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["calibrate", "resnet999", "--data", "{d}", "--out", "{o}"], "did you mean"),
        (["calibrate", MODEL, "--data", "{t}/nowhere", "--out", "{o}"], "check the path"),
        (["calibrate", MODEL, "--data", "{d}", "--out", "{o}", "--target", "marge"], "expected one of margin"),
        (["calibrate", MODEL, "--data", "{d}", "--out", "{o}", "--mean", "a,b,c"], "--mean"),
        (["calibrate", MODEL, "--data", "{d}", "--out", "{o}", "--layers", "conv9"], "no layer 'conv9'"),
        (["calibrate", MODEL, "--data", "{d}", "--out", "{o}", "--positions", "few"], "--positions"),
        (["calibrate", MODEL, "--data", "{d}", "--out", "{o}", "--device", "cdua"], "did you mean 'cuda'"),
        (["calibrate", MODEL, "--data", "cifra10:/x", "--out", "{o}"], "did you mean 'cifar10'"),
        (["calibrate", MODEL, "--data", "{d}", "--out", "{o}", "--images", "0"], "--images"),
        (["calibrate", MODEL, "--data", "{d}", "--out", "{t}/no/s.safetensors"], "create it first"),
        (["calibrate", MODEL, "--data", "{d}", "--out", "{t}"], "got a folder"),
        (["calibrate", MODEL, "--data", "{d}", "--out", "{s}"], "--force"),
        (["calibrate", MODEL, "--data", "{d}", "--out", "{o}", "--checkpoint", "{s}"], "--stats"),
        (["calibrate", MODEL, "--data", "{d}", "--out", "{o}", "--checkpoint", "{pickle}"], "1 unexpected (a)"),
        (["calibrate", MODEL, "--out", "{o}"], "--data"),
        (["score"], "--stats or --data"),
        (["score", "--data", "{d}"], "name it first"),
        (["score", "--stats", "{s}", "--score", "captur"], "did you mean 'capture'"),
        (["score", "--stats", "{bad}"], "corrupt"),
        (["score", "cases:other_net", "--stats", "{s}"], "call calibrate() again"),
        (["score", "--stats", "{s}", "--out", "{t}/c.xls"], ".parquet"),
        (["score", "--stats", "{s}", "--plot", "{d}"], "not empty"),
        (["prune", MODEL, "--data", "{d}", "--out", "{o}", "--score", "tailor"], "did you mean 'taylor'"),
        (["prune", MODEL, "--data", "{d}", "--out", "{o}", "--flops", "50"], "--flops"),
        (["prune", MODEL, "--data", "{d}", "--out", "{o}", "--flops", "half"], "--flops"),
        (["prune", MODEL, "--data", "{d}", "--out", "{o}", "--flops", "0.01"], "min_keep"),
        (["prune", MODEL, "--data", "{d}", "--out", "{o}", "--steps", "0"], "--steps"),
        (["prune", MODEL, "--data", "{d}", "--out", "{o}", "--budget", "time"], "macs, channels, latency"),
        (["prune", MODEL, "--data", "{d}", "--out", "{o}", "--attention", "dims"], "expected one of heads, head-dims"),
        (["prune", MODEL, "--data", "{d}", "--out", "{o}", "--repair", "glue"], "repair"),
        (["prune", MODEL, "--data", "{d}", "--out", "{o}", "--ignore", "conv9"], "near it: conv"),
        (["prune", MODEL, "--data", "{d}", "--out", "{o}", "--eval-images", "3"], "--eval-split"),
        (["prune", MODEL, "--data", "{d}", "--out", "{o}", "--report", "{o}"], "rename"),
        (["prnue"], "prune"),
        (["demo", "--out", "{d}"], "not empty"),
    ],
)
def test_refusals_are_one_line(folder, tmp_path, arguments, part, monkeypatch):
    monkeypatch.setattr("cases.other_net", lambda: conv_net(seed=1), raising=False)
    (tmp_path / "bad.safetensors").write_bytes((folder / "stats.safetensors").read_bytes()[:1000])
    torch.save({"a": torch.ones(1)}, tmp_path / "net.pt")
    names = {
        "d": folder / "images",
        "s": folder / "stats.safetensors",
        "o": tmp_path / "out.safetensors",
        "t": tmp_path,
        "bad": tmp_path / "bad.safetensors",
        "pickle": tmp_path / "net.pt",
    }
    assert part in refused(*(argument.format(**names) for argument in arguments))
    assert not (tmp_path / "out.safetensors").exists()


def test_force_replaces(folder, tmp_path):
    out = tmp_path / "c.csv"
    out.write_text("mine")
    stats = ("--stats", folder / "stats.safetensors", "--out", out)
    refused("score", *stats)
    assert out.read_text() == "mine"
    succeed("score", *stats, "--force")
    assert out.read_text().startswith("layer,channel")


def test_demo_contract(tmp_path, monkeypatch):
    class Result:
        def show(self):
            print("the table and where the report is")

        def to_json(self):
            return '{"a": 1}'

    def run_demo(out, *, seed=0, quick=False, progress=True):
        assert (seed, quick) == (3, True)
        asked.append(progress)
        return Result()

    asked = []
    module = ModuleType("tp_twoaxis.demo")
    module.run_demo = run_demo
    monkeypatch.setitem(sys.modules, "tp_twoaxis.demo", module)
    options = ("--out", tmp_path / "d", "--quick", "--seed", 3)
    assert "the table and where the report is" in succeed("demo", *options).stdout
    assert json.loads(succeed("demo", *options, "--json").stdout) == {"a": 1}
    assert asked == [True, False]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (ImportError("no pandas"), 2)])
def test_interrupts_and_missing_packages(folder, monkeypatch, error, status):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("tp_twoaxis.diagnostics.channel_table.channel_table", fail)
    result = run("score", "--stats", folder / "stats.safetensors")
    assert result.exit_code == status
    if status == 2:
        assert result.stderr == 'tp-twoaxis: error: no pandas; pip install "tp-twoaxis[cli]"\n'


def test_defects_and_requested_tracebacks_are_raised(folder, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setenv("TP_TWOAXIS_TRACEBACK", "1")
    assert isinstance(run("score").exception, ValueError)
    monkeypatch.setattr(OneLineErrors, "invoke", fail)
    assert isinstance(run("score").exception, ZeroDivisionError)


def test_main_returns_the_status(folder, capsys):
    assert main(["score", "--stats", str(folder / "stats.safetensors"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["channels"]) == 61


def test_process(tmp_path):
    bad = process("calibrate", MODEL, "--data", tmp_path / "no", "--out", tmp_path / "s.safetensors", "--json")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    assert bad.stderr.startswith("tp-twoaxis: error: data:")


def test_without_typer(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tp_twoaxis.cli.commands", None)
    assert main(["score"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert 'pip install "tp-twoaxis[cli]"' in line


def test_prune_to_a_latency(folder, tmp_path, monkeypatch):
    with fake_time(monkeypatch):
        options = ("--budget", "latency", "--latency-batch", 4, "--flops", "0.37", "--score", "l1", "--repair", "none")
        arguments = ("prune", MODEL, "--data", folder / "images", *options, "--out", tmp_path / "p.safetensors")
        report = json.loads(succeed(*arguments, "--json").stdout)["report"]
    assert report["budget"] == "latency"
    assert report["achieved"] == pytest.approx(0.37, rel=0.05)
    assert any("that of 4 example(s) at once on cpu" in note for note in report["notes"])


@pytest.mark.parametrize("command", ["prune", "train", "explain"])
def test_training_images_are_never_reported_as_test(folder, tmp_path, command):
    classes = folder / "images" / "train"  # a folder of classes, without splits
    start = {
        "prune": (command, MODEL, "--out", tmp_path / "p.safetensors", "--flops", 0.6),
        "train": (command, "cases:conv_net", "--out", tmp_path / "t.safetensors"),
        "explain": (command, MODEL, "conv1", "--channel", 0),
    }[command]
    message = refused(*start, "--data", classes, "--eval-split", "test")
    assert f"{classes} has no splits" in message
    assert "--eval-data" in message
    for data, other in ((classes, classes), (classes, f"{classes}/"), (folder / "images", classes)):
        assert "apart from those of --data" in refused(*start, "--data", data, "--eval-data", other)
    assert list(tmp_path.iterdir()) == []
