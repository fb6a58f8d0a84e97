"""The page: claims first, everything inside, text as text."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from matplotlib.figure import Figure

from tp_twoaxis.diagnostics.evidence import Claim, Drawing, Estimate, Section
from tp_twoaxis.diagnostics.evidence_page import READING, claims_markdown, evidence_html
from tp_twoaxis.diagnostics.evidence_store import EvidenceFolder, SectionRecord


@pytest.fixture
def folder(tmp_path):
    folder = EvidenceFolder(tmp_path / "report_tables")
    folder.describe({"network": "net<1>", "seed": "a", "data": "cifar10", "images": 2000, "command": "tp-twoaxis"})
    return folder


def records(folder):
    claims = [
        Claim("capture & task <apart>", "0.03", Estimate(0.01, -0.05, 0.07), above=-0.2, below=0.2),
        Claim("all of them", "", Estimate(0.3, 0.1, 0.4), above=0.5, note="the bound is ours"),
        Claim("no interval", "0.95", Estimate(0.9), above=0.5),
    ]
    table = pd.DataFrame({"layer": [f"layer{i}" for i in range(130)], "rho": 0.5})
    section = Section("alignment", "Aligned?", {"cells": table}, claims, [Drawing("one", Figure, "dots")], "f1", "f2")
    return [
        folder.finish(folder.draw(section), seconds=2.34, cpu_seconds=4.5),
        folder.finish(SectionRecord("learning", skipped="no snapshots")),
    ]


def test_claims_come_first_with_their_verdicts(folder):
    html = evidence_html(folder, records(folder))
    assert html.index("<h2>Claims: 1 holds, 1 do not, 1 undecided") < html.index("<h2>Alignment (section 2.2, H1)")
    assert [html.count(f">{verdict}</span>") for verdict in ("HOLDS", "DOES NOT", "UNDECIDED")] == [2, 2, 2]
    assert html.count("capture &amp; task &lt;apart&gt;") == 2
    assert "0.010 [-0.050, 0.070]" in html
    assert "no number" in html
    assert html.count(READING[:60]) == 1
    for part in ("Aligned?", "dots", "f1", "f2", "2.3 s (4.5 CPU seconds)", "2000 calibration images", "net&lt;1&gt;"):
        assert part in html
    assert html.count("Skipped: ") == 2
    assert "nan" not in re.sub(r"base64,[^\"]*", "", html).lower()


def test_the_page_holds_everything_and_fits_narrow_windows(folder):
    html = evidence_html(folder, records(folder))
    assert "http" not in re.sub(r"base64,[^\"]*", "", html)
    assert html.count("src=") == html.count('src="data:') == 1
    assert "width=device-width" in html
    assert "max-width: 700px" in html
    # long tables are cut, and it is said where they are whole
    assert "layer99" in html
    assert "layer100" not in html
    assert "The first 100 of 130 rows; all are in report_tables/alignment-cells.csv." in html


def test_markdown_has_a_row_a_claim(folder):
    lines = claims_markdown(records(folder)).splitlines()
    assert lines[3] == "| alignment | all of them |  | 0.300 [0.100, 0.400] | DOES NOT |"
    assert lines[-1] == "Skipped: learning (no snapshots)."
