"""Make the scores of different groups comparable, with Torch-Pruning's names for how.

One threshold over all groups removes the channels whose score, in the unit of their group, lies below it. So the unit
decides how many channels each group loses. Four things are wanted of it:

- **scale**: a group's scores times a positive number give the same values. Before a BatchNorm, and between layers of
  different inputs, scores have no common scale.
- **width**: duplicating every channel of a group leaves each channel's value as it was. The unit is then a function of
  the distribution of the scores, not of their number; a layer twice as wide of the same kind loses the same share.
- **one channel**: however large one channel's score is, the others' values move no more than the unit does from one
  score to the next. Behind a BatchNorm a channel's scale is arbitrary, so one of them must not decide about a layer.
- **spread**: scores that are all but equal give values that are all but equal. A layer without weak channels then loses
  none while others have weaker ones.

==================  =====  =====  ===========  ======
normaliser          scale  width  one channel  spread
==================  =====  =====  ===========  ======
``median``          yes    yes    yes          yes
``sentinel_0.5``    yes    yes    yes          yes
``mean``, ``max``   yes    yes    no           yes
``sum``             yes    no     no           yes
``lamp``            yes    no     no           no
``standarization``  yes    yes    no           no
``gaussian``        yes    no     no           no
``softmax``         no     yes    no           yes
``None``            no     yes    yes          yes
==================  =====  =====  ===========  ======

Scores that are weighted sums of z-scores have lost scale and spread before a normaliser sees them; see
:attr:`~tp_twoaxis.scores.named_scores.NamedScore.allocation`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError, check_name

Normalizer = str | Callable[[Tensor], Tensor] | None

_SIGNED = "'softmax', 'standarization', 'gaussian' or None"


NAMES = ("median", "mean", "sum", "max", "lamp", "softmax", "standarization", "gaussian")


def check_normalizer(normalizer: Normalizer) -> None:
    """Refuse a normaliser that is not there, before anything is computed.

    Raises:
        TwoAxisError: the name is unknown.

    Example:
        >>> check_normalizer("sentinel_0.5")
    """
    if normalizer is None or callable(normalizer) or _sentinel_share(normalizer) is not None:
        return
    check_name("normalizer", normalizer, NAMES, more=", 'sentinel_q' with 0 <= q < 1, None or a function")


def normalize(scores: Tensor, normalizer: Normalizer) -> Tensor:
    """Normalise a group's scores; a global threshold then decides the allocation between groups.

    Args:
        scores: [n] finite.
        normalizer: Torch-Pruning's values: ``"mean"``, ``"sum"``, ``"max"`` (divide by it), ``"lamp"`` (Lee
            et al. 2021: by the sum of the scores not smaller), ``"sentinel_q"`` (by the score at share q of
            the sorted ones), ``"standarization"`` (to [0, 1]), ``"gaussian"`` (mean 0, deviation 1),
            ``None``, or a function. Ours: ``"median"`` (by the median of the scores above 0) and ``"softmax"``
            (``e^x`` over its mean).

    Returns:
        [n] finite. Scores that are all 0 stay 0, but for ``"softmax"``, which makes them 1.

    Raises:
        TwoAxisError: the name is unknown, scores below 0 came to a normaliser that divides, or a function gave
            something else than one finite number a score.

    Example:
        >>> normalize(torch.tensor([1.0, 3.0]), "mean").tolist()
        [0.5, 1.5]
    """
    if normalizer is None:
        return scores
    if callable(normalizer):
        return _checked(normalizer(scores), scores)
    if normalizer == "standarization":
        return (scores - scores.min()) / (scores.max() - scores.min() + 1e-8)
    if normalizer == "softmax":  # of mean 1 instead of sum 1: wide groups do not lose by their width
        return scores.softmax(0) * len(scores)
    if normalizer == "gaussian":
        spread = scores.std() if len(scores) > 1 else torch.zeros((), dtype=scores.dtype)
        return (scores - scores.mean()) / (spread + 1e-8)
    divisor = _divisor(scores, normalizer)
    if bool((scores < 0).any()):
        raise TwoAxisError(
            f"normalizer {normalizer!r} divides and needs scores of at least 0, got {float(scores.min()):.3g}; "
            f"use {_SIGNED}"
        )
    return torch.where(
        divisor > 0, scores / divisor.clamp_min(torch.finfo(scores.dtype).tiny), torch.zeros_like(scores)
    )


def _checked(normalized: Tensor, scores: Tensor) -> Tensor:
    if normalized.shape != scores.shape or not bool(torch.isfinite(normalized).all()):
        got = "values that are not finite" if normalized.shape == scores.shape else f"shape {list(normalized.shape)}"
        raise TwoAxisError(f"normalizer: expected a function that returns {len(scores)} finite scores, got {got}")
    return normalized


def _divisor(scores: Tensor, normalizer: str) -> Tensor:
    if normalizer == "median":
        positive = scores[scores > 0]
        return positive.quantile(0.5) if len(positive) else scores.new_zeros(())
    if normalizer == "mean":
        return scores.mean()
    if normalizer == "sum":
        return scores.sum()
    if normalizer == "max":
        return scores.max()
    if normalizer == "lamp":
        ordered, order = scores.sort(stable=True)
        remaining = ordered.flip(0).cumsum(0).flip(0)
        return torch.empty_like(scores).scatter_(0, order, remaining)
    share = _sentinel_share(normalizer)
    if share is None:
        check_normalizer(normalizer)
        raise AssertionError(normalizer)
    return scores.sort().values[int(share * len(scores))] + 1e-8


def _sentinel_share(normalizer: str) -> float | None:
    try:
        share = float(normalizer.removeprefix("sentinel_"))
    except ValueError:
        return None
    return share if normalizer.startswith("sentinel_") and 0.0 <= share < 1.0 else None
