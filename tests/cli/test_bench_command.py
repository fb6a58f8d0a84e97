"""`tp-twoaxis bench` and `tp-twoaxis report`: what they print, and how they refuse."""

from __future__ import annotations

import json

import pytest
from bench_cases import tiny_config, write_folders
from typer.testing import CliRunner

from tp_twoaxis.benchmark import load_config
from tp_twoaxis.cli.commands import app


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="tp-twoaxis")


def refused(*arguments):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.exception
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("cli") / "images")


@pytest.fixture(scope="module")
def options(images):
    return [
        *("--model", "cases:conv_net", "--data", images, "--methods", "local,taylor,l2", "--keep", "0.7,0.5"),
        *("--repair", "none,bn", "--seeds", "42", "--images", "24"),
    ]


def test_a_comparison_of_one_s_own(options, tmp_path):
    out = tmp_path / "out"
    result = run("bench", *options, "--out", out)
    assert result.exit_code == 0, result.stderr or result.exception
    assert "| method | 0.7 | 0.5 |" in result.stdout
    assert "| taylor+bn |" in result.stdout
    assert "12 trials measured, 0 were there" in result.stdout
    payload = json.loads(run("bench", *options, "--out", out, "--json").stdout)
    assert (payload["cells"], payload["ran"], payload["skipped"], payload["failed"]) == (12, 0, 12, [])
    assert len(payload["summary"]) == 12
    assert {row["method"] for row in payload["auc"]} == {m.name for m in load_config(out / "config.json").methods}
    drawn = run("report", out)
    assert drawn.exit_code == 0, drawn.stderr
    assert (out / "report" / "report.html").exists()
    written = json.loads(run("report", out, "--json", "--out", tmp_path / "r").stdout)
    assert written["files"][0] == str(tmp_path / "r" / "report.html")


def test_steps_are_crossed_with_the_rest(options, tmp_path):
    result = run("bench", *options, "--methods", "l2", "--steps", "1,2", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr or result.exception
    assert {row["method"] for row in json.loads(result.stdout)["summary"]} == {
        "l2",
        "l2+bn",
        "l2+steps2",
        "l2+bn+steps2",
    }
    assert "--steps" in refused("bench", *options, "--steps", "few", "--out", tmp_path / "other")


def test_a_config_file(images, tmp_path):
    config = tiny_config(images, seeds=(42,), keep=(0.5,))
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    result = run("bench", "--config", tmp_path / "c.json", "--out", tmp_path / "out", "--part", "1/1", "--json")
    assert json.loads(result.stdout)["ran"] == 3
    assert load_config(tmp_path / "out" / "config.json") == config


def test_failures_are_reported(options, tmp_path):
    own = [*options[:5], "l2,bench_cases:broken", *options[6:]]
    result = run("bench", *own, "--out", tmp_path / "out")
    assert result.exit_code == 0
    line = "failed: cases:conv_net, bench_cases:broken+bn, 2 trials: RuntimeError: this criterion never works\n"
    assert result.stdout.count(line) == 1
    all_of_them = [*options[:5], "bench_cases:broken", *options[6:]]
    refusal = refused("bench", *all_of_them, "--out", tmp_path / "o2")
    assert "all 4 trials failed, the first with RuntimeError" in refusal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--methods", "tailor"], "did you mean 'taylor'"),
        (["--keep", "0.5,x"], "--keep: expected numbers"),
        (["--keep", "50"], "keep.0: expected less than or equal to 1, got 50.0"),
        (["--seeds", "a"], "--seeds: expected whole numbers"),
        (["--repair", "ridged"], "repair: expected one of"),
        (["--part", "3"], "--part: expected k/n"),
        (["--config", "none.json"], "expected it alone"),
        (["--data", "nowhere"], "nowhere"),
        (["--model", "resnet19"], "did you mean"),
    ],
)
def test_bad_input_is_one_line_and_status_2(options, tmp_path, changes, message):
    assert message in refused("bench", *options, *changes, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_inputs(tmp_path):
    assert "--model and --data, or --config" in refused("bench", "--out", tmp_path / "out")
    assert "JSON config" in refused("bench", "--config", tmp_path / "none.json", "--out", tmp_path / "out")
    assert "config.json" in refused("report", tmp_path)


def test_help():
    for command in ("bench", "report"):
        text = run(command, "--help").stdout
        assert f"Example: tp-twoaxis {command}" in text
        assert "--json" in text
