"""Scores and costs in, channels to remove out: one global threshold that meets a MACs target."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np
import numpy.typing as npt

from tp_twoaxis.dependency.cost import CostModel
from tp_twoaxis.errors import TwoAxisError, UnreachableTargetError
from tp_twoaxis.pruning.allocation_search import Allocation, nearest_allocation

# cuts that may be taken back, one at a time, to look for a closer match in networks of few channels
BACK = 32

Bools = npt.NDArray[np.bool_]


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
        constant: [size] bool, channels that never vary: where all of a cut are, it comes before any other cut.
    """

    name: str
    scores: npt.NDArray[np.float64]
    blocks: int = 1
    run: int = 1
    width: int | None = None
    aligned: bool = True
    constant: Bools | None = None


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


@dataclass(frozen=True)
class _Event:
    """The next admissible cut of a group: these channels leave when the threshold passes ``score``."""

    score: float
    group: int
    step: int
    channels: npt.NDArray[np.int64]


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
    events = _events(groups, min_keep, round_to or 1)

    def state_after(chosen: list[_Event]) -> dict[str, Bools]:
        state = {group.name: np.zeros(len(group.scores), dtype=bool) for group in groups}
        for event in chosen:
            state[groups[event.group].name][event.channels] = True
        return state

    def macs_after(chosen: list[_Event]) -> float:
        return cost.macs(state_after(chosen))

    least = macs_after(events)
    close = math.inf if tolerance is None else tolerance * target
    if least > target + close:
        raise UnreachableTargetError(
            f"flops={flops:g}: expected a target between {least / dense:.3f} and 1, the range that "
            f"min_keep={min_keep:g}{f', round_to={round_to}' if round_to else ''} and the layers left alone allow; "
            "lower min_keep, ignore fewer layers, or ask for more"
        )
    low, high = 0, len(events)  # macs(low) >= target > macs(high), or the end of the list
    while low < high:
        middle = (low + high + 1) // 2
        if macs_after(events[:middle]) >= target:
            low = middle
        else:
            high = middle - 1
    before = events[:low]
    chosen = before
    error = macs_after(before) - target
    if low < len(events) and tolerance is not None:
        after = events[: low + 1]
        if abs(macs_after(after) - target) < error:
            chosen, error = after, abs(macs_after(after) - target)
    for back in range(BACK + 1 if error > close / 4 else 0):
        # the cut itself and then, while the target is missed, earlier ones that leave one group's last channel
        start = low - back
        if start < 0 or (back and error <= close):
            break
        blocked = {events[start].group} if back else set()
        filled = events[:start] + _fill(
            groups, cost, state_after(events[:start]), events[start:], target, close / 4, blocked
        )
        if abs(macs_after(filled) - target) < error:
            chosen, error = filled, abs(macs_after(filled) - target)
    if round_to and error > close:
        chosen = _exchange(groups, cost, events, low, target, close) or chosen
    removed = state_after(chosen)
    macs = cost.macs(removed)
    notes = []
    if abs(macs - target) > close:
        notes.append(missed_note(macs / dense, flops, cost.unit, coarse_reason(round_to)))
    threshold = max((event.score for event in chosen), default=-math.inf)
    return PruningPlan(removed, macs, target, dense, threshold, notes)


def check_constraints(flops: float, min_keep: float, round_to: int | None, tolerance: float | None) -> None:
    """Check numbers before anything is computed from them; see :func:`make_plan`.

    Raises:
        TwoAxisError: one is out of range.

    Example:
        >>> check_constraints(0.5, 0.1, None, 0.01)
    """
    if not (_is_number(flops) and 0.0 < flops <= 1.0):
        raise TwoAxisError(f"flops: expected the share of MACs to keep, in (0, 1], got {flops!r}")
    if not (_is_number(min_keep) and 0.0 < min_keep <= 1.0):
        raise TwoAxisError(f"min_keep: expected a share in (0, 1], got {min_keep!r}")
    if round_to is not None and not (_is_number(round_to, Integral) and round_to > 0):
        raise TwoAxisError(f"round_to: expected a positive whole number or None, got {round_to!r}")
    if tolerance is not None and not (_is_number(tolerance) and tolerance > 0.0):
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


def _is_number(value: object, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _events(groups: list[ScoredGroup], min_keep: float, round_to: int) -> list[_Event]:
    """Order all admissible cuts by the score at which they happen."""
    events = []
    for index, group in enumerate(groups):
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
        order = np.argsort(unit_scores, kind="stable")
        floor = max(1, math.ceil(min_keep * (group.width or size)))
        removed_units = 0
        for kept in range(size - together, floor - 1, -together):
            if kept % round_to == 0 and kept > 0:
                units = (size - kept) // together
                cut = order[removed_units:units]
                events.append(_Event(float(unit_scores[cut[-1]]), index, units, np.sort(members[:, cut].reshape(-1))))
                removed_units = units
    # a later cut of a group never comes before an earlier one: within a group scores ascend with the step
    return sorted(events, key=lambda event: (event.score, event.group, event.step))


def _exchange(
    groups: list[ScoredGroup], cost: CostModel, events: list[_Event], low: int, target: float, close: float
) -> list[_Event] | None:
    """Let groups exchange portions around the cut at ``low`` until the MACs come close; None where none are found."""
    if not events:
        return None
    threshold = events[min(low, len(events) - 1)].score
    portions: list[list[_Event]] = [[] for _ in groups]
    masks = [[np.zeros(len(group.scores), dtype=bool)] for group in groups]  # after none, one, two portions ...
    for event in events:
        portions[event.group].append(event)
        masks[event.group].append(masks[event.group][-1].copy())
        masks[event.group][-1][event.channels] = True

    def penalty(event: _Event) -> float:  # also where both scores are infinite, whose difference is no number
        return 0.0 if event.score == threshold else abs(event.score - threshold) * len(event.channels)

    def fits(allocation: Allocation) -> bool:
        state = {group.name: own[taken] for group, own, taken in zip(groups, masks, allocation, strict=True)}
        return abs(cost.macs(state) - target) <= close

    start = tuple(sum(event.group == group for event in events[:low]) for group in range(len(groups)))
    found = nearest_allocation(start, [[penalty(event) for event in own] for own in portions], fits)
    if found is None:
        return None
    return [event for own, taken in zip(portions, found, strict=True) for event in own[:taken]]


def _fill(
    groups: list[ScoredGroup],
    cost: CostModel,
    state: dict[str, Bools],
    rest: list[_Event],
    target: float,
    close: float,
    blocked: set[int],
) -> list[_Event]:
    """Find affordable cuts in order, skipping those that overshoot; a skipped group is left alone from there on."""
    taken: list[_Event] = []
    for event in rest:
        if event.group in blocked:
            continue
        mask = state[groups[event.group].name]
        mask[event.channels] = True
        macs = cost.macs(state)
        if macs < target - close:
            mask[event.channels] = False
            blocked.add(event.group)
            continue
        taken.append(event)
        if macs <= target + close:
            break
    return taken
