"""``tp-twoaxis stability``: what it prints, draws and refuses."""

from __future__ import annotations

import json

import pytest
from cli_cases import MODEL, refused, succeed
from PIL import Image

from tp_twoaxis.scores.named_scores import DEFAULT_SCORE


def test_stability_prints_draws_and_tells(folder, tmp_path):
    plot = tmp_path / "stability.png"
    arguments = ("stability", MODEL, "--data", folder / "images", "--shards", 4, "--resamples", 5)
    text = succeed(*arguments, "--plot", plot, "--layers", "conv1,fc").stdout
    assert f"{DEFAULT_SCORE}: 5 resamples of 4 shards, 40 images" in text
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
