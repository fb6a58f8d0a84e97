"""``tp-twoaxis explain``: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json

import pytest
from cli_cases import MODEL, refused, succeed
from PIL import Image


def test_details_as_text_page_picture_and_json(folder, tmp_path):
    page, picture = tmp_path / "e.html", tmp_path / "e.png"
    arguments = (MODEL, "conv2", "--data", folder / "images", "--channel", "3, 7", "--images", 24)
    result = succeed("explain", *arguments, "--lesion-images", 10, "--out", page, "--png", picture)
    assert "of channel 3 can be predicted from" in result.stdout
    assert "statistics of 24 images" in result.stdout
    assert "lesions on 10 images" in result.stdout
    assert str(page) in result.stderr
    assert "of channel 7 can be predicted from" in page.read_text()
    with Image.open(picture) as image:
        assert min(image.size) > 300
    assert "--force" in refused("explain", *arguments, "--out", page)
    payload = json.loads(succeed("explain", *arguments, "--lesion-images", 10, "--json").stdout)
    assert payload["channels"] == [3, 7]
    assert payload["lesions"]["images"] == 10
    test = ("--eval-split", "test", "--removal", "zero", "--peers", 2)
    payload = json.loads(succeed("explain", *arguments, *test, "--json").stdout)
    assert (payload["score_images"], payload["lesions"]["images"]) == (24, 20)
    assert (payload["removal"], payload["peers"]) == ("zero", 2)


def test_few_images_are_shared(folder):
    result = succeed("explain", MODEL, "conv1", "--data", folder / "images", "--channel", 0)
    assert "40 images, 20 of them for lesions" in result.stdout


def test_overview_from_statistics_alone(folder, tmp_path):
    stats = ("--stats", folder / "stats.safetensors")
    text = succeed("explain", MODEL, "conv2", *stats, "--png", tmp_path / "e.png").stdout
    assert "hardest to replace" in text
    assert (tmp_path / "e.png").exists()
    detailed = succeed("explain", MODEL, "conv2", *stats, "--data", folder / "images", "--channel", 1).stdout
    assert "images of the lesions may be among those of --stats" in detailed


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [
        ("conv9", (), "no layer 'conv9'; near it"),
        ("conv1", ("--channel", "16"), "expected channels of 0 to 15, got 16"),
        ("conv1", ("--channel", "a"), "--channel: expected numbers"),
        ("conv1", ("--channel", ""), "--channel: expected numbers"),
        ("conv1", ("--channel", "1", "--removal", "median"), "--removal: expected one of mean, zero"),
        ("conv1", ("--peers", "20"), "peers: expected 1 to 10"),
        ("conv1", ("--target", "none", "--png", "e.png"), "--png: the picture needs two axes"),
    ],
)
def test_refusals(folder, tmp_path, monkeypatch, layer, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("explain", MODEL, layer, "--data", folder / "images", *arguments)
    assert not list(tmp_path.iterdir())


def test_missing_images_are_refused(folder):
    assert "--data: the statistics need images" in refused("explain", MODEL, "conv1")
    stats = ("--stats", folder / "stats.safetensors")
    assert "--data: the lesions need images" in refused("explain", MODEL, "conv1", *stats, "--channel", 1)
