"""``tp-twoaxis select`` and ``tp-twoaxis stability``: what they print, write and refuse."""

from __future__ import annotations

import json

import pytest
from cli_cases import MODEL, refused, succeed
from PIL import Image

from tp_twoaxis.scores import LOCAL_FAMILY


def test_select_prints_a_table(folder):
    arguments = ("select", MODEL, "--data", folder / "images", "--batch-size", 8, "--flops", "0.8,0.6")
    text = succeed(*arguments, "--candidates", "variance,l2").stdout
    assert "accuracy on 20 held-out images" in text
    assert "80%" in text
    assert "best: " in text


def test_select_in_json_and_to_a_file(folder, tmp_path):
    arguments = ("select", MODEL, "--data", folder / "images", "--flops", 0.6, "--held-out", 0.25)
    out = tmp_path / "selection.json"
    options = ("--exclude", ",".join(LOCAL_FAMILY[1:]), "--report", out, "--json")
    payload = json.loads(succeed(*arguments, *options).stdout)
    assert payload == json.loads(out.read_text())
    assert (payload["best"], payload["held_out_images"]) == (LOCAL_FAMILY[0], 10)
    assert [row["candidate"] for row in payload["table"]] == [LOCAL_FAMILY[0]]
    assert "exists" in refused(*arguments, *options)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--candidates", "captur"), "did you mean capture"),
        (("--exclude", "l2"), "'l2' is no candidate"),
        (("--flops", "half"), "--flops"),
        (("--flops", "2"), "flops"),
    ],
)
def test_select_refuses(folder, options, part):
    assert part in refused("select", MODEL, "--data", folder / "images", *options)


def test_stability_prints_draws_and_tells(folder, tmp_path):
    plot = tmp_path / "stability.png"
    arguments = ("stability", MODEL, "--data", folder / "images", "--shards", 4, "--resamples", 5)
    text = succeed(*arguments, "--plot", plot, "--layers", "conv1,fc").stdout
    assert "norm-local: 5 resamples of 4 shards, 40 images" in text
    assert "images needed" in text
    assert "enough: " in text
    picture = Image.open(plot).convert("RGB")
    assert len(picture.getcolors(1 << 24)) > 20
    payload = json.loads(succeed(*arguments, "--score", "task-mi", "--layers", "fc", "--json").stdout)
    assert [layer["name"] for layer in payload["stability"]["layers"]] == ["fc"]
    assert payload["size"]["images"] == 40
    assert "exists" in refused(*arguments, "--plot", plot)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--score", "captur"), "did you mean 'capture'"),
        (("--shards", "1"), "--shards"),
        (("--shards", "60"), "40 images"),
        (("--level", "2"), "level"),
        (("--score", "task-mi", "--target", "none"), "target"),
    ],
)
def test_stability_refuses(folder, options, part):
    layers = ("--layers", "fc", "--resamples", 3)
    assert part in refused("stability", MODEL, "--data", folder / "images", *layers, *options)
