"""Target axis: what channels say about a task variable, alone and in pairs (Gaussian, in nats).

Correlations with the task come as [C], or as [C, K] for a task variable of K columns (one-vs-rest labels);
then every quantity is the mean over the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.row_blocks import row_blocks
from tp_twoaxis.scores.information import information_from_correlation, information_from_r2, pair_r2

PartnerRule = Literal["task-mi", "joint-mi", "excess", "random"]

PairFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the correlations of two channels with the task and with each other, which broadcast, to their quantity."""


def task_information(task_correlation: Tensor) -> Tensor:
    """Information of each pooled channel about the task, ``M_k = -1/2 ln(1 - rho_kT^2)`` (equation 3).

    Args:
        task_correlation: [C] or [C, K].

    Returns:
        [C] nats, not negative.

    Example:
        >>> [round(x, 4) for x in task_information(torch.tensor([0.0, 0.6])).tolist()]
        [0.0, 0.2231]
    """
    return information_from_correlation(_columns(task_correlation)).mean(1)


def target_redundancy(task_information: Tensor) -> Tensor:
    """Minimum-mutual-information redundancy with the peers, ``mean_{j != k} min(M_k, M_j)`` (equation 4).

    By lemma 1 it depends on the single channels' task information alone, never on channel-channel
    correlation.

    Args:
        task_information: [C] nats.

    Returns:
        [C] nats; 0 for a layer of one channel.

    Example:
        >>> target_redundancy(torch.tensor([0.0, 1.0, 3.0])).tolist()
        [0.0, 0.5, 0.5]
    """
    count = len(task_information)
    if count < 2:
        return torch.zeros_like(task_information)
    ordered, order = task_information.sort()
    below = ordered.cumsum(0) - ordered  # sum of the smaller ones; each larger peer contributes M_k itself
    above = torch.arange(count - 1, -1, -1, dtype=ordered.dtype, device=ordered.device)
    return torch.empty_like(ordered).scatter_(0, order, (below + above * ordered) / (count - 1))


def pair_information(task_correlation: Tensor, correlation: Tensor) -> Tensor:
    """Information of each pair of pooled channels about the task, ``M_kj = -1/2 ln(1 - R2_kj)`` (equation 9).

    Args:
        task_correlation: [C] or [C, K].
        correlation: [C, C] of the pooled channels.

    Returns:
        [C, C] nats, symmetric; the diagonal holds ``M_k``.

    Example:
        >>> pair_information(torch.tensor([0.6, 0.6]), torch.eye(2)).round(decimals=4).tolist()
        [[0.2231..., 0.6365...], [0.6365..., 0.2231...]]
    """
    pairs = _over_rows(_joint_information, task_correlation, correlation)
    return pairs.diagonal_scatter(task_information(task_correlation))


def pair_excess(task_correlation: Tensor, correlation: Tensor) -> Tensor:
    """What a pair says beyond its better half, ``max(0, M_kj - max(M_k, M_j))`` (equation 5).

    Args:
        task_correlation: [C] or [C, K].
        correlation: [C, C] of the pooled channels.

    Returns:
        [C, C] nats, not negative, symmetric, diagonal 0.

    Example:
        >>> pair_excess(torch.tensor([0.6, 0.6]), torch.eye(2)).round(decimals=4).tolist()
        [[0.0, 0.4133...], [0.4133..., 0.0]]
    """
    return _over_rows(_excess, task_correlation, correlation).fill_diagonal_(0.0)


def target_excess(
    task_correlation: Tensor,
    correlation: Tensor,
    *,
    partners: int = 10,
    rule: PartnerRule = "task-mi",
    seed: int = 0,
) -> Tensor:
    """Mean excess of each channel over its chosen partners (equation 5).

    The rules ``"task-mi"`` and ``"random"`` know the partners before any pair is looked at: O(C partners K) beside
    choosing them. The other two look at every pair, O(C^2 K).

    Args:
        task_correlation: [C] or [C, K].
        correlation: [C, C] of the pooled channels.
        partners: m, partners a channel; fewer when the layer has no more peers.
        rule: which peers are partners (paper, table 6): the most task-relevant (``"task-mi"``), those with
            the largest joint information (``"joint-mi"``) or excess (``"excess"``), or m at random from the
            2 m most task-relevant (``"random"``; the size of that pool is ours).
        seed: of the random rule.

    Returns:
        [C] nats, not negative; 0 for a layer of one channel.

    Raises:
        TwoAxisError: unknown rule, or no partners.

    Example:
        >>> target_excess(torch.tensor([0.6, 0.6]), torch.eye(2)).round(decimals=4).tolist()
        [0.4133..., 0.4133...]
    """
    if partners < 1:
        raise TwoAxisError(f"partners: expected at least 1, got {partners}")
    count = len(task_correlation)
    partners = min(partners, count - 1)
    if partners < 1:
        return task_correlation.new_zeros(count)
    if rule == "task-mi":
        chosen = _most_relevant(task_information(task_correlation), partners)
    elif rule == "random":
        pool = _most_relevant(task_information(task_correlation), min(2 * partners, count - 1))
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(count, count, generator=generator, dtype=torch.float64).to(pool.device)
        chosen = pool.gather(1, draw.gather(1, pool).topk(partners, dim=1).indices)
    elif rule in ("joint-mi", "excess"):
        function = pair_information if rule == "joint-mi" else pair_excess
        preference = function(task_correlation, correlation).fill_diagonal_(-torch.inf)
        chosen = preference.topk(partners, dim=1).indices
    else:
        raise TwoAxisError(f"rule: expected 'task-mi', 'joint-mi', 'excess' or 'random', got {rule!r}")
    return _over_columns(_excess, task_correlation, chosen, correlation.gather(1, chosen)).mean(1)


def _most_relevant(relevance: Tensor, count: int) -> Tensor:
    """Find the peers of highest relevance of every channel, [C, count] int64, highest first; equal ones in order."""
    order = relevance.argsort(descending=True, stable=True)
    best = order[: count + 1].expand(len(relevance), -1)
    own = best == torch.arange(len(relevance), device=relevance.device)[:, None]
    own[:, -1] |= ~own.any(1)  # a channel that is not among them leaves the last one out instead of itself
    return best[~own].reshape(len(relevance), count)


def _joint_information(r_k: Tensor, r_j: Tensor, rho: Tensor) -> Tensor:
    return information_from_r2(pair_r2(r_k, r_j, rho))


def _excess(r_k: Tensor, r_j: Tensor, rho: Tensor) -> Tensor:
    single = torch.maximum(information_from_correlation(r_k), information_from_correlation(r_j))
    return (_joint_information(r_k, r_j, rho) - single).clamp_min(0.0)


def _columns(task_correlation: Tensor) -> Tensor:
    return task_correlation[:, None] if task_correlation.ndim == 1 else task_correlation


def _over_rows(function: PairFunction, task_correlation: Tensor, correlation: Tensor) -> Tensor:
    """Mean over the task's columns of a quantity of all pairs, [C, C]."""
    peers = torch.arange(len(correlation), device=correlation.device)[None]
    pairs = torch.empty_like(correlation)
    for start, rows in row_blocks(correlation):
        pairs[start : start + len(rows)] = _over_columns(function, task_correlation, peers, rows, start)
    return pairs


def _over_columns(
    function: PairFunction, task_correlation: Tensor, peers: Tensor, correlation: Tensor, start: int = 0
) -> Tensor:
    """Mean over the task's columns of a quantity of some pairs, one column at a time.

    Args:
        function: of both correlations with the task and of the pair's, which broadcast.
        task_correlation: [C] or [C, K].
        peers: [n, m] int64, partners of n channels; [1, m] where all have the same.
        correlation: [n, m] with these.
        start: the first of these channels.

    Returns:
        [n, m].
    """
    columns = _columns(task_correlation)
    total = torch.zeros_like(correlation)
    for column in columns.unbind(1):
        total += function(column[start : start + len(correlation), None], column[peers], correlation)
    return total / columns.shape[1]
