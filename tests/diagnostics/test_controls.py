"""Controls: labels permuted by hand, and sections with one of the two or none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from alignment_cases import evidence_inputs
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.axis_coordinates import target_axis
from tp_twoaxis.diagnostics.controls import (
    control_claims,
    controls_section,
    label_permutation_table,
)
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError


def test_permuted_labels_by_hand():
    inputs = evidence_inputs()
    table = label_permutation_table(inputs)
    assert table.local_equal.tolist() == [1.0] * 4
    assert not table.local_difference.any()
    images, labels = (torch.cat(parts) for parts in zip(*batches(160, 32), strict=True))
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0))
    shuffled = calibrate(inputs.model, [(images, labels[order])], progress=False)
    row = table[table.layer == "conv2"].iloc[0]
    real, chance = (target_axis(stats["conv2"], "margin").task_mi.mean() for stats in (inputs.statistics, shuffled))
    assert row.task_mi == pytest.approx(float(real), rel=1e-4)
    assert row.task_mi_permuted == pytest.approx(float(chance), rel=1e-4)
    assert row.ratio == pytest.approx(float(chance / real), rel=1e-4)


def test_a_network_that_knows_the_labels_loses_them():
    # the images' brightness is their class, and the network reads it
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    images = torch.randn(300, 3, 4, 4, generator=generator) + labels[:, None, None, None].float()
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        network[0].weight.abs_()
        network[3].weight.copy_(torch.tensor([-1.0, 0.0, 1.0])[:, None].expand(3, 8))
    loader = [(images, labels)]
    inputs = EvidenceInputs(network, calibrate(network, loader, progress=False), loader, progress=False)
    assert label_permutation_table(inputs).ratio[0] < 0.5


def test_the_section_is_whole():
    section = controls_section(evidence_inputs())
    assert set(section.tables) == {"label_permutation", "exact_power"}
    assert [claim.verdict for claim in section.claims[1:3]] == ["HOLDS", "HOLDS"]
    assert section.drawings[0].draw().axes
    assert control_claims(None, None) == []


def test_large_convolutions_are_left_out_with_the_reason():
    network = nn.Sequential(nn.Conv2d(3, 6, 21, padding=10), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    section = controls_section(evidence_inputs(network))
    assert list(section.tables) == ["label_permutation"]
    assert "Left out: no convolution has at most 1152" in section.fails


def test_neither_control_is_a_refusal():
    network = nn.Sequential(nn.Conv2d(3, 6, 21, padding=10), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = [x for x, _ in batches(160, 32)]
    inputs = EvidenceInputs(network, calibrate(network, images, progress=False), images, progress=False)
    with pytest.raises(NotApplicableError, match="no labels"):
        controls_section(inputs)


def test_without_labels_the_exact_comparison_is_left():
    network = conv_net()
    images = [x for x, _ in batches(160, 32)]
    inputs = EvidenceInputs(network, calibrate(network, images, progress=False), images, progress=False)
    section = controls_section(inputs)
    assert list(section.tables) == ["exact_power"]
    assert "no labels" in section.fails
    assert np.isfinite(section.tables["exact_power"].rho).all()
