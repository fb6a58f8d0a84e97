"""The channel-level algebra against NumPy."""

import numpy as np
import pytest
import torch

from tp_twoaxis import TwoAxisError
from tp_twoaxis.pruning.repair.fold import affine_fold, fold_weight, output_error, ridge_for, ridge_regression


def rows(n=500, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, 3)) @ generator.normal(size=(3, 6)) + generator.normal(size=(n, 6)) * 0.3 + 2.0


def moments(x):
    return torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x.T, bias=True))


REMOVED = torch.tensor([False, True, False, False, True, False])


def test_fold_equals_numpy_regression():
    x = rows()
    fold = affine_fold(*moments(x), REMOVED, ridge=1e-12)
    kept, lost = x[:, ~REMOVED.numpy()], x[:, REMOVED.numpy()]
    solution, *_ = np.linalg.lstsq(np.column_stack([kept, np.ones(len(x))]), lost, rcond=None)
    np.testing.assert_allclose(fold.weights, solution[:-1], rtol=1e-8)
    np.testing.assert_allclose(fold.shift, solution[-1], rtol=1e-8)
    rest = lost - kept @ solution[:-1] - solution[-1]
    np.testing.assert_allclose(fold.residual, np.cov(rest.T, bias=True), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(fold.explained, 1 - rest.var(0) / lost.var(0), rtol=1e-8)


@pytest.mark.parametrize("ridge", [1e-3, 1.0, float("inf")])
def test_residual_is_that_of_the_damped_prediction(ridge):
    x = rows()
    fold = affine_fold(*moments(x), REMOVED, ridge=ridge)
    rest = x[:, REMOVED.numpy()] - x[:, ~REMOVED.numpy()] @ fold.weights.numpy() - fold.shift.numpy()
    np.testing.assert_allclose(rest.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(fold.residual, np.cov(rest.T, bias=True), rtol=1e-9, atol=1e-12)
    assert (fold.weights == 0).all() == (ridge == float("inf"))


def test_a_folded_weight_gives_what_predicted_channels_would_give():
    x = rows()
    fold = affine_fold(*moments(x), REMOVED, ridge=1e-6)
    weight = torch.randn(4, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    patch = np.random.default_rng(1).normal(size=(6, 9))
    kept = patch[~REMOVED.numpy()]
    patch[REMOVED.numpy()] = fold.weights.numpy().T @ kept + fold.shift.numpy()[:, None]
    folded, bias = fold_weight(weight, fold)
    expected = np.einsum("oct,ct->o", weight.numpy(), patch)
    np.testing.assert_allclose(np.einsum("okt,kt->o", folded.numpy(), kept) + bias.numpy(), expected, rtol=1e-9)


def test_output_error_of_one_tap_is_exact():
    x = rows()
    fold = affine_fold(*moments(x), REMOVED, ridge=1e-2)
    weight = torch.randn(4, 6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    folded, bias = fold_weight(weight, fold)
    difference = x @ weight[:, :, 0].numpy().T - x[:, ~REMOVED.numpy()] @ folded[:, :, 0].numpy().T - bias.numpy()
    np.testing.assert_allclose(output_error(weight, fold), difference.var(0), rtol=1e-8)


def test_permuting_channels_permutes_the_fold():
    x, order = rows(), np.array([3, 0, 5, 1, 4, 2])
    first = affine_fold(*moments(x), REMOVED, ridge=1e-3)
    second = affine_fold(*moments(x[:, order]), REMOVED[order], ridge=1e-3)
    a, b = np.zeros((6, 6)), np.zeros((6, 6))
    a[np.ix_(first.kept, first.removed)] = first.weights
    b[np.ix_(order[second.kept], order[second.removed])] = second.weights
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_rank_deficient_and_constant_inputs_stay_sane():
    x = rows(4)
    fold = affine_fold(*moments(x), REMOVED, ridge=ridge_for(4, 4))
    assert fold.weights.abs().max() < 10
    constant = np.ones((10, 6)) * np.arange(6)
    fold = affine_fold(*moments(constant), REMOVED, ridge=1e-6)
    assert not fold.weights.any()
    assert fold.shift.tolist() == [1.0, 4.0]
    assert fold.explained.tolist() == [1.0, 1.0]


def test_ridge_falls_with_rows():
    values = [ridge_for(n, 64) for n in (1, 64, 640, 64_000, 64_000_000)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 0.1
    assert values[-1] == pytest.approx(1e-6)
    with pytest.raises(TwoAxisError, match="ridge: expected a positive number"):
        ridge_regression(torch.eye(2), torch.eye(2), 0.0)
