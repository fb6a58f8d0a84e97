"""The section as a whole: tables, claims, figures."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from cases import batches, conv_net
from lesion_cases import lesion_table
from torch import nn

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.diagnostics.html_page import png_bytes
from tp_twoaxis.diagnostics.interventions import interventions_of, interventions_section


@pytest.fixture(scope="module")
def section():
    net = conv_net()
    inputs = EvidenceInputs(
        net, calibrate(net, batches(96), progress=False), batches(96), batches(40, seed=3), progress=False
    )
    return interventions_section(inputs)


def test_claims_have_the_papers_numbers_and_ours(section):
    papers = [claim.paper for claim in section.claims]
    for number in ("0.474", "0.553", "0.687 (median)", "0.843 of channels", "[0.077, 0.183]", "[0.537, 0.665]"):
        assert number in papers
    assert {claim.verdict for claim in section.claims} <= {"HOLDS", "DOES NOT", "UNDECIDED"}
    assert section.follows
    assert section.fails
    assert section.question.endswith("?")


def test_tables_name_their_layers(section):
    for name in ("lesion_channels", "lesion_layers", "damage_correlations", "matched_capture", "damage_regression"):
        assert {"layer", "depth"} <= set(section.tables[name])
        assert section.tables[name].layer.unique().tolist() == ["conv1", "depthwise", "reduce"]


def test_figures_are_drawn(section):
    for drawing in section.drawings:
        assert png_bytes(drawing.draw()).startswith(b"\x89PNG")
        assert drawing.caption


def test_what_was_planted_is_found():
    """Peers supply what they explain, damage follows capture and is less where support is compact."""
    table = lesion_table(channels=60, constant=False)
    z = table.groupby("layer")[["capture", "compact_support"]].transform(lambda v: (v - v.mean()) / v.std(ddof=0))
    table["damage"] = 0.1 * (1.0 + z.capture - z.compact_support).rank(pct=True)
    table["peer_damage"] = table.damage * (1.0 - table.peer_explanation)
    verdicts = {claim.sentence: claim.verdict for claim in interventions_of(table).claims}
    held = [sentence for sentence, verdict in verdicts.items() if verdict == "HOLDS"]
    assert sum("E_8" in sentence for sentence in held) == 2
    assert sum("z K - z I" in sentence for sentence in held) == 1
    assert sum("compact peer support costs less" in sentence for sentence in held) == 1


def test_networks_together_are_one_answer(section):
    channels = section.tables["lesion_channels"]
    both = pd.concat([channels.assign(network="a", seed=1), channels.assign(network="a", seed=2)], ignore_index=True)
    together = interventions_of(both).tables
    assert len(together["damage_correlations"]) == 6
    assert {"network", "seed", "layer"} <= set(together["damage_regression"])
    one, two = (tables["matched_capture_pooled"] for tables in (section.tables, together))
    assert (two["pairs"] == 2 * one["pairs"]).all()


def test_nothing_damaged_is_undecided_and_still_drawn():
    section = interventions_of(lesion_table(("conv",), 6, damage=-0.01, constant=False))
    assert {claim.verdict for claim in section.claims} == {"UNDECIDED"}
    assert math.isnan(section.tables["peer_recovery"]["share"].iloc[0])
    for drawing in section.drawings:
        drawing.draw().draw_without_rendering()


def test_what_is_missing_skips_the_section():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).eval()
    images = [(torch.randn(16, 3, 8, 8), torch.randint(5, (16,)))]
    with pytest.raises(NotApplicableError, match="held-out"):
        interventions_section(EvidenceInputs(net, calibrate(net, images, progress=False), images, progress=False))
