"""One removal: plan, take out, count, until the counter agrees with the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from tp_twoaxis.borrow import ModelSnapshot
from tp_twoaxis.errors import TwoAxisError, UnreachableTargetError
from tp_twoaxis.pruning.attention import AttentionUnit
from tp_twoaxis.pruning.composition import Removals
from tp_twoaxis.pruning.cost import CostModel, channel_count
from tp_twoaxis.pruning.graph import PrunableGroup, build_graph, cost_model, group_key
from tp_twoaxis.pruning.macs import ExampleInputs, MacsCount, count_macs, inside, running_layers
from tp_twoaxis.pruning.mapping import sound_groups
from tp_twoaxis.pruning.phases import timed
from tp_twoaxis.pruning.plan import make_plan
from tp_twoaxis.pruning.ranking import score_groups
from tp_twoaxis.pruning.removal import group_report, refresh_widths, remove, removed_channels
from tp_twoaxis.pruning.repair import layer_losses

# the cost model is exact but for exotic graphs; each further try corrects it by what was measured
TRIES = 4
Budget = Literal["macs", "channels"]


@dataclass(frozen=True)
class Limits:
    """What every removal of a network keeps to; see :func:`~tp_twoaxis.prune_to_flops`.

    Attributes:
        ignored: layers that keep their output channels.
        budget: what a share is a share of.
        min_keep: share of every group's dense channels that stays.
        round_to: keep multiples of this many channels.
        tolerance: accepted relative distance to the target.
        attention: what attention loses.
    """

    ignored: list[nn.Module]
    budget: Budget
    min_keep: float
    round_to: int | None
    tolerance: float
    attention: AttentionUnit = "heads"


@dataclass(frozen=True)
class Cut:
    """What a removal that ran left behind.

    Attributes:
        count: MACs of the network now.
        achieved: share of the dense network's budget that is left.
        removals: what this removal and those before it took out.
        notes: on groups that stay whole; for a last removal also why the target was missed.
    """

    count: MacsCount
    achieved: float
    removals: Removals
    notes: list[str]


def cut_to(
    network: nn.Module,
    inputs: ExampleInputs,
    importance: Callable[[Any], Tensor],
    flops: float,
    limits: Limits,
    earlier: Removals,
    present: MacsCount,
    seconds: dict[str, float],
    *,
    goal: float,
    bare: ModelSnapshot | None = None,
) -> Cut:
    """Remove the channels of lowest importance until a share of the dense network's budget is left.

    Args:
        network: changed in place; on an error it may be half pruned and is the caller's to restore.
        inputs: of its forward.
        importance: ranks the channels of the network as it is.
        flops: share of the dense network's budget to keep.
        limits: see there.
        earlier: what is gone already.
        present: MACs of the network as it is.
        seconds: phase -> seconds, added to.
        goal: share that later removals go on to; whether it can be reached is found out before anything is removed.
        bare: the network as it was before its repair, of the same shapes: scores are of the repaired network,
            channels are taken out of this one. Default the network as it is.

    Raises:
        UnreachableTargetError: no allowed removal reaches ``goal`` or ``flops``.
        TwoAxisError: the importance or the host failed, or the network does not run afterwards.
    """
    snapshot = ModelSnapshot(network)
    dense = earlier.macs or present.total
    before = present.total / dense
    aim = flops
    for attempt in range(1, TRIES + 1):
        with timed(seconds, "graph"):
            graph = build_graph(network, inputs)
            groups, notes = sound_groups(graph, network, inputs, limits.ignored, limits.attention)
        with timed(seconds, "score"):
            scored, declined = score_groups(groups, importance)
            widths = {group_key(group): earlier.width(group, network) for group in groups}
            scored = [replace(group, width=widths[group.name]) for group in scored]
        with timed(seconds, "plan"):
            cost = _cost(groups, network, present, limits.budget)
            whole = earlier.budget or cost.dense
            plan_for = partial(
                make_plan,
                scored,
                cost,
                min_keep=limits.min_keep,
                round_to=limits.round_to,
                dense=whole,
            )
            try:
                if goal < flops:
                    plan_for(flops=goal, tolerance=limits.tolerance)
                # on the way precision is worth nothing, and cheap channels taken for it are missed in the end
                plan = plan_for(flops=aim, tolerance=limits.tolerance if flops == goal else None)
            except UnreachableTargetError as error:
                raise UnreachableTargetError("; ".join([str(error), *notes, *declined])) from None
        with timed(seconds, "remove"):
            removals = earlier.then(
                groups,
                [group_report(group, plan, network) for group in groups],
                removed_channels(groups, plan, network),
                layer_losses(groups, plan, network),
                network,
                dense,
                whole,
            )
            if bare is not None:
                bare.restore()
            remove(graph, groups, plan)
            refresh_widths(network)
        with timed(seconds, "count"):
            count = _count_pruned(network, inputs)
        missed = plan.notes if flops == goal else []
        if limits.budget == "channels":  # counted, not predicted
            return Cut(count, plan.macs / plan.dense, removals, notes + missed + declined)
        achieved = count.total / dense
        met = abs(achieved - flops) <= limits.tolerance * flops
        as_planned = abs(count.total - plan.macs) < 1.0 or count.total >= present.total
        if met or as_planned or plan.notes or attempt == TRIES:
            break
        snapshot.restore()
        # what was removed by prediction and in truth are in proportion, near enough
        aim = min(1.0, max(1e-6, before - (before - aim) * (before - flops) / (before - achieved)))
    notes += missed + declined
    if not met and not plan.notes and flops == goal:
        notes.append(
            f"kept {achieved:.4f} of the MACs instead of {flops:g}: the model runs operations that the cost model "
            "cannot attribute to a group"
        )
    return Cut(count, achieved, removals, notes)


def _cost(groups: list[PrunableGroup], network: nn.Module, count: MacsCount, budget: Budget) -> CostModel:
    if budget == "channels":
        return channel_count({group_key(group): len(group.channels) for group in groups})
    return cost_model(groups, network, count)


def _count_pruned(network: nn.Module, inputs: ExampleInputs) -> MacsCount:
    with running_layers(network) as running:
        try:
            return count_macs(network, inputs)
        except Exception as error:
            raise TwoAxisError(
                f"{type(network).__name__} does not run after removal{inside(running, network)} "
                f"({type(error).__name__}: {error}); its code holds a width that the host cannot see - put the layers "
                "concerned into ignored_layers; the model is as it was"
            ) from error
