"""One removal: plan, remove, count, until the counter agrees with the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from tp_twoaxis.dependency.channel_masks import pruned_channels
from tp_twoaxis.dependency.cost import CostModel, channel_count
from tp_twoaxis.dependency.flops import ExampleInputs, MacsCount, count_macs, inside, running_layers
from tp_twoaxis.dependency.graph import PrunableGroup, build_graph, cost_model, group_key
from tp_twoaxis.dependency.removal import group_report, refresh_widths, remove, removed_channels
from tp_twoaxis.dependency.validation import verified_groups
from tp_twoaxis.errors import TwoAxisError, UnreachableTargetError, reason
from tp_twoaxis.pruning.config import Budget, PruningConfig
from tp_twoaxis.pruning.history import RemovalHistory
from tp_twoaxis.pruning.plan import PruningPlan, coarse_reason, make_plan, missed_note
from tp_twoaxis.pruning.portions import ScoredGroup
from tp_twoaxis.pruning.ranking import score_groups
from tp_twoaxis.runtime.model_state import ModelSnapshot
from tp_twoaxis.runtime.timing import timed

# the cost model is exact but for exotic graphs; each further try corrects it by what was measured
TRIES = 4


@dataclass(frozen=True)
class StepResult:
    """What a removal left.

    Attributes:
        count: MACs of the network now.
        achieved: share of the dense network's budget that is left.
        history: what this removal and those before it took out.
        notes: on groups that stay whole; for a last removal also why the target was missed.
    """

    count: MacsCount
    achieved: float
    history: RemovalHistory
    notes: list[str]


@dataclass(frozen=True)
class RankedGroups:
    """A network's groups of coupled channels, ranked.

    Attributes:
        graph: Torch-Pruning's.
        groups: those that may lose channels.
        scored: the ranking of those that the importance did not decline.
        notes: on groups that stay whole.
    """

    graph: Any
    groups: list[PrunableGroup]
    scored: list[ScoredGroup]
    notes: list[str]


@dataclass(frozen=True)
class Attempt:
    """A removal that was made and may be taken back.

    Attributes:
        plan: what was to leave.
        count: MACs of the network without it.
        history: this removal and those before it.
        notes: on groups that stay whole.
    """

    plan: PruningPlan
    count: MacsCount
    history: RemovalHistory
    notes: list[str]


class Removal:
    """Attempts to remove channels from one state of a network; each takes back the one before.

    Args:
        network: changed in place; on an error it may be half pruned and is the caller's to restore.
        inputs: of its forward.
        importance: ranks the channels of the network as it is.
        config: what every removal keeps to.
        history: what is gone already.
        present: MACs of the network as it is.
        seconds: phase -> seconds, added to.
        unrepaired: the network as it was before its repair, of the same shapes: scores are of the repaired network,
            channels are removed from this one. Default the network as it is.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: ExampleInputs,
        importance: Callable[[Any], Tensor],
        config: PruningConfig,
        history: RemovalHistory,
        present: MacsCount,
        seconds: dict[str, float],
        *,
        unrepaired: ModelSnapshot | None = None,
    ) -> None:
        self.network, self.inputs, self.importance, self.config = network, inputs, importance, config
        self.history, self.present, self.seconds = history, present, seconds
        self._unrepaired = unrepaired
        self._start = ModelSnapshot(network)
        self._try_all = False

    def attempt(self, make: Callable[[RankedGroups], PruningPlan]) -> Attempt:
        """Rank the channels, plan, remove and count.

        Where the network does not run afterwards, a second time without the groups that its code does not follow.

        Args:
            make: makes the plan.

        Raises:
            UnreachableTargetError: as ``make`` raises it, with the notes on groups that stay whole.
            TwoAxisError: the importance or Torch-Pruning failed, or the network does not run afterwards.
        """
        self._start.restore()
        ranked = self._ranked()
        try:
            plan = make(ranked)
        except UnreachableTargetError as error:
            raise UnreachableTargetError("; ".join([str(error), *ranked.notes])) from None
        try:
            history, count = self._remove(ranked, plan)
        except TwoAxisError:
            if self._try_all:
                raise
            self._try_all = True  # some group's channels cannot leave: find out which, and leave those whole
            return self.attempt(make)
        return Attempt(plan, count, history, ranked.notes)

    def _ranked(self) -> RankedGroups:
        network, config = self.network, self.config
        with timed(self.seconds, "graph"):
            graph = build_graph(network, self.inputs)
            ignored = config.ignored_in(network)
            groups, notes = verified_groups(
                graph, network, self.inputs, ignored, config.attention, try_all=self._try_all
            )
        with timed(self.seconds, "score"):
            scored, declined = score_groups(groups, self.importance)
            widths = {group_key(group): self.history.width(group) for group in groups}
            scored = [replace(group, width=widths[group.name]) for group in scored]
        return RankedGroups(graph, groups, scored, notes + declined)

    def _remove(self, ranked: RankedGroups, plan: PruningPlan) -> tuple[RemovalHistory, MacsCount]:
        network, groups = self.network, ranked.groups
        with timed(self.seconds, "remove"):
            joined = self.history.then(
                groups,
                [group_report(group, plan.removed) for group in groups],
                removed_channels(groups, plan.removed, network),
                pruned_channels(groups, plan.removed, network),
                self.history.macs or self.present.total,
                plan.dense,
            )
            if self._unrepaired is not None:
                self._unrepaired.restore()
            remove(ranked.graph, groups, plan.removed)
            refresh_widths(network)
        with timed(self.seconds, "count"):
            return joined, _count_pruned(network, self.inputs, self.present.outputs)


def prune_step(removal: Removal, share: float) -> StepResult:
    """Remove the channels of lowest importance until a share of the dense network's MACs or channels is left.

    Args:
        removal: of the network as it is.
        share: of the dense network's budget to keep. Where it is more than ``config.flops``, later removals go on to
            that; whether it can be reached is found out before anything is removed.

    Raises:
        UnreachableTargetError: no allowed removal reaches the final or this step's share.
        TwoAxisError: the importance or Torch-Pruning failed, or the network does not run afterwards.
    """
    config, present = removal.config, removal.present
    dense = removal.history.macs or present.total
    before, last = present.total / dense, share == config.flops
    target = share
    nearest: tuple[StepResult, ModelSnapshot] | None = None
    for attempt in range(1, TRIES + 1):
        try:
            made = removal.attempt(partial(_plan, removal, target, last=last))
        except TwoAxisError:
            if nearest is not None:  # the correction asked for more than there is, not the caller
                break
            raise
        if config.budget == "channels":  # counted, not predicted
            missed = made.plan.notes if last else []
            return StepResult(made.count, made.plan.macs / made.plan.dense, made.history, made.notes + missed)
        count = made.count
        achieved = count.total / dense
        met = abs(achieved - share) <= config.tolerance * share
        missed = [] if met or not last else [missed_note(achieved, share, "MACs", _reason(made.plan, config))]
        if nearest is None or abs(achieved - share) < abs(nearest[0].achieved - share):
            nearest = StepResult(count, achieved, made.history, made.notes + missed), ModelSnapshot(removal.network)
        as_planned = abs(count.total - made.plan.macs) < 1.0 or count.total >= present.total
        if met or as_planned or made.plan.notes or attempt == TRIES:
            break
        # what was removed by prediction and in truth are in proportion, near enough
        target = min(1.0, max(1e-6, before - (before - target) * (before - share) / (before - achieved)))
    assert nearest is not None
    result, pruned = nearest
    pruned.restore()
    return result


def _reason(plan: PruningPlan, config: PruningConfig) -> str:
    """Say why the counter and the target disagree."""
    if plan.notes:
        return coarse_reason(config.round_to)
    return "the model runs operations that the cost model cannot attribute to a group"


def _plan(removal: Removal, target: float, ranked: RankedGroups, *, last: bool) -> PruningPlan:
    with timed(removal.seconds, "plan"):
        return _timed_plan(removal, target, ranked, last=last)


def _timed_plan(removal: Removal, target: float, ranked: RankedGroups, *, last: bool) -> PruningPlan:
    config = removal.config
    cost = _cost(ranked.groups, removal.network, removal.present, config.budget)
    plan = partial(
        make_plan,
        ranked.scored,
        cost,
        min_keep=config.min_keep,
        round_to=config.round_to,
        dense=removal.history.budget or cost.dense,
    )
    if not last:
        plan(flops=config.flops, tolerance=config.tolerance)
    # on the way precision is worth nothing, and cheap channels taken for it are missed in the end
    return plan(flops=target, tolerance=config.tolerance if last else None)


def _cost(groups: list[PrunableGroup], network: nn.Module, count: MacsCount, budget: Budget) -> CostModel:
    if budget == "channels":
        return channel_count({group_key(group): len(group.channels) for group in groups})
    return cost_model(groups, network, count)


def _count_pruned(network: nn.Module, inputs: ExampleInputs, shapes: list[tuple[int, ...]]) -> MacsCount:
    with running_layers(network) as running:
        try:
            count = count_macs(network, inputs)
        except Exception as error:
            raise TwoAxisError(
                f"{type(network).__name__} does not run after removal{inside(running, network)} "
                f"({reason(error)}); its code holds a width that Torch-Pruning cannot see - put the "
                "layers concerned into ignored_layers; the model is as it was"
            ) from error
    if count.outputs != shapes:
        raise TwoAxisError(
            f"{type(network).__name__}: expected outputs of shapes {shapes} after removal, got {count.outputs}; put "
            "the layers that write them into ignored_layers; the model is as it was"
        )
    return count
