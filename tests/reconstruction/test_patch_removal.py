"""Weights refitted to what remains, against the formula and against predictions of what is missing."""

import numpy as np
import pytest
import torch

from tp_twoaxis.reconstruction import patch_removal
from tp_twoaxis.reconstruction.affine import (
    LEAST_RIDGE,
    absorb_into_weight,
    affine_reconstruction,
    held_out_error,
)
from tp_twoaxis.reconstruction.patch_removal import Patches
from tp_twoaxis.reconstruction.ridge import COARSE_RIDGES


def moments(seed, rows, width, held_out=None):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 2, width, generator=g).double()

    def described(rows):
        x = torch.randn(rows, width // 2, generator=g).double() @ mix
        x = x + 0.5 * torch.randn(rows, width, generator=g).double() + 1.0
        return x.mean(0), torch.cov(x.T, correction=0)

    return Patches(described(rows), None if held_out is None else described(held_out))


def missing_of(width):
    return torch.arange(width) % 3 == 1


@pytest.mark.parametrize("outputs", [4, 70])
def test_it_is_the_ridge_solution(outputs):
    patches, weight = moments(0, 300, 12), torch.randn(outputs, 12)
    refitted, shift = patches.refit(weight, missing_of(12))
    mean, s, w = patches.fitted[0].numpy(), patches.fitted[1].numpy(), weight.double().numpy()
    gone = missing_of(12).numpy()
    kept = ~gone
    own = s[np.ix_(kept, kept)]
    change = (
        w[:, gone]
        @ s[np.ix_(gone, kept)]
        @ np.linalg.inv(own + LEAST_RIDGE * np.trace(own) / kept.sum() * np.eye(kept.sum()))
    )
    expected = np.where(gone, 0.0, w)
    expected[:, kept] += change
    np.testing.assert_allclose(refitted, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(shift, (w - expected) @ mean, rtol=1e-9, atol=1e-9)  # the mean output stays


@pytest.mark.parametrize("rows", [14, 40, 4000])
def test_the_ridge_is_that_of_the_least_error_on_other_images(rows):
    patches, weight = moments(1, rows, 24, held_out=500), torch.randn(6, 24)
    found = [affine_reconstruction(*patches.fitted, missing_of(24), ridge=ridge) for ridge in COARSE_RIDGES]
    best = min(found, key=lambda one: held_out_error(weight[..., None], one, *patches.held_out))
    absorbed, expected_shift = absorb_into_weight(weight[..., None], best)
    refitted, shift = patches.refit(weight, missing_of(24))
    torch.testing.assert_close(refitted[:, best.kept], absorbed[..., 0])
    torch.testing.assert_close(shift, expected_shift)
    assert not bool(refitted[:, missing_of(24)].any())


def test_mixtures_of_outputs_choose_as_all_of_them_do(monkeypatch):
    patches, weight = moments(2, 40, 24, held_out=500), torch.randn(300, 24)
    by_mixtures = patches.refit(weight, missing_of(24))
    monkeypatch.setattr(patch_removal, "JUDGED_OUTPUTS", 300)
    for got, expected in zip(by_mixtures, patches.refit(weight, missing_of(24)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
