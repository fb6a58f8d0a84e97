"""Covariances made safe to invert."""

from __future__ import annotations

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError


def damped_factor(covariance: Tensor, ridge: float) -> Tensor | None:
    """Factor ``S + ridge t I`` as ``L L'``, with t the mean variance.

    Args:
        covariance: [K, K] float64.
        ridge: relative to the mean variance, > 0.

    Returns:
        L [K, K], lower triangular; None where nothing varies.

    Raises:
        TwoAxisError: the ridge is not positive.

    Example:
        >>> damped_factor(torch.eye(2), 3.0).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    if not ridge > 0.0:
        raise TwoAxisError(f"ridge: expected a positive number relative to the mean variance, got {ridge}")
    scale = float(covariance.diagonal().mean()) if len(covariance) else 0.0
    if scale <= 0.0:
        return None
    damped = covariance.clone()
    damped.diagonal().add_(ridge * scale)
    factor: Tensor = torch.linalg.cholesky(damped)
    return factor
