"""Scores of every group from any importance, ours or Torch-Pruning's, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from tp_twoaxis.dependency.graph import PrunableGroup, group_key
from tp_twoaxis.dependency.groups import root_size
from tp_twoaxis.errors import TwoAxisError, reason
from tp_twoaxis.pruning.portions import ScoredGroup


def score_groups(groups: list[PrunableGroup], importance: Callable[[Any], Any]) -> tuple[list[ScoredGroup], list[str]]:
    """Rank every group's channels; a group that the importance declines (None) is left whole.

    Where a group shares its root layer with another, an importance ranks the layer's channels of both, as with
    Torch-Pruning's pruners, unless it has an attribute ``own_channels_only`` that is true. One with a method
    ``constant_channels(group) -> [size] bool`` names those that leave before all others; a method
    ``prepare_groups(groups)`` is called with all groups before the first is ranked.

    Returns:
        The ranked groups, and a note on each declined one.

    Raises:
        TwoAxisError: the importance raised, or gave something else than one finite number a root channel.
    """
    scored, notes = [], []
    seen = [group.own if getattr(importance, "own_channels_only", False) else group.scored for group in groups]
    if hasattr(importance, "prepare_groups"):
        importance.prepare_groups(seen)
    for group, ranked in zip(groups, seen, strict=True):
        try:
            scores = importance(ranked)
        except TwoAxisError:
            raise
        except Exception as error:
            raise TwoAxisError(
                f"{type(importance).__name__} failed on the group of {group.name} ({reason(error)}); "
                "gradient-based importances need loss.backward() before, others their own preparation"
            ) from error
        if scores is None:
            notes.append(f"{group.name}: {type(importance).__name__} gave no scores, so the group stays whole")
            continue
        size = root_size(ranked)
        if not isinstance(scores, Tensor) or scores.shape != (size,):
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise TwoAxisError(
                f"{type(importance).__name__}: expected a tensor of {size} scores for the group of {group.name}, "
                f"got {got}"
            )
        values = scores.detach().double().cpu().numpy()
        if not np.isfinite(values).all():
            raise TwoAxisError(
                f"{type(importance).__name__}: expected finite scores for the group of {group.name}, "
                "got NaN or infinity"
            )
        place = {channel: position for position, channel in enumerate(ranked[0].idxs)}
        own = [place[channel] for channel in group.channels]
        known = importance.constant_channels(ranked).numpy() if hasattr(importance, "constant_channels") else None
        named = ScoredGroup(group_key(group), values[own], group.blocks, group.run, aligned=group.aligned)
        scored.append(named if known is None else replace(named, constant=known[own]))
    return scored, notes
