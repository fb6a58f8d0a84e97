"""Factors of matrices that rounding leaves indefinite."""

import pytest
import torch

from tp_twoaxis.statistics.factorization import regularised_factor


def test_the_factor_is_that_of_the_matrix_with_what_is_added():
    x = torch.randn(50, 8, dtype=torch.float64)
    matrix = x.T @ x
    factor = regularised_factor(matrix, 0.5)
    torch.testing.assert_close(factor @ factor.T, matrix + 0.5 * torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("added", [0.0, 1e-9])
def test_rounding_does_not_matter_where_rows_are_few(added):
    torch.manual_seed(0)
    rows = torch.randn(20, 300)
    matrix = (rows.T @ rows).double()  # of rank 20, multiplied in float32
    assert torch.linalg.eigvalsh(matrix)[0] < 0
    factor = regularised_factor(matrix, added)
    assert float((factor @ factor.T - matrix).norm() / matrix.norm()) < 1e-4


def test_what_is_no_covariance_raises():
    with pytest.raises(torch.linalg.LinAlgError):
        regularised_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64), 0.0)
    with pytest.raises(torch.linalg.LinAlgError):
        regularised_factor(torch.full((2, 2), float("nan"), dtype=torch.float64), 0.0)
