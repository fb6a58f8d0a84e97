"""Sections of evidence: intervals, verdicts, cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.evidence import Claim, Estimate, EvidenceInputs, NotApplicableError, mean_estimate


def test_the_interval_is_that_of_resampled_means() -> None:
    values = np.random.default_rng(1).normal(size=12)
    draws = np.random.default_rng(2).choice(values, size=(20_000, 12)).mean(1)
    found = mean_estimate(list(values))
    assert found.value == pytest.approx(values.mean())
    assert found.lower == pytest.approx(np.quantile(draws, 0.025), abs=0.03)
    assert found.upper == pytest.approx(np.quantile(draws, 0.975), abs=0.03)
    assert mean_estimate(list(values)) == found


@pytest.mark.parametrize("values", [[], [math.nan], [0.5], [0.5, 0.7], [0.5, 0.5, 0.5, math.nan]])
def test_too_few_or_equal_cells_have_no_interval(values: list[float]) -> None:
    found = mean_estimate(values)
    assert math.isnan(found.lower)
    assert math.isnan(found.upper)
    assert Claim("", "", found, above=-10.0).verdict == "UNDECIDED"


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((0.3, 0.6), "HOLDS"), ((-0.1, 0.2), "UNDECIDED"), ((-0.3, -0.1), "DOES NOT"), ((0.8, 1.2), "UNDECIDED")],
)
def test_a_verdict_is_of_the_whole_interval(interval: tuple[float, float], verdict: str) -> None:
    assert Claim("", "", Estimate(sum(interval) / 2, *interval), above=0.0, below=1.0).verdict == verdict


def test_cells_are_convolutions_and_a_network_without_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    images = [(torch.randn(16, 3, 6, 6), torch.randint(3, (16,)))]
    assert EvidenceInputs(net, calibrate(net, images, progress=False), images).cells() == ["0"]
    flat = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    with pytest.raises(NotApplicableError, match="no convolution"):
        EvidenceInputs(flat, calibrate(flat, images, progress=False), images).cells()
