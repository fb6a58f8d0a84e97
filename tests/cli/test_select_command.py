"""``tp-twoaxis select``: what it prints, writes and refuses."""

from __future__ import annotations

import json

import pytest
from cli_cases import MODEL, refused, succeed

from tp_twoaxis.importance import expand_criteria

LOCAL_SCORES = expand_criteria(["all-local"])


def test_select_prints_a_table(folder):
    arguments = ("select", MODEL, "--data", folder / "images", "--batch-size", 8, "--flops", "0.8,0.6")
    text = succeed(*arguments, "--candidates", "variance,l2").stdout
    assert "accuracy on 20 held-out images" in text
    assert "80%" in text
    assert "best: " in text


def test_select_in_json_and_to_a_file(folder, tmp_path):
    arguments = ("select", MODEL, "--data", folder / "images", "--flops", 0.6, "--held-out", 0.25)
    out = tmp_path / "selection.json"
    options = ("--exclude", ",".join(LOCAL_SCORES[1:]), "--report", out, "--json")
    payload = json.loads(succeed(*arguments, *options).stdout)
    assert payload == json.loads(out.read_text())
    assert (payload["best"], payload["held_out_images"]) == (LOCAL_SCORES[0], 10)
    assert [row["candidate"] for row in payload["table"]] == [LOCAL_SCORES[0]]
    assert "exists" in refused(*arguments, *options)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--candidates", "captur"), "did you mean 'capture'"),
        (("--exclude", "l2"), "'l2' is no candidate"),
        (("--flops", "half"), "--flops"),
        (("--flops", "2"), "flops"),
    ],
)
def test_select_refuses(folder, options, part):
    assert part in refused("select", MODEL, "--data", folder / "images", *options)
