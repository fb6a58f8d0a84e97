"""Closed forms against determinants of covariance matrices and explicit regressions."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tp_twoaxis.scores.information import (
    RESOLUTION,
    information_from_correlation,
    information_from_r2,
    information_of_channel,
    pair_r2,
)

CORRELATION = st.floats(-0.99, 0.99)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def entropy(covariance):
    """Differential entropy of a Gaussian, in nats."""
    return 0.5 * np.linalg.slogdet(2 * np.pi * np.e * np.atleast_2d(covariance))[1]


@given(rho=CORRELATION)
def test_information_of_a_pair_is_a_sum_of_entropies(rho):
    expected = 2 * entropy(1.0) - entropy([[1.0, rho], [rho, 1.0]])
    assert information_from_correlation(number(rho)).item() == pytest.approx(expected, abs=1e-12)
    assert information_from_r2(number(rho * rho)).item() == pytest.approx(expected, abs=1e-12)


@given(power=st.floats(0, 1e6), noise=st.floats(1e-3, 1e3))
def test_information_of_a_channel_is_a_difference_of_entropies(power, noise):
    expected = entropy(power + noise) - entropy(noise)
    assert information_of_channel(number(power), noise).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert information_of_channel(number(power), number(noise)).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_information_is_bounded_and_never_negative():
    r2 = torch.tensor([-1e-9, 0.0, 0.5, 1.0, 1.0 + 1e-9], dtype=torch.float64)
    information = information_from_r2(r2)
    assert information[0] == information[1] == 0
    assert information[3] == information[4] == pytest.approx(-0.5 * np.log(RESOLUTION), rel=1e-4)
    assert information_from_correlation(number(-1.0)) == information_from_correlation(number(1.0)) == information[3]
    # small correlations are not rounded away
    assert information_from_correlation(number(1e-9)).item() == pytest.approx(0.5e-18, rel=1e-9)


@settings(deadline=None)
@given(r_k=CORRELATION, r_j=CORRELATION, rho=CORRELATION)
def test_pair_r2_is_the_explicit_regression(r_k, r_j, rho):
    determinant = np.linalg.det(np.array([[1, rho, r_k], [rho, 1, r_j], [r_k, r_j, 1]]))
    assume(determinant > 1e-9)  # three such variables exist
    r = np.array([r_k, r_j])
    expected = r @ np.linalg.solve(np.array([[1, rho], [rho, 1]]), r)
    found = pair_r2(number(r_k), number(r_j), number(rho)).item()
    assert found == pytest.approx(expected, abs=1e-9)
    assert found == pytest.approx(pair_r2(number(r_j), number(r_k), number(rho)).item(), abs=1e-12)
    assert found == pytest.approx(pair_r2(number(-r_k), number(r_j), number(-rho)).item(), abs=1e-12)
    assert max(r_k**2, r_j**2) <= found <= 1


@pytest.mark.parametrize("rho", [1.0, -1.0, 1.0 - 1e-13])
def test_a_collinear_pair_explains_what_its_better_half_does(rho):
    assert pair_r2(number(0.5), number(0.5), number(rho)).item() == pytest.approx(0.25)
    assert pair_r2(number(0.3), number(0.5), number(rho)).item() == pytest.approx(0.25)


def test_pair_r2_broadcasts_to_all_pairs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    target = x @ torch.tensor([1.0, -0.5, 0.2, 0.0], dtype=torch.float64) + torch.randn(200, generator=generator)
    rho, r = torch.corrcoef(x.T), torch.corrcoef(torch.cat([x, target[:, None]], 1).T)[-1, :4]
    table = pair_r2(r[:, None], r[None, :], rho)
    assert table.shape == (4, 4)
    for k in range(4):
        assert table[k, k].item() == pytest.approx(r[k].item() ** 2)
        for j in set(range(4)) - {k}:
            design = torch.stack([torch.ones(200, dtype=torch.float64), x[:, k], x[:, j]], 1).numpy()
            residual = target.numpy() - design @ np.linalg.lstsq(design, target.numpy(), rcond=None)[0]
            assert table[k, j].item() == pytest.approx(1 - residual.var() / target.numpy().var(), abs=1e-9)
