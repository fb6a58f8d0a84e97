"""Channels that never vary leave before any other, whatever the score and the normaliser: the one place for that.

A constant channel tells nothing; a bias or BatchNorm of the layers that read it can stand for it. A score of it is a
number by convention, and so is what a normaliser makes of that number, so neither may decide about it. Criteria that
know activations (statistics of layers, or what consumers read) name a group's constant channels; those of weights and
gradients alone cannot, and rank them by their formula.

- Constant channels get a value below all others of their group (:func:`rank_first`), which is what Torch-Pruning's own
  pruners see. With a normaliser that gives no number below 0 it is below those of every group.
- The planner of :func:`~tp_twoaxis.prune_to_flops` takes their names beside the scores
  (:attr:`~tp_twoaxis.pruning.portions.ScoredGroup.constant`), and removes them first over all groups.
- Normalisers see the other channels alone (:func:`normalize_varying`): constant ones, however many, do not move them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tp_twoaxis.importance.normalize import Normalizer, normalize


def constant_roots(varying: list[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """Find the root channels that no layer of a group knows to vary.

    Args:
        varying: for each layer with statistics, which of its channels vary [n] bool, and their root positions [n].
        size: root channels.

    Returns:
        [size] bool: those that at least one layer speaks of, and that vary in none.

    Example:
        >>> one, two = torch.tensor([True, False, False]), torch.tensor([False, True])
        >>> constant_roots([(one, torch.tensor([0, 1, 2])), (two, torch.tensor([1, 2]))], 4).tolist()
        [False, True, False, False]
    """
    constant = torch.zeros(size, dtype=torch.bool)
    for _, roots in varying:
        constant[roots] = True
    for varies, roots in varying:
        constant[roots[varies]] = False
    return constant


def rank_first(scores: Tensor, constant: Tensor) -> Tensor:
    """Put constant channels below all others.

    Args:
        scores: [n] finite, larger keeps.
        constant: [n] bool.

    Returns:
        [n]; constant channels have the same number, below 0 and below every other by at least 1.

    Example:
        >>> rank_first(torch.tensor([0.5, 9.0, 2.0]), torch.tensor([False, True, False])).tolist()
        [0.5, -1.0, 2.0]
    """
    lowest = min(0.0, float(scores[~constant].min())) if not bool(constant.all()) else 0.0
    return torch.where(constant, lowest - max(1.0, abs(lowest)), scores)


def normalize_varying(scores: Tensor, constant: Tensor, normalizer: Normalizer) -> Tensor:
    """Normalise a group's scores among the channels that vary, and put the others first.

    Args:
        scores: [n] finite.
        constant: [n] bool.
        normalizer: see :func:`~tp_twoaxis.importance.normalize.normalize`.

    Returns:
        [n] finite.

    Example:
        >>> normalize_varying(torch.tensor([1.0, 7.0, 3.0]), torch.tensor([False, True, False]), "mean").tolist()
        [0.5, -1.0, 1.5]
    """
    normalized = torch.zeros_like(scores)
    if not bool(constant.all()):
        normalized[~constant] = normalize(scores[~constant], normalizer)
    return rank_first(normalized, constant) if bool(constant.any()) else normalized
