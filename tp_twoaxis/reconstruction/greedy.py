"""Error of a group's consumers as its channels are removed one by one, each time with the best reconstruction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.reconstruction.affine import ridge_factor


@dataclass(frozen=True)
class Reading:
    """Second moments and weight of one consumer of a group's channels.

    Attributes:
        covariance: [C_in, C_in], of all of the layer's inputs; or [C_in taps, C_in taps] of its patches, channel by
            channel.
        weight: [M, C_in], its weight with outputs and taps in one dimension; [M, C_in taps] for patches.
        channels: [n] int64, inputs that belong to the group.
        roots: [n] int64, the group's channel behind each of them.
        power: > 0, summed variance of the layer's outputs; errors are relative to it.
        taps: columns of a channel; they are removed together.
    """

    covariance: Tensor
    weight: Tensor
    channels: Tensor
    roots: Tensor
    power: float
    taps: int = 1


def greedy_reconstruction(readings: list[Reading], size: int, *, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Remove a group's channels one at a time, each time the one whose removal costs its consumers the least error.

    When channel k is removed, every consumer's weights on the remaining channels are updated by least squares. The
    variance of its outputs' error then rises by ``|w_k|^2 / [S^-1]_kk``: the part of the channel that the others
    cannot predict, its Schur complement, times the squared weights on it; for patches, ``tr(W_k [S^-1]_kk^-1 W_k')``
    with the block of the channel's taps. Weights and inverse are then updated, so later channels are judged given those
    already removed (the optimal brain surgeon of Hassibi and Stork 1993, channel by channel; ZipLM, Kurtic et al. 2023,
    does so for transformers). Without patches the taps of a kernel count as if their errors were uncorrelated; errors
    of several consumers add up.

    Cost: O(size (C_in^2 + M C_in)) for each consumer, ``taps`` times for patches, with C_in taps for C_in. A score that
    looks at each channel once, like ``hull``, is O(C^2) but takes channels to be replaceable by peers that may be
    removed themselves.

    Args:
        readings: consumers of the group; at least one.
        size: channels of the group.
        ridge: relative to the mean variance of a layer's inputs, > 0.

    Returns:
        Channels in the order of their removal, [size] int64, and the error that the removal of each adds,
        [size] float64, dimensionless; their sum is the whole error.

    Raises:
        TwoAxisError: the group has no consumer, or the ridge is not positive.

    Example:
        >>> twins = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.5]]).double()
        >>> reading = Reading(twins, torch.ones(1, 3).double(), torch.arange(3), torch.arange(3), 4.5)
        >>> order, errors = greedy_reconstruction([reading], 3, ridge=1e-9)
        >>> order.tolist(), errors.round(decimals=3).tolist()  # a twin first; then the weaker; the other twin last
        ([0, 2, 1], [0.0, 0.111, 0.889])
    """
    if not readings or not ridge > 0.0:
        raise TwoAxisError(f"expected at least one reading and ridge > 0, got {len(readings)} and {ridge}")
    states = []
    for reading in readings:
        covariance = reading.covariance.double()
        factor = ridge_factor(covariance, ridge)
        inverse = torch.eye(len(covariance)).to(covariance) if factor is None else torch.cholesky_inverse(factor)
        states.append((reading, inverse, reading.weight.double().clone()))
    errors, order = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
    remaining = torch.ones(size, dtype=torch.bool)
    for step in range(size):
        total = torch.zeros(size, dtype=torch.float64)
        for reading, inverse, weight in states:
            own, taps = reading.channels, reading.taps
            width = len(inverse) // taps
            index = torch.arange(width, device=inverse.device)[own]
            blocks = inverse.reshape(width, taps, width, taps)[index, :, index]  # [n, taps, taps]
            parts = weight.reshape(-1, width, taps)[:, own].permute(1, 2, 0)  # [n, taps, M]
            increase = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2)) / reading.power
            total.index_add_(0, reading.roots, increase.cpu())
        total[~remaining] = math.inf
        cheapest = int(total.argmin())
        order[step], errors[step] = cheapest, total[cheapest]
        remaining[cheapest] = False
        for reading, inverse, weight in states:
            for channel in reading.channels[reading.roots == cheapest].tolist():
                _eliminate(inverse, weight, slice(channel * reading.taps, (channel + 1) * reading.taps))
    return order, errors


def _eliminate(inverse: Tensor, weight: Tensor, block: slice) -> None:
    """Remove a block of inputs in place: update the weights by least squares, and the inverse by a Schur complement."""
    rows = torch.linalg.solve(inverse[block, block], inverse[block])  # [taps, C_in taps]
    weight -= weight[:, block] @ rows
    weight[:, block] = 0.0
    inverse -= inverse[:, block] @ rows
    # a removed input has no weight, and a variance that divides nothing
    inverse[:, block] = 0.0
    inverse[block] = 0.0
    inverse[block, block] = torch.eye(len(rows)).to(inverse)
