"""The allocation nearest to one threshold's that meets a target, where portions are too coarse for a threshold."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import accumulate

SEARCHED = 4096
"""Allocations whose cost is looked at before the search gives up; with three groups of 15 portions that is all."""

Allocation = tuple[int, ...]
"""Portions that leave each group, lowest scores first."""


def nearest_allocation(
    start: Allocation,
    penalties: Sequence[Sequence[float]],
    fits: Callable[[Allocation], bool],
    *,
    limit: int = SEARCHED,
) -> Allocation | None:
    """Find the fitting allocation that departs least from a given one.

    A departure is the sum of the penalties of the portions that it takes or gives back. Allocations are looked at in
    the order of their departure, each once, so the first that fits is the nearest: a heap holds those that come next,
    at most three for every one looked at, each with one group moved further, or the next group moved too or instead,
    the groups in the order of what their least move costs.

    Args:
        start: the allocation to depart from, as a rule that of one threshold.
        penalties: for each group, of every portion that could leave it, what moving it costs, 0 or more: how far its
            score is from the threshold.
        fits: whether an allocation is wanted, for example within the tolerance of a target.
        limit: how many allocations may be looked at.

    Returns:
        The allocation, or None where no such one is among the nearest ``limit``.

    Example:
        >>> nearest_allocation((1, 1), [[0.3, 0.1, 0.2], [0.4, 0.9]], lambda portions: sum(portions) == 3)
        (2, 1)
    """
    moves = []  # of each group that can: what it costs to have a level, and the level; the present one first
    for group, (home, own) in enumerate(zip(start, penalties, strict=True)):
        below, above = accumulate(own[:home][::-1], initial=0.0), accumulate(own[home:], initial=0.0)
        costs = [*list(below)[:0:-1], *above]
        ranked = sorted((cost, abs(level - home), level) for level, cost in enumerate(costs))
        moves.append([(cost, group, level) for cost, _, level in ranked])
    moves = sorted((own for own in moves if len(own) > 1), key=lambda own: own[1])
    waiting: list[tuple[float, tuple[tuple[int, int], ...]]] = [(0.0, ())]

    def push(*moved: tuple[int, int]) -> None:
        place, rank = moved[-1]
        if place < len(moves) and rank < len(moves[place]):
            heapq.heappush(waiting, (sum(moves[place][rank][0] for place, rank in moved), moved))

    for _ in range(limit):
        if not waiting:
            return None
        _, moved = heapq.heappop(waiting)
        levels = {moves[place][rank][1]: moves[place][rank][2] for place, rank in moved}
        allocation = tuple(levels.get(group, home) for group, home in enumerate(start))
        if fits(allocation):
            return allocation
        if not moved:
            push((0, 1))
            continue
        *others, (place, rank) = moved
        push(*others, (place, rank + 1))
        push(*moved, (place + 1, 1))
        if rank == 1:
            push(*others, (place + 1, 1))
    return None
