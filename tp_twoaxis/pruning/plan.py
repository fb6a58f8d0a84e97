"""Scores and costs in, channels to remove out: one global threshold that meets a MACs target."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral

import numpy as np

from tp_twoaxis.dependency.cost import CostModel
from tp_twoaxis.errors import TwoAxisError, UnreachableTargetError, is_number
from tp_twoaxis.pruning.allocation_cost import AllocationCost, Levels
from tp_twoaxis.pruning.allocation_search import Allocation, nearest_allocation
from tp_twoaxis.pruning.portions import Bools, ScoredGroup, leaving_order, portions_of

# portions that may be taken back, one at a time, to look for a closer match in networks of few channels
BACK = 32


@dataclass(frozen=True)
class PruningPlan:
    """Which root channels of each group leave.

    Attributes:
        removed: group name -> [size] bool.
        macs: predicted MACs of one example after removal.
        target: MACs that were asked for.
        dense: MACs that the target is a share of.
        threshold: score of the last channel that the global order removed, or -inf.
        notes: why the target was not met more closely, if it was not.
    """

    removed: dict[str, Bools]
    macs: float
    target: float
    dense: float
    threshold: float
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Distance to the target, relative to it."""
        return abs(self.macs - self.target) / self.target


def make_plan(
    groups: list[ScoredGroup],
    cost: CostModel,
    *,
    flops: float,
    min_keep: float = 0.1,
    round_to: int | None = None,
    tolerance: float | None = 0.01,
    dense: float | None = None,
) -> PruningPlan:
    """Find the global threshold whose removal leaves ``flops`` of the MACs.

    All groups' channels are ordered by score (ties: by group, then by channel) and leave in that order,
    except below a group's floor. A group whose channels leave together loses channels in such
    portions, each when its last channel is passed. The cut is the prefix of that order nearest to the
    target. Where one removal is too coarse to come within a quarter of ``tolerance``, cheaper channels
    further up the order fill the gap. Where portions of ``round_to`` channels miss the target even so, groups exchange
    portions: of the allocations within ``tolerance`` that are found, the one is taken whose exchanged channels have
    scores nearest to the threshold.

    Args:
        groups: what may be removed; groups that are not listed stay whole.
        cost: MACs as a function of what is removed.
        flops: share of the dense MACs to keep, in (0, 1].
        min_keep: share of every group's channels that stays, in (0, 1]; at least one channel always does.
        round_to: keep a multiple of this many channels in every group that is touched.
        tolerance: relative distance to the target that counts as met. None is for a step on the way to a target, which
            need not be met itself: then the cut is the longest prefix that keeps at least ``flops``.
        dense: MACs that ``flops`` is a share of; default what ``cost`` predicts with nothing removed. Larger where
            earlier steps removed channels already.

    Returns:
        The plan; its MACs never rise when ``flops`` falls, up to the tolerance.

    Raises:
        TwoAxisError: an argument is out of range.
        UnreachableTargetError: the floors, the rounding and the untouched layers cost more than the target.

    Example:
        >>> from tp_twoaxis.dependency.cost import Side, Term
        >>> group = ScoredGroup("conv", np.array([3.0, 1.0, 2.0, 4.0]))
        >>> cost = CostModel([Term(100.0, (Side(4, {"conv": np.ones(4)}),))])
        >>> make_plan([group], cost, flops=0.5).removed["conv"].tolist()
        [False, True, True, False]
    """
    check_constraints(flops, min_keep, round_to, tolerance)
    dense = cost.dense if dense is None else dense
    target = flops * dense
    close = math.inf if tolerance is None else tolerance * target
    search = _Search(groups, cost, min_keep, round_to or 1, target, close)
    least = search.least()
    if least > target + close:
        raise UnreachableTargetError(
            f"flops={flops:g}: expected a target between {least / dense:.3f} and 1, the range that "
            f"min_keep={min_keep:g}{f', round_to={round_to}' if round_to else ''} and the layers left alone allow; "
            "lower min_keep, ignore fewer layers, or ask for more"
        )
    longest = search.longest_prefix()
    chosen = search.prefix(longest) if tolerance is None else search.nearest(longest)
    coarse = round_to or any(group.widths is not None for group in groups)
    if coarse and abs(search.macs(chosen) - target) > close:
        exchanged = search.exchange(longest)
        chosen = chosen if exchanged is None else exchanged
    removed = {group.name: own.mask(taken) for group, own, taken in zip(groups, search.portions, chosen, strict=True)}
    macs = cost.macs(removed)
    notes = []
    if abs(macs - target) > close:
        notes.append(missed_note(macs / dense, flops, cost.unit, coarse_reason(round_to)))
    return PruningPlan(removed, macs, target, dense, search.threshold(chosen), notes)


def least_share(
    groups: list[ScoredGroup], cost: CostModel, *, min_keep: float = 0.1, round_to: int | None = None
) -> float:
    """Give the share of the cost that is left when every group is at its floor; see :func:`make_plan`.

    Example:
        >>> from tp_twoaxis.dependency.cost import Side, Term
        >>> cost = CostModel([Term(90.0, (Side(4, {"conv": np.ones(4)}),)), Term(10.0, ())])
        >>> least_share([ScoredGroup("conv", np.arange(4.0))], cost, min_keep=0.5)
        0.55
    """
    return _Search(groups, cost, min_keep, round_to or 1, 0.0, math.inf).least() / cost.dense


def check_constraints(flops: float, min_keep: float, round_to: int | None, tolerance: float | None) -> None:
    """Check numbers before anything is computed from them; see :func:`make_plan`.

    Raises:
        TwoAxisError: one is out of range.

    Example:
        >>> check_constraints(0.5, 0.1, None, 0.01)
    """
    if not (is_number(flops) and 0.0 < flops <= 1.0):
        raise TwoAxisError(f"flops: expected the share of MACs to keep, in (0, 1], got {flops!r}")
    if not (is_number(min_keep) and 0.0 < min_keep <= 1.0):
        raise TwoAxisError(f"min_keep: expected a share in (0, 1], got {min_keep!r}")
    if round_to is not None and not (is_number(round_to, Integral) and round_to > 0):
        raise TwoAxisError(f"round_to: expected a positive whole number or None, got {round_to!r}")
    if tolerance is not None and not (is_number(tolerance) and tolerance > 0.0):
        raise TwoAxisError(f"tolerance: expected a positive relative distance, got {tolerance!r}")


def missed_note(kept: float, asked: float, unit: str, reason: str) -> str:
    """Say that a target was missed.

    Example:
        >>> missed_note(0.52, 0.5, "MACs", "heads are large")
        'kept 0.5200 of the MACs instead of 0.5: heads are large'
    """
    return f"kept {kept:.4f} of the {unit} instead of {asked:g}: {reason}"


def coarse_reason(round_to: int | None) -> str:
    """Say why a plan can miss its target, and what to do.

    Example:
        >>> coarse_reason(8)
        'no removal near the threshold lies closer, multiples of 8 channels are that coarse here; lower round_to'
    """
    portions, remedy = (
        (f"multiples of {round_to} channels", "lower round_to") if round_to else ("single channels", "lower min_keep")
    )
    return f"no removal near the threshold lies closer, {portions} are that coarse here; {remedy}"


class _Search:
    """The allocations of one problem, and which of them come close to its target."""

    def __init__(
        self, groups: list[ScoredGroup], cost: CostModel, min_keep: float, round_to: int, target: float, close: float
    ) -> None:
        self.portions = [portions_of(group, min_keep, round_to) for group in groups]
        self.order = leaving_order(self.portions)
        self.macs = AllocationCost(cost, [group.name for group in groups], self.portions).macs
        self.target, self.close = target, close

    def least(self) -> float:
        """Give the cost when all portions have left."""
        return self.macs(self.prefix(len(self.order)))

    def prefix(self, length: int) -> Levels:
        """Give the allocation after the first ``length`` portions of all."""
        return np.bincount(self.order[:length], minlength=len(self.portions))

    def longest_prefix(self) -> int:
        """Find the longest prefix that leaves at least the target."""
        low, high = 0, len(self.order)
        while low < high:
            middle = (low + high + 1) // 2
            if self.macs(self.prefix(middle)) >= self.target:
                low = middle
            else:
                high = middle - 1
        return low

    def nearest(self, longest: int) -> Levels:
        """Find the nearest among prefixes about as long as the longest above the target, their gaps filled or not."""
        chosen = self.prefix(longest)
        error = self.macs(chosen) - self.target
        if longest < len(self.order):
            after = self.prefix(longest + 1)
            if abs(self.macs(after) - self.target) < error:
                chosen, error = after, abs(self.macs(after) - self.target)
        for back in range(BACK + 1 if error > self.close / 4 else 0):
            # the prefix itself and then, while the target is missed, shorter ones that leave one group's last portion
            start = longest - back
            if start < 0 or (back and error <= self.close):
                break
            filled = self._fill(start, {int(self.order[start])} if back else set())
            if (found := abs(self.macs(filled) - self.target)) < error:
                chosen, error = filled, found
        return chosen

    def _fill(self, start: int, blocked: set[int]) -> Levels:
        """Go on from a prefix with affordable portions in order; a group whose portion overshoots is left alone."""
        levels = self.prefix(start)
        for group in self.order[start:].tolist():
            if group in blocked:
                continue
            levels[group] += 1
            macs = self.macs(levels)
            if macs < self.target - self.close / 4:
                levels[group] -= 1
                blocked.add(group)
            elif macs <= self.target + self.close / 4:
                break
        return levels

    def exchange(self, longest: int) -> Levels | None:
        """Let groups exchange portions around a prefix until the MACs come close; None where none are found."""
        if not len(self.order):
            return None
        start = self.prefix(longest)
        threshold = self.threshold(self.prefix(longest + 1))  # of the next portion, where there is one
        penalties = []
        for own in self.portions:
            apart = own.scores != threshold  # not so where both are infinite, whose difference is no number
            distance = np.abs(np.subtract(own.scores, threshold, out=np.zeros(len(own)), where=apart))
            penalties.append((distance * np.diff(own.gone)).tolist())

        def fits(allocation: Allocation) -> bool:
            return abs(self.macs(np.array(allocation)) - self.target) <= self.close

        found = nearest_allocation(tuple(start.tolist()), penalties, fits)
        return None if found is None else np.array(found)

    def threshold(self, levels: Levels) -> float:
        """Give the score of the last portion that left, or -inf."""
        taken = zip(self.portions, levels.tolist(), strict=True)
        return max((float(own.scores[level - 1]) for own, level in taken if level), default=-math.inf)
