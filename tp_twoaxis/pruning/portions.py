"""What leaves a group of coupled channels first, and in which portions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tp_twoaxis.errors import TwoAxisError

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScoredGroup:
    """A group of coupled channels that leave together, and what each is worth.

    Attributes:
        name: the root layer's name.
        scores: [size] importance, larger keeps; comparable with other groups' (already normalised).
        blocks: channels come in this many equally long blocks that must stay equally long (grouped convolutions,
            GroupNorm, heads): one of every block leaves at a time, ranked by their mean score.
        aligned: they are at the same place in every block, as grouped convolutions want it; else every block loses
            the lowest of its own.
        run: channels leave in runs of this many neighbours (the channels of an attention head), ranked by
            their mean score.
        width: channels that it had before earlier steps of pruning, of which floors are shares; default its own number.
        widths: numbers of channels that it may keep once it loses any; default all that its blocks allow.
        constant: [size] bool, channels that never vary: where all of a portion are, it comes before any other portion.
    """

    name: str
    scores: Floats
    blocks: int = 1
    run: int = 1
    width: int | None = None
    aligned: bool = True
    constant: Bools | None = None
    widths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Portions:
    """The admissible removals from a group: after none, one, two ... portions, lowest scores first.

    Attributes:
        order: [size] int64, the group's channels in the order in which they leave.
        gone: [portions + 1] int64, how many have left after so many portions; rises from 0.
        scores: [portions], the score at which each portion leaves, which is its last channel's; never falls.
    """

    order: Ints
    gone: Ints
    scores: Floats

    def __len__(self) -> int:
        return len(self.scores)

    def mask(self, taken: int) -> Bools:
        """Give the channels that the first so many portions hold, [size] bool."""
        mask = np.zeros(len(self.order), dtype=bool)
        mask[self.order[: self.gone[taken]]] = True
        return mask


def portions_of(group: ScoredGroup, min_keep: float, round_to: int) -> Portions:
    """Order a group's channels and cut them into portions.

    Args:
        group: the group.
        min_keep: share of its width that stays; at least one channel always does.
        round_to: it keeps a multiple of this many channels, once it loses any.

    Raises:
        TwoAxisError: the channels do not split into the group's blocks of runs.

    Example:
        >>> portions = portions_of(ScoredGroup("conv", np.array([3.0, 1.0, 2.0, 4.0])), min_keep=0.5, round_to=1)
        >>> portions.scores.tolist(), portions.mask(1).tolist()
        ([1.0, 2.0], [False, True, False, False])
    """
    size, together = len(group.scores), group.blocks * group.run
    if size % together:
        raise TwoAxisError(
            f"{group.name}: {size} channels do not split into {group.blocks} blocks of runs of {group.run}"
        )
    shape = (group.blocks, -1, group.run)
    scores, members = group.scores.reshape(shape).mean(2), np.arange(size).reshape(shape)
    constant = np.zeros(size, dtype=bool) if group.constant is None else group.constant
    if not group.aligned:
        own = np.lexsort((scores, ~constant.reshape(shape).all(2)), axis=1)
        scores, members = np.take_along_axis(scores, own, 1), np.take_along_axis(members, own[..., None], 1)
    unit_scores = np.where(constant[members].all((0, 2)), -np.inf, scores.mean(0))
    units = np.argsort(unit_scores, kind="stable")
    floor = max(1, math.ceil(min_keep * (group.width or size)))
    kept = np.arange(size - together, floor - 1, -together)
    kept = kept[kept % round_to == 0]
    leaving = size - (kept if group.widths is None else kept[np.isin(kept, group.widths)])
    return Portions(
        members[:, units].swapaxes(0, 1).reshape(-1),
        np.concatenate([[0], leaving]).astype(np.int64),
        unit_scores[units[leaving // together - 1]],
    )


def leaving_order(portions: list[Portions]) -> Ints:
    """Order the portions of all groups by the score at which they leave; equal ones by group.

    Returns:
        [all portions] int64, the group that loses its next portion.

    Example:
        >>> groups = [ScoredGroup("a", np.array([1.0, 3.0, 9.0])), ScoredGroup("b", np.array([2.0, 9.0]))]
        >>> leaving_order([portions_of(group, 0.1, 1) for group in groups]).tolist()
        [0, 1, 0]
    """
    if not portions:
        return np.zeros(0, dtype=np.int64)
    groups = np.repeat(np.arange(len(portions)), [len(own) for own in portions])
    # the sort is stable, and a group's scores never fall: its portions stay in their order
    order: Ints = groups[np.argsort(np.concatenate([own.scores for own in portions]), kind="stable")]
    return order
