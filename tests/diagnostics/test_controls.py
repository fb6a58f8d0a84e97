"""Controls: labels permuted by hand, and patch covariances against unfolded patches."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import reference_scores
import torch
from alignment_cases import evidence_inputs
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.axis_coordinates import target_axis
from tp_twoaxis.diagnostics.controls import (
    PatchCovariance,
    control_claims,
    controls_section,
    exact_power_table,
    label_permutation_table,
)
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, 3, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
        nn.Conv2d(3, 5, 1),
    ],
    ids=["strided", "grouped", "depthwise", "pointwise"],
)
def test_powers_are_those_of_unfolded_patches(layer):
    x = torch.randn(7, layer.in_channels, 6, 6, generator=torch.Generator().manual_seed(0))
    patches = PatchCovariance(layer)
    for part in (x[:3], x[3:]):
        patches.update(part, layer(part).shape[2:].numel())
    by_hand = reference.patch_power(x.double().numpy(), layer)
    assert patches.power.numpy() == pytest.approx(by_hand, rel=1e-6)
    unfolded = reference.patches(x.double().numpy(), layer).reshape(-1, layer.in_channels, layer.weight[0, 0].numel())
    first = unfolded[:, : layer.in_channels // layer.groups].reshape(len(unfolded), -1)
    assert patches.covariance[0].numpy() == pytest.approx(reference.covariance(first), rel=1e-6, abs=1e-9)
    # the formula of the outputs' variance, and of the quotient
    variance = layer(x).double().transpose(0, 1).flatten(1).var(1, correction=0).detach()
    assert patches.power.numpy() == pytest.approx(variance.numpy(), rel=1e-4)
    if layer.groups == 1:
        weight = layer.weight.detach().double().flatten(1)
        quotient = reference_scores.rayleigh_quotient(weight.numpy(), patches.covariance[0].numpy())
        assert (patches.power / weight.square().sum(1)).numpy() == pytest.approx(quotient, rel=1e-9)


def test_exact_and_streaming_quotients_agree():
    table = exact_power_table(evidence_inputs())
    everywhere = table[table.positions == "all"]
    assert everywhere.rho.to_numpy() == pytest.approx(1.0)
    assert everywhere.largest_difference.max() < 1e-4
    assert table.positions.tolist() == ["all"] * 4 + ["sampled"] * 4


def test_large_convolutions_are_not_compared_exactly():
    wide = nn.Sequential(nn.Conv2d(3, 130, 1), nn.Conv2d(130, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert exact_power_table(evidence_inputs(wide)).layer.unique().tolist() == ["0"]
    network = nn.Sequential(nn.Conv2d(3, 6, 21, padding=10), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(NotApplicableError, match="1152 inputs x taps"):
        exact_power_table(evidence_inputs(network))
    assert "Left out" in controls_section(evidence_inputs(network)).fails


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


def test_without_labels_the_exact_comparison_is_left():
    network = conv_net()
    images = [x for x, _ in batches(160, 32)]
    inputs = EvidenceInputs(network, calibrate(network, images, progress=False), images, progress=False)
    section = controls_section(inputs)
    assert list(section.tables) == ["exact_power"]
    assert "no labels" in section.fails
    assert np.isfinite(section.tables["exact_power"].rho).all()
