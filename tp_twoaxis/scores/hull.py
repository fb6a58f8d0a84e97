"""Replaceability hulls: the few peers that can do a channel's work (paper, section 4.1 and appendix K.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError, check_name
from tp_twoaxis.runtime.row_blocks import row_blocks
from tp_twoaxis.statistics.factorization import regularised_factor

Tolerance = Literal["factor", "difference"]
Reference = Literal["pool", "peers"]
TOLERANCES, REFERENCES = get_args(Tolerance), get_args(Reference)

# shares of the variance up to here are rounding: correlations of float64 are off by about 1e-16, their squares by less
UNEXPLAINED = 1e-24

# numbers of the candidates' correlation matrices that are worked on together
BLOCK_NUMBERS = 2**18


@dataclass(frozen=True)
class Hulls:
    """Greedy replaceability hulls of a layer's C channels.

    Attributes:
        size: [C] int64, |H_k|; 0 for a channel that needs no peer or that none explains, a constant one among them.
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


@dataclass(frozen=True)
class GreedyPeers:
    """Peers of a layer's C channels in the order of greedy selection, before it is said how many make a hull.

    Attributes:
        path: [C, steps] in [0, 1], not decreasing: ``E_k`` of the first 1, 2, ... selected peers.
        peers: [C, steps] int64, the selected peers.
        pool_explanation: [C] in [0, 1], ``E_k`` of the whole candidate pool.
        max_size: cap of a hull; there are fewer steps where a layer has fewer peers.
    """

    path: Tensor
    peers: Tensor
    pool_explanation: Tensor
    max_size: int

    def hulls(
        self, explanation: Tensor | None = None, *, epsilon: float = 0.1, tolerance: Tolerance = "factor"
    ) -> Hulls:
        """Stop each selection where little is missing.

        Args:
            explanation: [C] in [0, 1], the ``E_k`` that hulls are to reach; default that of the pool.
            epsilon: what may be missing, in [0, 1); 0.1 is ours.
            tolerance: ``"factor"``, ``E_k(H) >= (1 - epsilon) E_k``; or ``"difference"``,
                ``E_k(H) >= E_k - epsilon``, which no peer at all reaches where all together explain no more than
                epsilon: such a hull is empty. The paper's text does not say which.

        Raises:
            TwoAxisError: epsilon is out of range, or there is no such tolerance.

        Example:
            >>> rho = torch.tensor([[1.0, 0.9, 0.3], [0.9, 1.0, 0.2], [0.3, 0.2, 1.0]], dtype=torch.float64)
            >>> peers = select_peers(rho)
            >>> [peers.hulls(epsilon=0.2, tolerance=tolerance).size.tolist() for tolerance in ("factor", "difference")]
            [[1, 1, 2], [1, 1, 0]]
        """
        if not 0.0 <= epsilon < 1.0:
            raise TwoAxisError(f"epsilon: expected 0 <= epsilon < 1, got {epsilon}")
        check_name("tolerance", tolerance, TOLERANCES)
        whole = self.pool_explanation if explanation is None else explanation
        required = (1.0 - epsilon) * whole if tolerance == "factor" else whole - epsilon
        steps = self.path.shape[1]
        if steps == 0:
            flags = torch.zeros(len(self.path), dtype=torch.bool, device=self.path.device)
            none = self.path.new_zeros(len(self.path))
            return Hulls(none.long(), none, self.pool_explanation, self.path, self.peers, flags, flags)
        enough = self.path >= required[:, None]
        size = torch.where(enough.any(1), enough.long().argmax(1) + 1, steps)
        size = torch.where((required > UNEXPLAINED) & (self.pool_explanation > UNEXPLAINED), size, 0)
        reached = torch.where(size > 0, self.path.gather(1, (size - 1).clamp_min(0)[:, None])[:, 0], 0.0)
        saturated = size == self.max_size
        return Hulls(size, reached, self.pool_explanation, self.path, self.peers, size == 1, saturated)


def greedy_hulls(
    correlation: Tensor,
    *,
    active: Tensor | None = None,
    pool: int = 32,
    max_size: int = 10,
    epsilon: float = 0.1,
    tolerance: Tolerance = "factor",
    reference: Reference = "pool",
    ridge: float = 1e-6,
) -> Hulls:
    """Select each channel's hull: the first peers of :func:`select_peers` that explain nearly what many do.

    Args:
        correlation: [C, C].
        active: [C] bool, channels that vary; the others are no candidates and have empty explanations.
        pool: candidates a channel.
        max_size: cap of the hull (paper: 10).
        epsilon: what may be missing, in [0, 1); 0.1 is ours.
        tolerance: whether epsilon is a ``"factor"`` or a ``"difference"``; see :meth:`GreedyPeers.hulls`.
        reference: what hulls are compared with: ``"pool"``, as the paper's lesions do; or ``"peers"``, all of them, as
            its profiles by depth do, whose hulls are selected from the pool all the same (appendix A).
        ridge: added to every candidate's unit variance, dimensionless.

    Returns:
        :class:`Hulls`.

    Raises:
        TwoAxisError: a parameter is out of range, or an unknown name.

    Example:
        >>> rho = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
        >>> hulls = greedy_hulls(rho)
        >>> hulls.size.tolist(), hulls.explanation.round(decimals=2).tolist()
        ([1, 1, 0], [0.81, 0.81, 0.0])
    """
    check_name("reference", reference, REFERENCES)
    selected = select_peers(correlation, active=active, pool=pool, max_size=max_size, ridge=ridge)
    whole = full_explanation(correlation, active=active, ridge=ridge) if reference == "peers" else None
    return selected.hulls(whole, epsilon=epsilon, tolerance=tolerance)


def select_peers(
    correlation: Tensor, *, active: Tensor | None = None, pool: int = 32, max_size: int = 10, ridge: float = 1e-6
) -> GreedyPeers:
    """Select each channel's peers by greedy forward selection, all channels at once.

    Candidates are the ``pool`` most correlated peers (32 is ours; the paper restricts the pool without a
    number). Each step takes the peer that explains most of what is left, as in a pivoted Cholesky
    factorisation, so that ``E_k(P) = S_kP S_PP^-1 S_Pk / S_kk`` grows by one rank-one update. Cost O(C^2 + C pool^3)
    time; memory beside the correlation O(C steps) and that of one block of channels, O(C + pool^2) each.

    Args:
        correlation: [C, C].
        active: [C] bool, channels that vary; the others are no candidates and have empty explanations.
        pool: candidates a channel.
        max_size: select at most so many.
        ridge: added to every candidate's unit variance, dimensionless.

    Returns:
        :class:`GreedyPeers`.

    Raises:
        TwoAxisError: a parameter is out of range.

    Example:
        >>> rho = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.2], [0.0, 0.2, 1.0]], dtype=torch.float64)
        >>> select_peers(rho).peers.tolist()
        [[1, 2], [0, 2], [1, 0]]
    """
    if pool < 1 or max_size < 1 or ridge < 0.0:
        raise TwoAxisError(f"expected pool >= 1, max_size >= 1, ridge >= 0, got {pool}, {max_size}, {ridge}")
    rho = correlation.double()
    count = len(rho)
    active = torch.ones(count, dtype=torch.bool, device=rho.device) if active is None else active
    pool = min(pool, count - 1)
    if pool == 0:
        empty = rho.new_zeros(count, 0)
        return GreedyPeers(empty, empty.long(), rho.new_zeros(count), max_size)
    steps = min(max_size, pool)
    height = max(1, BLOCK_NUMBERS // pool**2)
    found = [_select(rho, rows, start, active, pool, steps, ridge) for start, rows in row_blocks(rho, height * count)]
    path, picks, pool_explanation = (torch.cat(parts) for parts in zip(*found, strict=True))
    return GreedyPeers(path, picks, pool_explanation, max_size)


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
    """Share of each channel that all its peers together predict, ``E_k = S_kP S_PP^-1 S_Pk / S_kk``.

    All come from one inverse: with unit variances and a ridge r, ``E_k = 1 + r - 1 / [(S + r I)^-1]_kk``.

    Args:
        correlation: [C, C].
        active: [C] bool, channels that vary; the others get 0.
        ridge: added to every peer's unit variance, dimensionless.

    Returns:
        [C] in [0, 1].

    Example:
        >>> rho = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
        >>> full_explanation(rho, ridge=0.0).round(decimals=2).tolist()
        [0.36, 0.36]
    """
    inverse = torch.cholesky_inverse(regularised_factor(correlation.double(), ridge))
    explained = (1.0 + ridge - 1.0 / inverse.diagonal()).clamp(0.0, 1.0)
    return explained if active is None else explained * active
