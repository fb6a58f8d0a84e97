"""Sections as files: what is written is read again, and what is half-written is not there."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
from matplotlib.figure import Figure as Drawn

from tp_twoaxis.diagnostics.evidence import Claim, Drawing, Estimate, Section
from tp_twoaxis.diagnostics.evidence_store import EvidenceFolder, SectionRecord
from tp_twoaxis.errors import FileFormatError, TwoAxisError


def section(name="hulls", value=1.5):
    return Section(
        name,
        "How many?",
        {"cells": pd.DataFrame({"layer": ["a", "b"], "size": [value, math.nan]})},
        [Claim("grows", "0.3", Estimate(value), above=0.0, note="ours"), Claim("b", "", Estimate(1.0, 0.5, 2.0))],
        [Drawing("picture", Drawn, "what it shows")],
        follows="little",
        fails="often",
    )


@pytest.fixture
def folder(tmp_path):
    return EvidenceFolder(tmp_path / "report_tables")


def test_what_is_written_is_read_again(folder):
    record = folder.finish(folder.draw(section()), key="a", seconds=2.0)
    found = folder.read("hulls", key="a")
    assert str(found) == str(record)  # NaN is not equal to itself
    assert [claim.verdict for claim in found.claims] == ["UNDECIDED", "HOLDS"]
    assert math.isnan(found.claims[0].estimate.lower)
    pd.testing.assert_frame_equal(folder.table(found, "cells"), section().tables["cells"])
    assert (folder.path / "hulls-cells.csv").read_text().splitlines() == ["layer,size", "a,1.5", "b,"]
    assert folder.png(found, found.figures[0])[1:4] == b"PNG"
    assert found.figures[0].caption == "what it shows"
    json.loads((folder.path / "hulls.json").read_text(), parse_constant=pytest.fail)  # no NaN: it is JSON
    assert folder.read("hulls", key="b") is None
    assert [r.name for r in folder.records(["alignment", "hulls"])] == ["hulls"]


def test_a_section_is_there_once_its_record_is(folder):
    folder.draw(section())
    assert folder.read("hulls") is None
    folder.finish(folder.draw(section()))
    (folder.path / "hulls-of_before.csv").write_text("")
    folder.draw(section(value=2.0))  # interrupted while it is written again
    assert folder.read("hulls") is None
    assert not (folder.path / "hulls-of_before.csv").exists()


def test_files_that_are_none_are_refused(folder):
    folder.finish(SectionRecord("hulls", skipped="no"))
    file = folder.path / "hulls.json"
    content = json.loads(file.read_text())
    for wrong in ("{", "[]", "{}", json.dumps(content | {"format": "other"}), json.dumps(content | {"version": 2})):
        file.write_text(wrong)
        with pytest.raises(FileFormatError, match=r"hulls.json: expected"):
            folder.read("hulls")
    file.write_text(json.dumps(content | {"size": 1}))
    with pytest.raises(FileFormatError, match="expected a section of evidence"):
        folder.read("hulls")


def test_a_run_is_described_and_a_folder_without_is_refused(folder):
    assert not folder.described
    with pytest.raises(FileFormatError, match=r"found no run.json"):
        folder.description()
    folder.describe({"network": "net", "seed": "1"})
    assert folder.description() == {"network": "net", "seed": "1"}


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TwoAxisError, match="could not be made"):
        EvidenceFolder(tmp_path / "file" / "tables").describe({})
