"""Local axis: how much input a channel captures, and how much of it its same-layer peers carry too."""

from __future__ import annotations

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.row_blocks import row_blocks
from tp_twoaxis.scores.information import information_from_correlation, information_of_channel


def input_capture(variance: Tensor, noise_power: float | None = None) -> Tensor:
    """Information that each channel lets through, ``I_k = 1/2 ln(1 + P_k / s2)`` (equation 1).

    The signal power ``P_k = w_k' S_X w_k`` is the variance of the stored output, so no patch covariance
    is needed.

    Args:
        variance: [C] output variances, not negative; 0 marks a constant channel.
        noise_power: s2 > 0; default the layer's median positive variance.

    Returns:
        [C] nats, not negative; 0 for constant channels.

    Raises:
        TwoAxisError: ``noise_power`` is not positive.

    Example:
        >>> input_capture(torch.tensor([0.0, 1.0, 1.0, 3.0])).tolist()
        [0.0, 0.3465..., 0.3465..., 0.6931...]
    """
    if noise_power is None:
        return information_of_channel(relative_power(variance), 1.0)
    if not noise_power > 0:
        raise TwoAxisError(
            f"noise_power: expected a variance above 0, or None for the layer's median, got {noise_power}"
        )
    return information_of_channel(variance, noise_power)


def relative_power(variance: Tensor) -> Tensor:
    """Output variance over the layer's median, ``P_k / median P``: before a BatchNorm its raw scale has no meaning.

    The median is of the channels that vary; unlike their mean it does not hang on one of them.

    Args:
        variance: [C] output variances, not negative; 0 marks a constant channel.

    Returns:
        [C], not negative; 0 for constant channels.

    Example:
        >>> relative_power(torch.tensor([0.0, 2.0, 1.0, 4000.0])).tolist()
        [0.0, 1.0, 0.5, 2000.0]
    """
    positive = variance[variance > 0]
    return variance / positive.quantile(0.5) if len(positive) else torch.zeros_like(variance)


def rayleigh_quotient(variance: Tensor, weight_power: Tensor) -> Tensor:
    """Input variance along each channel's weight direction, ``RQ_k = w_k' S_X w_k / |w_k|^2`` (section 2.1).

    Args:
        variance: [C] output variances.
        weight_power: [C] squared weight norms.

    Returns:
        [C], not negative; 0 where the weights are 0.

    Example:
        >>> rayleigh_quotient(torch.tensor([2.0, 1.0]), torch.tensor([4.0, 0.0])).tolist()
        [0.5, 0.0]
    """
    return torch.where(weight_power > 0, variance / weight_power, torch.zeros_like(variance))


def pair_overlap(correlation: Tensor) -> Tensor:
    """Information that channels of a layer share in pairs, ``R_kj = -1/2 ln(1 - rho_kj^2)`` (equation 2).

    Args:
        correlation: [C, C].

    Returns:
        [C, C] nats, symmetric, diagonal 0.

    Example:
        >>> pair_overlap(torch.eye(2)).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """
    return information_from_correlation(correlation).fill_diagonal_(0.0)


def peer_overlap(correlation: Tensor, active: Tensor | None = None) -> Tensor:
    """Mean overlap of each channel with its peers, ``R_k = mean_{j != k} R_kj`` (equation 2).

    Args:
        correlation: [C, C].
        active: [C] bool, channels that vary; the others are nobody's peers. Default all.

    Returns:
        [C] nats, not negative; 0 for constant channels and for a channel without peers.

    Example:
        >>> rho = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
        >>> [round(x, 4) for x in peer_overlap(rho).tolist()]
        [0.5108, 0.5108]
    """
    weights = correlation.new_ones(len(correlation)) if active is None else active.to(correlation)
    sums = torch.empty_like(weights)
    for start, rows in row_blocks(correlation):
        overlap = information_from_correlation(rows)
        overlap.diagonal(start).fill_(0.0)
        sums[start : start + len(rows)] = (overlap * weights).sum(1)
    return sums * weights / (weights.sum() - weights).clamp_min(1.0)
