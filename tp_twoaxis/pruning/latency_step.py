"""One removal to a latency: plan by a table of the device, time the outcome beside the dense network, correct."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import numpy as np
import torch
from torch import nn

from tp_twoaxis.dependency.cost import CostModel
from tp_twoaxis.dependency.flops import ExampleInputs, count_examples
from tp_twoaxis.dependency.graph import cost_model
from tp_twoaxis.dependency.latency import LatencyRatio, compare_latency
from tp_twoaxis.dependency.latency_table import GroupLatency, LatencyTable, measure_latency_table
from tp_twoaxis.errors import TwoAxisError, UnreachableTargetError
from tp_twoaxis.pruning.plan import PruningPlan, least_share, make_plan, missed_note
from tp_twoaxis.pruning.portions import Bools, ScoredGroup, portions_of
from tp_twoaxis.pruning.step import Attempt, RankedGroups, Removal, StepResult
from tp_twoaxis.runtime.model_state import ModelSnapshot
from tp_twoaxis.runtime.timing import timed

ACCEPTED = 0.05
"""Relative distance of the measured latency to what was asked for that counts as met."""
TRIES = 10
# a plan's own distance to its target, by the table
PLANNED = 0.01
# targets nearer to each other than this lead to the same plan or to a jump
JUMP = PLANNED / 2
# widths of a group that are timed: all up to so many, of more those that are a multiple of a power of two
MOST_WIDTHS = 16


@dataclass
class DenseLatency:
    """The dense network, beside which pruned ones are timed, and what was measured so far.

    Attributes:
        network: a copy that keeps its channels.
        inputs: of its forward; the time is of this batch.
        progress: show progress bars on stderr.
        table: how long each group's layers take at each of its widths, in the dense network.
        reason: why the last removal is no nearer to what was asked for, should it be too far from it.
    """

    network: nn.Module
    inputs: ExampleInputs
    progress: bool = False
    table: list[GroupLatency] = field(default_factory=list)
    reason: str = ""

    def beside(self, network: nn.Module) -> LatencyRatio:
        """Time a network beside the dense one."""
        return compare_latency(network, self.network, self.inputs)

    def notes(self, measured: LatencyRatio, asked: float) -> list[str]:
        """Say how the outcome was timed, and why it is not what was asked for, if it is not.

        Args:
            measured: the outcome, repaired, beside the dense network.
            asked: share of the latency to keep.
        """
        device = next(self.network.parameters()).device
        threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        how = (
            f"the latency is that of {count_examples(self.inputs)} example(s) at once on {device}{threads}, the median "
            f"of rounds in turn with the dense network, +- {measured.standard_error:.3f}"
        )
        if abs(measured.ratio - asked) <= ACCEPTED * asked:
            return [how]
        busy = "timings scatter that much on this machine as busy as it is; try again when nothing else runs"
        reason = busy if measured.standard_error > ACCEPTED * asked / 2 else self.reason
        return [how, missed_note(measured.ratio, asked, "latency", reason)]


def prune_step_to_latency(removal: Removal, share: float, dense: DenseLatency) -> StepResult:
    """Remove the channels of lowest importance until a share of the dense network's latency is left, as measured.

    The layers of each group are timed once at several widths
    (:func:`~tp_twoaxis.dependency.latency_table.measure_latency_table`), and groups keep no width but these, and none
    that is slower than a wider one. The planner meets the target by that table; the network that comes out is timed
    beside the dense one, and the planner's target is corrected, up to nine times, until the latency that is measured
    is within 5 % of what was asked for.

    Args:
        removal: of the network as it is.
        share: of the dense network's latency to keep. Steps on the way to a smaller share are not corrected.
        dense: the dense network; its ``table`` is filled in the first step.

    Returns:
        The attempt nearest to the share; ``dense.reason`` says why it is not nearer, should it be too far from it.

    Raises:
        UnreachableTargetError: even with every group at its floor the network takes longer.
        TwoAxisError: as of :func:`~tp_twoaxis.pruning.step.prune_step`.
    """
    search = _TargetSearch(removal, share, dense)
    while search.goes_on():
        search.try_once()
    return search.result()


class _Limits(TypedDict):
    min_keep: float
    round_to: int | None


class _TargetSearch:
    """Attempts at one share, each corrected by those before it."""

    def __init__(self, removal: Removal, share: float, dense: DenseLatency) -> None:
        self.removal, self.share, self.dense = removal, share, dense
        self.last = share == removal.config.flops
        # later steps plan by what is there, and are timed beside the dense network
        with timed(removal.seconds, "latency"):
            self.present = 1.0 if removal.history.macs is None else dense.beside(removal.network).ratio
        self.asked = min(1.0, share / self.present)
        self.target = self.asked
        self.table: LatencyTable | None = None
        self.least = 0.0  # what the floors leave, by the table
        self.tried: list[tuple[float, float]] = []  # targets and what was measured, as shares of the present network
        self.timed: list[tuple[dict[str, Bools], LatencyRatio]] = []
        self.best: tuple[Attempt, LatencyRatio, ModelSnapshot] | None = None
        self.stopped = ""  # why no further attempt is made

    def goes_on(self) -> bool:
        return not self.stopped and len(self.tried) < TRIES

    def try_once(self) -> None:
        try:
            attempt = self.removal.attempt(self._plan)
        except TwoAxisError as error:
            if self.best is None:
                raise
            self.stopped = str(error)
            return
        measured = self._timed(attempt)
        self.tried.append((self.target, measured.ratio / self.present))
        if not self.last or self._miss(measured) <= ACCEPTED:
            self.stopped = "near enough"
        elif self.target <= self.least and measured.ratio > self.share:
            raise UnreachableTargetError("; ".join([self._unreachable(measured), *attempt.notes]))
        self.target = next_target(self.tried, self.asked)

    def _timed(self, attempt: Attempt) -> LatencyRatio:
        """Time an attempt beside the dense network, unless it is one that was timed before."""
        for removed, known in self.timed:
            if _same(attempt.plan.removed, removed):
                return known
        with timed(self.removal.seconds, "latency"):
            measured = self.dense.beside(self.removal.network)
        self.timed.append((attempt.plan.removed, measured))
        if self.best is None or self._miss(measured) < self._miss(self.best[1]):
            self.best = attempt, measured, ModelSnapshot(self.removal.network)
        return measured

    def result(self) -> StepResult:
        assert self.best is not None
        attempt, measured, pruned = self.best
        pruned.restore()
        self.dense.reason = f"{measured.ratio:.3f} was measured before the repair, and the machine may have changed"
        if self._miss(measured) > ACCEPTED:
            coarse = "; widths that were timed are coarse here, lower round_to" * (len(self.timed) < len(self.tried))
            self.dense.reason = self.stopped or f"none of {len(self.timed)} networks that were timed is nearer{coarse}"
        return StepResult(attempt.count, measured.ratio, attempt.history, [*attempt.notes, *self._left_out()])

    def _plan(self, ranked: RankedGroups) -> PruningPlan:
        if self.table is None:
            self.table = self._measured(ranked)
            self.dense.table = self.dense.table or self.table.groups
        with timed(self.removal.seconds, "plan"):
            return self._planned(ranked, self.table)

    def _planned(self, ranked: RankedGroups, table: LatencyTable) -> PruningPlan:
        config, macs = self.removal.config, None
        if getattr(self.removal.importance, "per_macs", False):
            macs = cost_model(ranked.groups, self.removal.network, self.removal.present)
        scored = priced_groups(ranked.scored, table, macs)
        cost, limits = table.cost, _Limits(min_keep=config.min_keep, round_to=config.round_to)
        self.least = least_share(scored, cost, **limits)
        self.target = min(1.0, max(self.target, self.least))
        return make_plan(scored, cost, flops=self.target, tolerance=PLANNED if self.last else None, **limits)

    def _measured(self, ranked: RankedGroups) -> LatencyTable:
        config = self.removal.config
        widths = {group.name: timed_widths(group, config.min_keep, config.round_to) for group in ranked.scored}
        with timed(self.removal.seconds, "latency"):
            return measure_latency_table(
                ranked.graph,
                ranked.groups,
                self.removal.network,
                self.dense.inputs,
                {name: own for name, own in widths.items() if own},
                progress=self.dense.progress,
            )

    def _miss(self, measured: LatencyRatio) -> float:
        return abs(measured.ratio - self.share) / self.share

    def _left_out(self) -> list[str]:
        assert self.table is not None
        slow = {group.name: len(group.widths) - len(group.quick_widths()) for group in self.table.groups}
        if not any(slow.values()):
            return []
        total = sum(len(group.widths) for group in self.table.groups)
        most = max(slow, key=lambda name: slow[name])
        return [
            f"{sum(slow.values())} of {total} widths that were timed are no quicker than wider ones and were left out, "
            f"{slow[most]} of them of {most}"
        ]

    def _unreachable(self, measured: LatencyRatio) -> str:
        config, (own, beside) = self.removal.config, measured.milliseconds
        rounding = f", round_to={config.round_to}" if config.round_to else ""
        return (
            f"flops={self.share:g}: expected a share of the latency between {measured.ratio:.3f} and 1, got less: with "
            f"every group at its floor (min_keep={config.min_keep:g}{rounding}) {own:.3g} ms were measured where the "
            f"dense network takes {beside:.3g}; lower min_keep, ignore fewer layers, or ask for more"
        )


def _same(one: dict[str, Bools], other: dict[str, Bools]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def timed_widths(group: ScoredGroup, min_keep: float, round_to: int | None) -> list[int]:
    """List the widths of a group that are timed, descending, without its present one.

    Where there are more than 16, they are multiples of the largest power of two that leaves 12 or more in all of the
    group's channels: kernels work in blocks of such sizes.

    Example:
        >>> timed_widths(ScoredGroup("conv", np.arange(96.0)), min_keep=0.1, round_to=None)
        [88, 80, 72, 64, 56, 48, 40, 32, 24, 16]
    """
    size = len(group.scores)
    gone = portions_of(group, min_keep, round_to or 1).gone[1:]
    widths = [size - int(lost) for lost in gone]
    if len(widths) <= MOST_WIDTHS:
        return widths
    step = 2 ** int(np.log2(size / 12))
    return [width for width in widths if width % step == 0] or widths


def priced_groups(scored: list[ScoredGroup], table: LatencyTable, macs: CostModel | None) -> list[ScoredGroup]:
    """Restrict groups to their quick widths and, where scores are per MAC, turn them into scores per millisecond.

    Args:
        scored: the groups.
        table: what their widths cost.
        macs: MACs that their channels free, where scores are per MAC; None where they are not per cost.

    Returns:
        The groups; those that were not timed keep all of their channels.
    """
    times = {group.name: group for group in table.groups}
    found = []
    for group in scored:
        size, scores, quick = len(group.scores), group.scores, list[int]()
        if (own := times.get(group.name)) is not None:
            quick = [width for width in own.quick_widths() if width < size]
        if own is not None and quick and macs is not None:
            narrowest = quick[-1]
            freed = (macs.dense - macs.macs({group.name: np.arange(size) >= narrowest})) / macs.dense
            saved = (own.milliseconds[0] - own.milliseconds[own.widths.index(narrowest)]) / table.cost.dense
            scores = scores * (freed / saved)
        found.append(replace(group, scores=scores, widths=tuple(quick)))
    return found


def next_target(tried: Sequence[tuple[float, float]], asked: float) -> float:
    """Correct the planner's target by what came out of earlier ones.

    Where measured shares lie on both sides of what is asked for, the straight line between the two nearest targets is
    followed, but into their middle half only (a safeguarded regula falsi: timings are noisy). Where these targets meet,
    the time jumps, as it does when a width takes another kernel, and the search goes on beyond the jump. Else, and
    there, what is removed by the table and in truth are taken to be in proportion, by a factor of two at most.

    Args:
        tried: target, a share by the table, and share as measured, of each attempt; at least one.
        asked: share to be measured.

    Returns:
        The next share by the table, in (0, 1].

    Example:
        >>> round(next_target([(0.5, 0.75)], 0.5), 3), round(next_target([(0.5, 0.75), (0.25, 0.5)], 0.6), 3)
        (0.25, 0.35)
        >>> round(next_target([(0.7, 0.76), (0.698, 0.61)], 0.7), 3)  # quick below the jump, so perhaps also beyond it
        0.768
    """
    above = [(target, share) for target, share in tried if share > asked]
    below = [(target, share) for target, share in tried if share <= asked]
    if not (above and below):
        return _in_proportion(min(above) if above else max(below), asked)
    (high, slow), (low, fast) = min(above), max(below)
    if high - low >= JUMP:
        weight = min(0.75, max(0.25, (asked - fast) / (slow - fast)))
        return low + weight * (high - low)
    beyond = [_in_proportion((low, fast), asked), _in_proportion((high, slow), asked)]
    fresh = [target for target in beyond if all(abs(target - before) >= JUMP for before, _ in tried)]
    return fresh[0] if fresh else (low + high) / 2


def _in_proportion(tried: tuple[float, float], asked: float) -> float:
    target, share = tried
    factor = min(2.0, (1.0 - asked) / (1.0 - share)) if share < 1.0 else 2.0
    return max(target / 2, 1.0 - factor * (1.0 - target))
