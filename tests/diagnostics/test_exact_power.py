"""Patch covariances against unfolded patches, and powers from outputs against both."""

from __future__ import annotations

import pytest
import reference
import reference_scores
import torch
from alignment_cases import evidence_inputs
from torch import nn

from tp_twoaxis.diagnostics.evidence import NotApplicableError
from tp_twoaxis.diagnostics.exact_power import PatchCovariance, exact_power_table


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
