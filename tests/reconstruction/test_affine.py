"""The channel-level algebra against NumPy."""

import numpy as np
import pytest
import torch

from tp_twoaxis import TwoAxisError
from tp_twoaxis.reconstruction.affine import (
    absorb_into_weight,
    affine_reconstruction,
    output_error,
    ridge_for,
    ridge_regression,
)


def rows(n=500, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, 3)) @ generator.normal(size=(3, 6)) + generator.normal(size=(n, 6)) * 0.3 + 2.0


def moments(x):
    return torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x.T, bias=True))


REMOVED = torch.tensor([False, True, False, False, True, False])


def test_reconstruction_equals_numpy_regression():
    x = rows()
    found = affine_reconstruction(*moments(x), REMOVED, ridge=1e-12)
    kept, lost = x[:, ~REMOVED.numpy()], x[:, REMOVED.numpy()]
    solution, *_ = np.linalg.lstsq(np.column_stack([kept, np.ones(len(x))]), lost, rcond=None)
    np.testing.assert_allclose(found.weights, solution[:-1], rtol=1e-8)
    np.testing.assert_allclose(found.shift, solution[-1], rtol=1e-8)
    residual = lost - kept @ solution[:-1] - solution[-1]
    np.testing.assert_allclose(found.residual, np.cov(residual.T, bias=True), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(found.explained, 1 - residual.var(0) / lost.var(0), rtol=1e-8)


@pytest.mark.parametrize("ridge", [1e-3, 1.0, float("inf")])
def test_residual_is_that_of_the_ridge_prediction(ridge):
    x = rows()
    found = affine_reconstruction(*moments(x), REMOVED, ridge=ridge)
    residual = x[:, REMOVED.numpy()] - x[:, ~REMOVED.numpy()] @ found.weights.numpy() - found.shift.numpy()
    np.testing.assert_allclose(residual.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(found.residual, np.cov(residual.T, bias=True), rtol=1e-9, atol=1e-12)
    assert (found.weights == 0).all() == (ridge == float("inf"))


def test_an_absorbed_weight_gives_what_predicted_channels_would_give():
    x = rows()
    found = affine_reconstruction(*moments(x), REMOVED, ridge=1e-6)
    weight = torch.randn(4, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    patch = np.random.default_rng(1).normal(size=(6, 9))
    kept = patch[~REMOVED.numpy()]
    patch[REMOVED.numpy()] = found.weights.numpy().T @ kept + found.shift.numpy()[:, None]
    absorbed, bias = absorb_into_weight(weight, found)
    expected = np.einsum("oct,ct->o", weight.numpy(), patch)
    np.testing.assert_allclose(np.einsum("okt,kt->o", absorbed.numpy(), kept) + bias.numpy(), expected, rtol=1e-9)


def test_output_error_of_one_tap_is_exact():
    x = rows()
    found = affine_reconstruction(*moments(x), REMOVED, ridge=1e-2)
    weight = torch.randn(4, 6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    absorbed, bias = absorb_into_weight(weight, found)
    difference = x @ weight[:, :, 0].numpy().T - x[:, ~REMOVED.numpy()] @ absorbed[:, :, 0].numpy().T - bias.numpy()
    np.testing.assert_allclose(output_error(weight, found), difference.var(0), rtol=1e-8)


def test_permuting_channels_permutes_the_reconstruction():
    x, order = rows(), np.array([3, 0, 5, 1, 4, 2])
    first = affine_reconstruction(*moments(x), REMOVED, ridge=1e-3)
    second = affine_reconstruction(*moments(x[:, order]), REMOVED[order], ridge=1e-3)
    a, b = np.zeros((6, 6)), np.zeros((6, 6))
    a[np.ix_(first.kept, first.removed)] = first.weights
    b[np.ix_(order[second.kept], order[second.removed])] = second.weights
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_rank_deficient_and_constant_inputs_stay_sane():
    x = rows(4)
    found = affine_reconstruction(*moments(x), REMOVED, ridge=ridge_for(4, 4))
    assert found.weights.abs().max() < 10
    constant = np.ones((10, 6)) * np.arange(6)
    found = affine_reconstruction(*moments(constant), REMOVED, ridge=1e-6)
    assert not found.weights.any()
    assert found.shift.tolist() == [1.0, 4.0]
    assert found.explained.tolist() == [1.0, 1.0]


def test_ridge_falls_with_rows():
    values = [ridge_for(n, 64) for n in (1, 64, 640, 64_000, 64_000_000)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 0.1
    assert values[-1] == pytest.approx(1e-6)
    with pytest.raises(TwoAxisError, match="ridge: expected a positive number"):
        ridge_regression(torch.eye(2), torch.eye(2), 0.0)
