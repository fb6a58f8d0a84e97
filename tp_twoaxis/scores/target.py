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
from tp_twoaxis.scores.information import information_from_correlation, information_from_r2, pair_r2

PartnerRule = Literal["task-mi", "joint-mi", "excess", "random"]


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
    return _over_columns(lambda r: _pair(r, correlation), task_correlation)


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

    def excess(r: Tensor) -> Tensor:
        single = information_from_correlation(r)
        return (_pair(r, correlation) - torch.maximum(single[:, None], single)).clamp_min(0.0)

    return _over_columns(excess, task_correlation).fill_diagonal_(0.0)


def target_excess(
    task_correlation: Tensor,
    correlation: Tensor,
    *,
    partners: int = 10,
    rule: PartnerRule = "task-mi",
    seed: int = 0,
) -> Tensor:
    """Mean excess of each channel over its chosen partners (equation 5).

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
    excess = pair_excess(task_correlation, correlation)
    relevance = task_information(task_correlation).expand(count, count)
    if rule == "task-mi":
        preference = relevance
    elif rule == "joint-mi":
        preference = pair_information(task_correlation, correlation)
    elif rule == "excess":
        preference = excess
    elif rule == "random":
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(count, count, generator=generator, dtype=torch.float64).to(excess)
        pool = _without_self(relevance).topk(min(2 * partners, count - 1), dim=1).indices
        preference = torch.full_like(draw, -1.0).scatter(1, pool, draw.gather(1, pool))
    else:
        raise TwoAxisError(f"rule: expected 'task-mi', 'joint-mi', 'excess' or 'random', got {rule!r}")
    chosen = _without_self(preference).topk(partners, dim=1).indices
    return excess.gather(1, chosen).mean(1)


def _without_self(preference: Tensor) -> Tensor:
    return preference.clone().fill_diagonal_(-torch.inf)


def _pair(r: Tensor, correlation: Tensor) -> Tensor:
    joint = information_from_r2(pair_r2(r[:, None], r[None, :], correlation))
    return joint.diagonal_scatter(information_from_correlation(r))


def _columns(task_correlation: Tensor) -> Tensor:
    return task_correlation[:, None] if task_correlation.ndim == 1 else task_correlation


def _over_columns(function: Callable[[Tensor], Tensor], task_correlation: Tensor) -> Tensor:
    """Mean over the task's columns, one [C, C] at a time: a thousand classes do not fit side by side."""
    columns = _columns(task_correlation)
    total = function(columns[:, 0])
    for index in range(1, columns.shape[1]):
        total += function(columns[:, index])
    return total / columns.shape[1]
