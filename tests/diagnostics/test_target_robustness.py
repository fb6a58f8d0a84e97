"""Task variables and partners: tables by hand, and sections with and without labels."""

from __future__ import annotations

import pytest
import reference_alignment as slow
import reference_scores
import torch
from alignment_cases import evidence_inputs
from cases import batches, conv_net

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.axis_coordinates import local_axis
from tp_twoaxis.diagnostics.evidence import EvidenceInputs
from tp_twoaxis.diagnostics.target_robustness import (
    TARGET_WORDS,
    target_choice_section,
    target_matrix,
    target_tables,
)


def test_six_variables_by_hand():
    inputs = evidence_inputs()
    single, pairs = target_tables(inputs)
    layer = inputs.statistics["conv2"]
    capture = local_axis(layer).capture.numpy()
    information = {
        name: reference_scores.task_information(layer.target_correlation(name).numpy())
        for name in TARGET_WORDS
        if name != "one_vs_rest"
    }
    columns = layer.target_correlation("one_vs_rest").numpy().T
    information["one_vs_rest"] = sum(reference_scores.task_information(r) for r in columns) / len(columns)
    cell = single[single.layer == "conv2"].set_index("target")
    for name, values in information.items():
        assert cell.loc[name, "rho"] == pytest.approx(slow.spearman(capture, values))
    rows = pairs[(pairs.layer == "conv2") & (pairs["first"] == "margin")].set_index("second")
    assert rows.loc["negative_loss", "rho"] == pytest.approx(
        slow.spearman(information["margin"], information["negative_loss"])
    )
    square = target_matrix(pairs)
    assert square.index.tolist() == square.columns.tolist() == list(TARGET_WORDS)
    mean = pairs[(pairs["first"] == "margin") & (pairs.second == "negative_loss")].rho.mean()
    assert square.loc["negative_loss", "margin"] == square.loc["margin", "negative_loss"] == pytest.approx(mean)


def test_the_section_is_whole():
    section = target_choice_section(evidence_inputs())
    assert set(section.tables) == {
        "targets", "target_means", "target_pairs", "target_matrix", "partners", "partner_means"
    }  # fmt: skip
    targets, means = section.tables["targets"], section.tables["target_means"].set_index("target")
    own = targets[targets.target == "correct_logit"]
    assert means.rho["correct_logit"] == pytest.approx(own.rho.mean())
    assert means.cells["correct_logit"] == len(own)
    partners, rules = section.tables["partners"], section.tables["partner_means"]
    assert rules.rho_default.tolist() == pytest.approx(
        partners.groupby("partners", sort=False).rho_default.mean().tolist()
    )
    assert len(section.claims) == 8
    assert all(drawing.draw().axes for drawing in section.drawings)


def test_without_labels_two_variables_are_left():
    network = conv_net()
    images = [x for x, _ in batches(160, 32)]
    inputs = EvidenceInputs(network, calibrate(network, images, progress=False), [(x, None) for x in images])
    section = target_choice_section(inputs)
    assert section.tables["target_matrix"].target.tolist() == ["predicted_margin", "predicted_logit"]
    assert "true margin" in section.fails
    assert len(section.claims) == 3
    assert torch.is_tensor(images[0])
