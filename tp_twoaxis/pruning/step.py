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
from tp_twoaxis.errors import TwoAxisError, UnreachableTargetError
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


def prune_step(
    network: nn.Module,
    inputs: ExampleInputs,
    importance: Callable[[Any], Tensor],
    share: float,
    config: PruningConfig,
    history: RemovalHistory,
    present: MacsCount,
    seconds: dict[str, float],
    *,
    unrepaired: ModelSnapshot | None = None,
) -> StepResult:
    """Remove the channels of lowest importance until a share of the dense network's budget is left.

    Args:
        network: changed in place; on an error it may be half pruned and is the caller's to restore.
        inputs: of its forward.
        importance: ranks the channels of the network as it is.
        share: of the dense network's budget to keep. Where it is more than ``config.flops``, later removals go on to
            that; whether it can be reached is found out before anything is removed.
        config: what every removal keeps to.
        history: what is gone already.
        present: MACs of the network as it is.
        seconds: phase -> seconds, added to.
        unrepaired: the network as it was before its repair, of the same shapes: scores are of the repaired network,
            channels are removed from this one. Default the network as it is.

    Raises:
        UnreachableTargetError: no allowed removal reaches the final or this step's share.
        TwoAxisError: the importance or Torch-Pruning failed, or the network does not run afterwards.
    """
    snapshot = ModelSnapshot(network)
    dense = history.macs or present.total
    before = present.total / dense
    last = share == config.flops
    target, try_all = share, False
    nearest: tuple[StepResult, ModelSnapshot] | None = None
    for attempt in range(1, TRIES + 1):
        with timed(seconds, "graph"):
            graph = build_graph(network, inputs)
            ignored = config.ignored_in(network)
            groups, notes = verified_groups(graph, network, inputs, ignored, config.attention, try_all=try_all)
        with timed(seconds, "score"):
            scored, declined = score_groups(groups, importance)
            widths = {group_key(group): history.width(group) for group in groups}
            scored = [replace(group, width=widths[group.name]) for group in scored]
        with timed(seconds, "plan"):
            cost = _cost(groups, network, present, config.budget)
            whole = history.budget or cost.dense
            try:
                plan = _plan(scored, cost, target, config, whole, last=last)
            except UnreachableTargetError as error:
                if nearest is not None:  # the correction asked for more than there is, not the caller
                    break
                raise UnreachableTargetError("; ".join([str(error), *notes, *declined])) from None
        with timed(seconds, "remove"):
            joined = history.then(
                groups,
                [group_report(group, plan.removed) for group in groups],
                removed_channels(groups, plan.removed, network),
                pruned_channels(groups, plan.removed, network),
                dense,
                whole,
            )
            if unrepaired is not None:
                unrepaired.restore()
        try:
            with timed(seconds, "remove"):
                remove(graph, groups, plan.removed)
                refresh_widths(network)
            with timed(seconds, "count"):
                count = _count_pruned(network, inputs, present.outputs)
        except TwoAxisError:
            if try_all or attempt == TRIES:
                if nearest is not None:
                    break
                raise
            snapshot.restore()
            try_all = True  # some group's channels cannot leave: find out which, and leave those whole
            continue
        if config.budget == "channels":  # counted, not predicted
            missed = plan.notes if last else []
            return StepResult(count, plan.macs / plan.dense, joined, notes + missed + declined)
        achieved = count.total / dense
        met = abs(achieved - share) <= config.tolerance * share
        missed = [] if met or not last else [missed_note(achieved, share, "MACs", _reason(plan, config))]
        if nearest is None or abs(achieved - share) < abs(nearest[0].achieved - share):
            nearest = StepResult(count, achieved, joined, notes + missed + declined), ModelSnapshot(network)
        as_planned = abs(count.total - plan.macs) < 1.0 or count.total >= present.total
        if met or as_planned or plan.notes or attempt == TRIES:
            break
        snapshot.restore()
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


def _plan(
    scored: list[ScoredGroup], cost: CostModel, target: float, config: PruningConfig, dense: float, *, last: bool
) -> PruningPlan:
    plan = partial(make_plan, scored, cost, min_keep=config.min_keep, round_to=config.round_to, dense=dense)
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
                f"({type(error).__name__}: {error}); its code holds a width that Torch-Pruning cannot see - put the "
                "layers concerned into ignored_layers; the model is as it was"
            ) from error
    if count.outputs != shapes:
        raise TwoAxisError(
            f"{type(network).__name__}: expected outputs of shapes {shapes} after removal, got {count.outputs}; put "
            "the layers that write them into ignored_layers; the model is as it was"
        )
    return count
