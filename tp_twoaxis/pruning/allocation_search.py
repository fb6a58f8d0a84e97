"""The allocation nearest to one threshold's that meets a target, where portions are too coarse for a threshold."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

SEARCHED = 4096
"""Allocations whose cost is looked at before the search gives up; with three groups of 16 portions that is all."""

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
    the order of their departure (uniform-cost search, Dijkstra 1959), so the first that fits is the nearest.

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
    waiting: list[tuple[float, int, Allocation]] = [(0.0, 0, start)]
    seen = {start}
    for _ in range(limit):
        if not waiting:
            return None
        departure, moves, allocation = heapq.heappop(waiting)
        if fits(allocation):
            return allocation
        for group, (level, home) in enumerate(zip(allocation, start, strict=True)):
            steps = []
            if level >= home and level < len(penalties[group]):
                steps.append((level + 1, penalties[group][level]))
            if level <= home and level > 0:
                steps.append((level - 1, penalties[group][level - 1]))
            for further, penalty in steps:
                neighbour = (*allocation[:group], further, *allocation[group + 1 :])
                if neighbour not in seen:
                    seen.add(neighbour)
                    heapq.heappush(waiting, (departure + penalty, moves + 1, neighbour))
    return None
