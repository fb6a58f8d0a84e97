"""Factors of covariances, which rounding may leave indefinite."""

from __future__ import annotations

import torch
from torch import Tensor

# products of float32 are off by less than this, relative to the diagonal, at any width
LARGEST_ROUNDING = 1e-2


def regularised_factor(matrix: Tensor, added: float) -> Tensor:
    """Factor ``S + added I`` as ``L L'``.

    A covariance of fewer rows than columns has eigenvalues of zero, and rounding makes some of them negative. Where
    ``added`` does not outweigh that, ten times as much is added, and so on.

    Args:
        matrix: [K, K] float64, symmetric and but for rounding not indefinite.
        added: >= 0, in the matrix's units.

    Returns:
        L [K, K], lower triangular.

    Raises:
        torch.linalg.LinAlgError: the matrix is indefinite beyond rounding, or not finite.

    Example:
        >>> regularised_factor(torch.eye(2), 3.0).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
        >>> torch.isfinite(regularised_factor(torch.tensor([[1.0, 1.0 + 1e-7], [1.0 + 1e-7, 1.0]]).double(), 0.0)).all()
        tensor(True)
    """
    scale = float(matrix.diagonal().mean()) if len(matrix) else 0.0
    while True:
        regularised = matrix.clone()
        regularised.diagonal().add_(added)
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(regularised)
        if not int(info):
            return factor
        added = max(10 * added, 1e-12 * scale)
        if not added <= LARGEST_ROUNDING * scale:
            torch.linalg.cholesky(regularised)  # raises, and says where
