"""``tp-twoaxis diagnose``: pages of one network and of several, going on, and how it refuses."""

from __future__ import annotations

import json

import pytest
from cli_cases import MODEL, refused, succeed

NETWORK = ("diagnose", MODEL, "--images", 24, "--held-out", 10, "--sections", "hulls,alignment")


def test_a_page_its_tables_and_going_on(folder, tmp_path):
    page, text = tmp_path / "r.html", tmp_path / "r.md"
    arguments = (*NETWORK, "--data", folder / "images", "--out", page)
    result = succeed(*arguments, "--markdown", text)
    assert "alignment: skipped, expected at least 100 images" in result.stdout
    assert "hulls: " in result.stdout
    assert "Gaussian formulas" in page.read_text()
    assert "| hulls |" in text.read_text()
    tables = tmp_path / "r_tables"
    assert {"run.json", "hulls.json", "hulls-hulls.csv", "hulls-hulls.parquet"} <= {f.name for f in tables.iterdir()}
    run = json.loads((tables / "run.json").read_text())
    assert (run["network"], run["seed"], run["images"], run["held_out"]) == (MODEL, "no checkpoint", 24, [10, "train"])
    assert "--force" in refused(*arguments)
    again = json.loads(succeed(*arguments, "--force", "--json").stdout)
    assert any("nothing was computed" in note for note in again["notes"])
    assert [section["name"] for section in again["sections"]] == ["alignment", "hulls"]
    assert all(claim["verdict"] in ("HOLDS", "DOES NOT", "UNDECIDED") for claim in again["claims"])
    # another section is added to the page
    more = succeed(*arguments, "--sections", "structure", "--force", "--json")
    assert [section["name"] for section in json.loads(more.stdout)["sections"]] == ["alignment", "structure", "hulls"]
    # tables of other images are not mixed in
    page.unlink()
    other = (*arguments, "--seed", 1)
    assert "another network, other images or options" in refused(*other)
    assert len(json.loads(succeed(*other, "--force", "--json").stdout)["sections"]) == 2


def test_runs_are_combined(folder, tmp_path):
    for seed in (1, 2):
        out = ("--out", tmp_path / f"{seed}.html", "--training-seed", seed)
        succeed(*NETWORK, "--data", folder / "images", *out)
    both, page, text = f"{tmp_path}/1_tables,{tmp_path}/2_tables", tmp_path / "both.html", tmp_path / "both.md"
    result = succeed("diagnose", "--combine", both, "--out", page, "--markdown", text)
    assert f"{MODEL} (1): " in result.stdout
    assert "over runs: 0 hold" in result.stdout
    assert "2 runs" in page.read_text()
    assert list((tmp_path / "both_tables").glob("*.csv"))
    assert f"| {MODEL} (1) | {MODEL} (2) | over runs |" in text.read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "expected MODEL and --data, or --combine"),
        ((MODEL,), "expected MODEL and --data, or --combine"),
        ((MODEL, "--data", "d", "--sections", "hull"), "did you mean 'hulls'"),
        ((MODEL, "--data", "d", "--removal", "half"), "--removal: expected one of mean, zero"),
        ((MODEL, "--data", "d", "--results", "r"), "--results: expected with --combine"),
        ((MODEL, "--data", "d", "--combine", "r"), "--combine: takes folders alone"),
        (("--combine", "missing"), "found no run.json"),
        ((MODEL, "--data", "d"), "no 'd'"),
    ],
)
def test_refusals(arguments, part, tmp_path):
    assert part in refused("diagnose", *arguments, "--out", tmp_path / "r.html")
    assert not list(tmp_path.iterdir())
