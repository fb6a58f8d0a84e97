"""``tp-twoaxis sensitivity``: what it prints, writes and refuses."""

import json

import pytest
from cli_cases import MODEL, refused, succeed


def test_sensitivity_prints_and_writes(folder, tmp_path):
    arguments = ("sensitivity", MODEL, "--data", folder / "images", "--levels", 2)
    text = succeed(*arguments, "--out", tmp_path / "out").stdout
    assert "depthwise" in text
    assert f"wrote {tmp_path / 'out'}" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "groups.csv",
        "points.csv",
        "curves.json",
        "sensitivity.png",
    }
    payload = json.loads(succeed(*arguments, "--ignore", "depthwise", "--json").stdout)
    assert [row["group"] for row in payload["summary"]] == ["reduce"]
    assert payload["points"][0]["distortion"] == 0.0
    assert "not empty" in refused(*arguments, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "part"),
    [(("--price", "0"), "--price"), (("--levels", "0"), "--levels"), (("--attention", "dims"), "--attention")],
)
def test_sensitivity_refuses(folder, options, part):
    assert part in refused("sensitivity", MODEL, "--data", folder / "images", *options)
