"""How alike two rankings are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance import layer_score
from tp_twoaxis.scores.named_scores import Score, evaluate
from tp_twoaxis.statistics.resampling import LayerMixture, check_shards
from tp_twoaxis.statistics.store import CalibrationStatistics

# two channels can only agree or disagree
FEWEST_CHANNELS = 3


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation, row by row; tied values share the mean of their ranks.

    Args:
        a: [B, C].
        b: [B, C], or [1, C] to compare every row with.

    Returns:
        [B] in [-1, 1]; NaN where all values of either row are equal.

    Example:
        >>> rank_correlation(torch.tensor([[1.0, 2.0, 9.0], [3.0, 2.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0]])).tolist()
        [1.0, -1.0]
    """
    first, second = _centred_ranks(a), _centred_ranks(b)
    spread = (first.square().sum(1) * second.square().sum(1)).sqrt()
    return torch.where(spread > 0, (first * second).sum(1) / spread, torch.nan).clamp(-1.0, 1.0)


def _centred_ranks(values: Tensor) -> Tensor:
    ranks = torch.from_numpy(np.asarray(rankdata(values.numpy(), axis=1), dtype=np.float64))
    return ranks - ranks.mean(1, keepdim=True)


def lowest_overlap(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Share of the lowest channels of one ranking that are among the lowest of the other.

    Args:
        a: [B, C].
        b: [B, C] or [1, C].
        share: of the channels, rounded to at least one; of equal values the first channel is the lower.

    Returns:
        [B] in [0, 1]; rankings that have nothing to do with each other share about ``share``.

    Example:
        >>> lowest_overlap(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0, 3.0, 2.0, 4.0]]), 0.5).tolist()
        [0.5]
    """
    count = max(1, round(share * a.shape[1]))
    return (_lowest(a, count) & _lowest(b, count)).sum(1).double() / count


def _lowest(values: Tensor, count: int) -> Tensor:
    chosen = values.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, chosen, True)


def scores_of(score: Score, mixture: LayerMixture, weights: Tensor) -> Tensor:
    """Score a layer's channels on every multiset of shards.

    Args:
        score: layer statistics -> [C].
        mixture: the layer's.
        weights: [B, S] multiplicities.

    Returns:
        [B, C] float64.
    """
    return torch.stack([evaluate(score, layer) for layer in mixture.draw(weights)])


def chosen(
    shards: Sequence[CalibrationStatistics], score: str | Score, layers: Iterable[str] | None
) -> tuple[str, Score, list[str]]:
    """Check what a diagnostic was given.

    Returns:
        The score's name, the score, and the names of the layers.

    Raises:
        TwoAxisError: fewer than two shards or shards that do not belong together, an unknown score or layer; the
            message lists the valid names.
    """
    check_shards(shards)
    function = layer_score(score) if isinstance(score, str) else score
    name = score if isinstance(score, str) else getattr(score, "__name__", type(score).__name__)
    names = list(shards[0]) if layers is None else list(layers)
    if not names:
        raise TwoAxisError("layers: expected at least one layer name, got none; leave it out for all layers")
    for layer in names:
        shards[0][layer]
    return name, function, names
