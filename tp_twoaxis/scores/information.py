"""Closed-form information of jointly Gaussian variables, in nats (paper, appendix B.1)."""

from __future__ import annotations

import torch
from torch import Tensor

# 1 - |rho| below this is not resolved by float32 activations; it caps the information of one pair at about 13.5 nats
RESOLUTION = 1e-12


def information_from_r2(r2: Tensor) -> Tensor:
    """Mutual information of a variable with its linear prediction, ``-1/2 ln(1 - R^2)`` (equation 9).

    Args:
        r2: share of explained variance, any shape, clipped to [0, 1 - 1e-12] (float32: to 1 - 1.2e-7).

    Returns:
        Information in nats, the shape of ``r2``, in [0, 13.9].

    Example:
        >>> round(float(information_from_r2(torch.tensor(0.75, dtype=torch.float64))), 4)
        0.6931
    """
    resolution = max(RESOLUTION, torch.finfo(r2.dtype).eps)
    return -0.5 * torch.log1p(-r2.clamp(0.0, 1.0 - resolution))


def information_from_correlation(rho: Tensor) -> Tensor:
    """Mutual information of a pair, ``-1/2 ln(1 - rho^2)`` (equation 7).

    Args:
        rho: Pearson correlations in [-1, 1], any shape.

    Returns:
        Information in nats, the shape of ``rho``.

    Example:
        >>> float(information_from_correlation(torch.zeros(1)))
        0.0
    """
    return information_from_r2(rho.square())


def information_of_channel(signal_power: Tensor, noise_power: Tensor | float) -> Tensor:
    """Information that a Gaussian channel lets through, ``1/2 ln(1 + P / s2)`` (equation 1).

    Args:
        signal_power: variances, any shape, not negative.
        noise_power: the noise floor s2, positive.

    Returns:
        Information in nats, the shape of ``signal_power``, not negative.

    Example:
        >>> round(float(information_of_channel(torch.tensor(3.0), 1.0)), 4)
        0.6931
    """
    return 0.5 * torch.log1p(signal_power / noise_power)


def pair_r2(r_k: Tensor, r_j: Tensor, rho: Tensor) -> Tensor:
    """Share of a target's variance that two variables explain together (equation 9 for a pair).

    ``R2 = (r_k^2 + r_j^2 - 2 r_k r_j rho) / (1 - rho^2)``, and the better single share where the two
    variables are collinear to the arithmetic's resolution.

    Args:
        r_k: correlation of the first variable with the target.
        r_j: correlation of the second one, broadcast against ``r_k``.
        rho: correlation of the two variables, broadcast in the same way.

    Returns:
        R^2 in [max(r_k^2, r_j^2), 1].

    Example:
        >>> round(float(pair_r2(torch.tensor(0.6), torch.tensor(0.6), torch.tensor(0.0))), 4)
        0.72
    """
    single = torch.maximum(r_k.square(), r_j.square())
    residual = 1.0 - rho.square()
    joint = (r_k.square() + r_j.square() - 2.0 * r_k * r_j * rho) / residual.clamp_min(RESOLUTION)
    return torch.where(residual > 1e-9, torch.maximum(joint, single), single).clamp_max(1.0)
