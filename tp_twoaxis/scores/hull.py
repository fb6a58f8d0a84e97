"""Replaceability hulls: the few peers that can do a channel's work (paper, section 4.1 and appendix K.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.row_blocks import row_blocks
from tp_twoaxis.statistics.factorization import regularised_factor

# shares of the variance up to here are rounding: correlations of float64 are off by about 1e-16, their squares by less
UNEXPLAINED = 1e-24

# numbers of the candidates' correlation matrices that are worked on together
BLOCK_NUMBERS = 2**18


@dataclass(frozen=True)
class Hulls:
    """Greedy replaceability hulls of a layer's C channels.

    Attributes:
        size: [C] int64, |H_k|; 0 for a channel that no peer explains, a constant one among them.
        explanation: [C] in [0, 1], ``E_k(H_k)``, share of the channel's variance its hull predicts.
        pool_explanation: [C] in [0, 1], ``E_k`` of the whole candidate pool.
        path: [C, steps] in [0, 1], not decreasing: ``E_k`` of the first 1, 2, ... selected peers.
        peers: [C, steps] int64, the selected peers in the order of selection.
        singleton: [C] bool, |H_k| = 1: one peer does the work.
        saturated: [C] bool, the cap was hit before the hull was complete or just at it.

    A channel with ``size`` 0 has no hull: it is neither singleton nor saturated, and its ``explanation`` is 0.
    """

    size: Tensor
    explanation: Tensor
    pool_explanation: Tensor
    path: Tensor
    peers: Tensor
    singleton: Tensor
    saturated: Tensor


def greedy_hulls(
    correlation: Tensor,
    *,
    active: Tensor | None = None,
    pool: int = 32,
    max_size: int = 10,
    epsilon: float = 0.1,
    ridge: float = 1e-6,
) -> Hulls:
    """Select each channel's hull by greedy forward selection, all channels at once.

    Candidates are the ``pool`` most correlated peers (32 is ours; the paper restricts the pool without a
    number). Each step takes the peer that explains most of what is left, as in a pivoted Cholesky
    factorisation, so that ``E_k(P) = S_kP S_PP^-1 S_Pk / S_kk`` grows by one rank-one update. The hull is
    the shortest prefix with ``E_k >= (1 - epsilon) E_k(pool)``. Cost O(C^2 + C pool^3) time; memory beside the
    correlation O(C steps) and that of one block of channels, O(C + pool^2) each.

    Args:
        correlation: [C, C].
        active: [C] bool, channels that vary; the others are no candidates and have empty explanations.
        pool: candidates a channel.
        max_size: cap of the hull (paper: 10).
        epsilon: tolerated loss against the pool, in [0, 1); 0.1 is ours.
        ridge: added to every candidate's unit variance, dimensionless.

    Returns:
        :class:`Hulls`.

    Raises:
        TwoAxisError: a parameter is out of range.

    Example:
        >>> rho = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
        >>> hulls = greedy_hulls(rho)
        >>> hulls.size.tolist(), hulls.explanation.round(decimals=2).tolist()
        ([1, 1, 0], [0.81, 0.81, 0.0])
    """
    if pool < 1 or max_size < 1 or not 0.0 <= epsilon < 1.0 or ridge < 0.0:
        raise TwoAxisError(
            "expected pool >= 1, max_size >= 1, 0 <= epsilon < 1, ridge >= 0, got "
            f"{pool}, {max_size}, {epsilon}, {ridge}"
        )
    rho = correlation.double()
    count = len(rho)
    active = torch.ones(count, dtype=torch.bool, device=rho.device) if active is None else active
    pool = min(pool, count - 1)
    steps = min(max_size, pool)
    if pool == 0:
        none = rho.new_zeros(count)
        flags = torch.zeros(count, dtype=torch.bool, device=rho.device)
        empty = rho.new_zeros(count, 0)
        return Hulls(none.long(), none, none, empty, empty.long(), flags, flags)

    height = max(1, BLOCK_NUMBERS // pool**2)
    found = [_select(rho, rows, start, active, pool, steps, ridge) for start, rows in row_blocks(rho, height * count)]
    path, picks, pool_explanation = (torch.cat(parts) for parts in zip(*found, strict=True))
    enough = path >= (1.0 - epsilon) * pool_explanation[:, None]
    size = torch.where(enough.any(1), enough.long().argmax(1) + 1, steps)
    size = torch.where(pool_explanation > UNEXPLAINED, size, 0)
    explanation = torch.where(size > 0, path.gather(1, (size - 1).clamp_min(0)[:, None])[:, 0], 0.0)
    return Hulls(size, explanation, pool_explanation, path, picks, singleton=size == 1, saturated=size == max_size)


def _select(
    rho: Tensor, own: Tensor, start: int, active: Tensor, pool: int, steps: int, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Select peers for some channels, of which ``start`` is the first and ``own`` [n, C] the correlations.

    Returns:
        What the first 1, 2, ... selected peers explain [n, steps], these peers [n, steps], and what the whole pool
        explains [n].
    """
    rows = torch.arange(len(own), device=rho.device)
    strength = own.abs() * active
    strength.diagonal(start).fill_(-1.0)
    candidates = strength.topk(pool, dim=1).indices  # [n, pool]
    usable = active[candidates]
    inner = rho[candidates[:, :, None], candidates[:, None, :]]  # [n, pool, pool]
    inner.diagonal(dim1=1, dim2=2).add_(ridge)
    outer = own.gather(1, candidates) * usable * active[start : start + len(own), None]  # [n, pool]

    # constant candidates keep their unit diagonal and explain nothing: outer is 0 there
    solution = torch.linalg.solve(inner + 1e-12 * torch.eye(pool, dtype=rho.dtype, device=rho.device), outer)
    pool_explanation = (outer * solution).sum(1).clamp(0.0, 1.0)

    path = rho.new_empty(len(own), steps)
    picks = torch.empty(len(own), steps, dtype=torch.int64, device=rho.device)
    free = usable.clone()
    explained = rho.new_zeros(len(own))
    for step in range(steps):
        spread = inner.diagonal(dim1=1, dim2=2)
        gain = torch.where(free & (spread > 1e-9), outer.square() / spread.clamp_min(1e-9), -torch.ones_like(outer))
        best = gain.argmax(1)
        # without a free candidate nothing is gained, and nothing may be updated
        gained = gain[rows, best].clamp_min(0.0)
        explained = explained + gained
        path[:, step], picks[:, step] = explained, candidates[rows, best]
        column = torch.where((gained > 0)[:, None], inner[rows, :, best], torch.zeros_like(outer))  # [C, pool]
        pivot = spread[rows, best].clamp_min(1e-9)[:, None]
        outer = outer - column * (outer[rows, best][:, None] / pivot)
        inner = inner - column[:, :, None] * (column / pivot)[:, None, :]
        free[rows, best] = False
    path = path.clamp(0.0, 1.0)
    return path, picks, torch.maximum(pool_explanation, path[:, -1])


def full_explanation(correlation: Tensor, *, active: Tensor | None = None, ridge: float = 1e-6) -> Tensor:
    """Share of each channel that all its peers together predict, ``E_k = 1 - 1 / (S_kk [S^-1]_kk)``.

    Args:
        correlation: [C, C].
        active: [C] bool, channels that vary; the others get 0.
        ridge: added to the unit diagonal, dimensionless; with it E_k stays below ``1 - ridge``.

    Returns:
        [C] in [0, 1].

    Example:
        >>> rho = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
        >>> full_explanation(rho, ridge=0.0).round(decimals=2).tolist()
        [0.36, 0.36]
    """
    rho = correlation.double().clone()
    factor = regularised_factor(rho, ridge)
    rho.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(factor)
    explained = (1.0 - 1.0 / (inverse.diagonal() * rho.diagonal())).clamp(0.0, 1.0)
    return explained if active is None else explained * active
