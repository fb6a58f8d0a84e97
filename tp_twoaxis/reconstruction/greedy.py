"""Error of a group's consumers as its channels are removed one by one, each time with the best reconstruction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.reconstruction.affine import ridge_factor

# a group of more channels than this loses several in a round, picked one by one from a pool of so many times as many
ROUNDS, POOL = 64, 4


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

    Wide groups lose a 64th of their channels at a time, picked one by one from four times as many, those that cost the
    least when all others are there (ours): every error is exact, and a channel outside of the pool could only be the
    cheapest if its cost fell while others left, which it rarely does.

    A channel that left never comes back. Exchanges of one that left for one that stays, as long as any lowers the error
    (OSSCAR, Meng et al. 2024), change 16 of 36 sets of two CIFAR-10 ResNet-20s and lower the error on other images by
    0.3 % in the mean (``benchmarks/channel_exchanges.py``), so there are none.

    Cost: O(C_in^3) for each consumer, with C_in taps for C_in where it has patches. A score that looks at each channel
    once, like ``hull``, is O(C^2) but takes channels to be replaceable by peers that may be removed themselves.

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
    states = [_State.of(reading, ridge) for reading in readings]
    removed: list[int] = []
    errors: list[float] = []
    together = -(-size // ROUNDS)
    while len(removed) < size:
        picked, outside = states, torch.tensor(removed, dtype=torch.int64)
        if together > 1:
            ascending = _costs(states, size, outside).argsort(stable=True)
            pool = ascending[: POOL * together]
            picked, outside = [state.restricted_to(pool) for state in states], ascending[POOL * together :]
        first = len(removed)
        while len(removed) < min(first + together, size):
            costs = _costs(picked, size, torch.cat([outside, torch.tensor(removed, dtype=torch.int64)]))
            cheapest = int(costs.argmin())
            removed.append(cheapest)
            errors.append(float(costs[cheapest]))
            for state in picked:
                state.remove([cheapest])
        if together > 1:
            for state in states:
                state.remove(removed[first:])
    return torch.tensor(removed, dtype=torch.int64), torch.tensor(errors, dtype=torch.float64)


@dataclass
class _State:
    """A consumer without the channels removed so far: inverse covariance [n, n] and weight [M, n], float64.

    Channels and taps are those of :class:`Reading`.
    """

    inverse: Tensor
    weight: Tensor
    channels: Tensor
    roots: Tensor
    power: float
    taps: int

    @classmethod
    def of(cls, reading: Reading, ridge: float) -> _State:
        covariance, weight = reading.covariance.double(), reading.weight.double()
        factor = ridge_factor(covariance, ridge)
        inverse = torch.eye(len(covariance)).to(covariance) if factor is None else torch.cholesky_inverse(factor)
        # errors depend on W'W alone
        weight = torch.linalg.qr(weight, mode="r").R if len(weight) > weight.shape[1] else weight.clone()
        return cls(inverse, weight, reading.channels, reading.roots, reading.power, reading.taps)

    def costs(self) -> Tensor:
        """Error that the removal of each of the group's inputs would add, [n] float64."""
        taps, width = self.taps, len(self.inverse) // self.taps
        own = self.channels.to(self.inverse.device)
        if taps == 1:
            return (self.weight[:, own].square().sum(0) / self.inverse.diagonal()[own]).cpu() / self.power
        blocks = self.inverse.reshape(width, taps, width, taps)[own, :, own]  # [n, taps, taps]
        parts = self.weight.reshape(-1, width, taps)[:, own].permute(1, 2, 0)  # [n, taps, M]
        increase: Tensor = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
        return increase.cpu() / self.power

    def restricted_to(self, roots: Tensor) -> _State:
        """Copy the part of the state that is about some of the group's channels."""
        mine = torch.isin(self.roots, roots)
        columns = self._columns(self.channels[mine])
        inverse, weight = self.inverse[columns][:, columns], self.weight[:, columns]
        renumbered = torch.arange(int(mine.sum()))
        return _State(inverse, weight, renumbered, self.roots[mine], self.power, self.taps)

    def remove(self, roots: list[int]) -> None:
        """Remove channels of the group in place: weights by least squares, the inverse by a Schur complement."""
        columns = self._columns(self.channels[torch.isin(self.roots, torch.tensor(roots))])
        if not len(columns):
            return
        inverse, weight, rows = self.inverse, self.weight, self.inverse[columns]
        block = rows[:, columns]
        rows = rows / block if len(columns) == 1 else torch.linalg.solve(block, rows)  # [removed, n]
        weight -= weight[:, columns] @ rows
        weight[:, columns] = 0.0
        inverse -= inverse[:, columns] @ rows
        # a removed input has no weight, and a variance that divides nothing
        inverse[:, columns] = 0.0
        inverse[columns] = 0.0
        inverse[columns, columns] = 1.0

    def _columns(self, channels: Tensor) -> Tensor:
        """Columns of some channels, each with its taps."""
        return (channels[:, None] * self.taps + torch.arange(self.taps)).flatten().to(self.inverse.device)


def _costs(states: list[_State], size: int, excluded: Tensor) -> Tensor:
    """Error that the removal of each channel would add to all consumers, [size] float64; infinite for some."""
    total = torch.zeros(size, dtype=torch.float64)
    for state in states:
        total.index_add_(0, state.roots, state.costs())
    total[excluded] = math.inf
    return total
