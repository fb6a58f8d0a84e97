"""Criteria and repairs as the commands take them: everywhere the same names, options and messages."""

from __future__ import annotations

import json
import re

import pytest
from cli_cases import MODEL, refused, succeed

from tp_twoaxis import CalibrationStatistics
from tp_twoaxis.importance import expand_criteria
from tp_twoaxis.scores.named_scores import DEFAULT_SCORE


@pytest.fixture
def takes_criterion(folder, tmp_path):
    """Ask each command for a criterion; images are never read, because the name is refused before."""
    data = ("--data", folder / "images")
    out = ("--out", tmp_path / "out.safetensors")
    commands = {
        "calibrate": ("calibrate", MODEL, *data, *out, "--score"),
        "score": ("score", MODEL, *data, "--score"),
        "stability": ("stability", MODEL, *data, "--score"),
        "select": ("select", MODEL, *data, "--candidates"),
        "exclude": ("select", MODEL, *data, "--exclude"),
        "prune": ("prune", MODEL, *data, *out, "--score"),
        "bench": ("bench", "--model", MODEL, *data, "--out", tmp_path / "results", "--methods"),
    }
    return lambda criterion: {refused(*command, criterion) for command in commands.values()}


@pytest.mark.parametrize(
    ("criterion", "part"),
    [
        ("tailor", "did you mean 'taylor'"),
        ("captur", "expected one of capture, variance"),
        ("hull(strenght=1.0)", "did you mean 'strength'"),
        ("hull(1.0)", "expected a name, or options like"),
        ("no_such_module:factory", "no_such_module"),
    ],
)
def test_the_same_message_in_every_command(takes_criterion, monkeypatch, criterion, part):
    for opened in ("tp_twoaxis.data.open_dataset", "tp_twoaxis.models.build_model"):
        monkeypatch.setattr(opened, lambda *_, **__: pytest.fail("the name is to be refused before"))
    # commands that take families know more names
    messages = {re.sub(r"\d+ in all", "in all", message) for message in takes_criterion(criterion)}
    assert len(messages) == 1
    assert part in messages.pop()


def test_families_are_suggested_where_they_are_taken(folder):
    data = (MODEL, "--data", folder / "images")
    assert "did you mean 'all-local'" in refused("select", *data, "--candidates", "all-locl")
    assert "all-local" not in refused("stability", *data, "--score", "all-locl")


def test_the_same_message_for_a_repair(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tp_twoaxis.data.open_dataset", lambda *_, **__: pytest.fail("read"))
    data, repair = ("--data", folder / "images"), ("--repair", "rigde+bn")
    messages = {
        refused("prune", MODEL, *data, *repair, "--out", tmp_path / "p.safetensors"),
        refused("select", MODEL, *data, *repair),
        refused("bench", "--model", MODEL, *data, *repair, "--out", tmp_path / "results"),
    }
    assert len(messages) == 1
    assert "did you mean 'ridge'" in messages.pop()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--min-keep", "2"), "--min-keep"),
        (("--round-to", "0"), "--round-to"),
        (("--attention", "dims"), "attention: expected one of heads, head-dims"),
        (("--ignore", "conv9"), "conv9"),
        (("--target", "marge"), "expected one of margin"),
        (("--mean", "a,b,c"), "--mean: expected numbers"),
    ],
)
def test_numbers_and_names_are_checked_before_images_are_read(folder, tmp_path, monkeypatch, options, part):
    monkeypatch.setattr("tp_twoaxis.data.open_dataset", lambda *_, **__: pytest.fail("read"))
    data = ("--data", folder / "images")
    assert part in refused("prune", MODEL, *data, *options, "--out", tmp_path / "p.safetensors")
    assert part in refused("select", MODEL, *data, *options)


def test_select_takes_every_repair_and_families(folder):
    arguments = ("select", MODEL, "--data", folder / "images", "--flops", 0.6, "--json")
    payload = json.loads(succeed(*arguments, "--repair", "ridge+bn", "--candidates", "local,l2").stdout)
    assert [row["candidate"] for row in payload["table"]] == [DEFAULT_SCORE, "l2"]
    assert all(row["error"] is None for row in payload["table"])
    left = ",".join(name for name in expand_criteria(["all-target"]) if name != "task-mi")
    payload = json.loads(succeed(*arguments, "--candidates", "all-target", "--exclude", left).stdout)
    assert payload["best"] == "task-mi"


@pytest.mark.parametrize("score", ["anticipating", "capture(site='consumer')", "local", "hull(strength=1.0)"])
def test_prune_gathers_what_the_criterion_needs(folder, tmp_path, score):
    out = tmp_path / "p.safetensors"
    arguments = ("prune", MODEL, "--data", folder / "images", "--score", score, "--flops", 0.7, "--json")
    payload = json.loads(succeed(*arguments, "--out", out).stdout)
    assert payload["report"]["achieved"] == pytest.approx(0.7, rel=0.1)
    assert payload["score"] == payload["report"]["importance"] == {"local": DEFAULT_SCORE}.get(score, score)
    assert out.exists()


def test_calibrate_gathers_what_a_criterion_needs(folder, tmp_path):
    data = ("--data", folder / "images")
    extras = {}
    for score in ("anticipating", "cap-qgw", "hull", "l2"):
        out = tmp_path / f"{score}.safetensors"
        succeed("calibrate", MODEL, *data, "--score", score, "--out", out)
        extras[score] = CalibrationStatistics.load(out).extras
    assert {name: tuple(has) for name, has in extras.items()} == {
        "anticipating": ("consumers",),
        "cap-qgw": ("gradients",),
        "hull": (),
        "l2": (),
    }
    stats = ("--stats", tmp_path / "anticipating.safetensors")
    succeed("prune", MODEL, *data, *stats, "--score", "anticipating", "--out", tmp_path / "p.safetensors")


def test_scores_with_options(folder):
    stats = ("--stats", folder / "stats.safetensors", "--json")
    columns = {}
    for score in (DEFAULT_SCORE, "local", "hull", "hull(strength=1.0)"):
        payload = json.loads(succeed("score", *stats, "--score", score).stdout)
        columns[score] = [row["score"] for row in payload["channels"]]
    assert columns["local"] == columns[DEFAULT_SCORE]
    assert columns["hull(strength=1.0)"] != columns["hull"]
    assert "ranks whole groups" in refused("score", *stats[:2], "--score", "l2")
    options = ("--data", folder / "images", "--shards", 4, "--resamples", 3, "--layers", "fc")
    text = succeed("stability", MODEL, *options, "--score", "hull(strength=1.0)").stdout
    assert "hull(strength=1.0): 3 resamples of 4 shards" in text


@pytest.mark.parametrize("command", ["prune", "select"])
def test_help_says_where_the_criteria_are_listed(command):
    text = " ".join(succeed(command, "--help").stdout.replace("│", " ").split())
    assert "`tp-twoaxis scores` lists" in text
