"""From a trained network and an importance to a smaller network at a MACs target, or to no change at all."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tp_twoaxis.borrow import ModelSnapshot, unwrap
from tp_twoaxis.errors import TwoAxisError, UnreachableTargetError
from tp_twoaxis.importance.entry import requires
from tp_twoaxis.importance.registry import IMPORTANCES, build_importance, find_importance
from tp_twoaxis.importance.two_axis import TwoAxisImportance
from tp_twoaxis.pruning.cost import CostModel, channel_count
from tp_twoaxis.pruning.graph import PrunableGroup, build_graph, cost_model, group_key
from tp_twoaxis.pruning.macs import (
    ExampleInputs,
    MacsCount,
    count_macs,
    host_macs,
    inside,
    measure_latency,
    running_layers,
    thop_macs,
)
from tp_twoaxis.pruning.mapping import sound_groups
from tp_twoaxis.pruning.plan import PruningPlan, ScoredGroup, make_plan
from tp_twoaxis.pruning.ranking import score_groups
from tp_twoaxis.pruning.removal import group_report, refresh_widths, remove, removed_channels
from tp_twoaxis.pruning.repair import REPAIRS, LayerLoss, check_repair, layer_losses, repair_network
from tp_twoaxis.pruning.report import GroupReport, PruningReport, Size
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.store import CalibrationStatistics

# the cost model is exact but for exotic graphs; each further try corrects it by what was measured
TRIES = 4
Budget = Literal["macs", "channels"]
LATENCY_BATCHES = (1, 64)


def prune_to_flops(
    model: nn.Module,
    example_inputs: ExampleInputs,
    importance: str | Callable[[Any], Tensor],
    *,
    flops: float = 0.5,
    budget: Budget = "macs",
    repair: Iterable[str] = ("bn",),
    stats: CalibrationStatistics | None = None,
    loader: Iterable[Any] | None = None,
    ignored_layers: Iterable[nn.Module | str] = (),
    min_keep: float = 0.1,
    round_to: int | None = None,
    tolerance: float = 0.01,
    max_images: int | None = 5000,
    latency: bool = False,
    other_counters: bool = True,
    progress: bool = True,
) -> PruningReport:
    """Remove channels through the host's dependency graph until a share of the MACs is left.

    One threshold over all groups decides, at which the kept MACs match the target by the counter of
    :func:`~tp_twoaxis.pruning.macs.count_macs`. The model is changed in place; on any error it is
    put back exactly as it was. Layers that compute the model's outputs are never touched. Parameters
    become new objects, so build optimizers afterwards.

    Args:
        model: the network; DataParallel, DistributedDataParallel and ``torch.compile`` are looked through.
        example_inputs: a tensor, or a tuple or dict of the forward's arguments; moved to the model's device.
        importance: any Torch-Pruning importance, ours or the host's, or a name in
            ``tp_twoaxis.importance.registry.IMPORTANCES``: a score (then ``stats``, or ``loader`` to calibrate
            from) or a baseline such as ``l2`` or ``taylor``. Gradient-based objects need
            ``loss.backward()`` before.
        flops: share of the dense MACs to **keep**, in (0, 1].
        budget: what ``flops`` is a share of: ``macs``, or ``channels``, all groups' root channels together, for
            protocols that remove a share of the channels and take the MACs as they come.
        repair: any of ``bn`` (re-estimate BatchNorm statistics), ``bias``, ``ridge``, ``patch`` and ``sequential``
            (let the channels that stay supply what left), from ``loader``; see
            :func:`~tp_twoaxis.pruning.repair.repair_network`. ``()`` leaves the cut as it is.
        stats: calibration statistics for an importance given by name; with ``consumers=True`` they serve the
            repairs as well.
        loader: images for repair (labels are not used there) and, if needed, for calibration.
        ignored_layers: layers or their names that keep their output channels.
        min_keep: share of every group's channels that always stays.
        round_to: keep multiples of this many channels in every group that is cut.
        tolerance: accepted relative distance to the target.
        max_images: at most this many images for repair, for calibration and for what a named baseline gathers.
        other_counters: also report the host's and thop's MACs; in a sweep over small networks they take most of
            the time.
        latency: also measure milliseconds at batch 1 and batch 64, before and after.
        progress: show progress bars on stderr.

    Returns:
        The report; when the target could not be met within ``tolerance``, its notes say why.

    Raises:
        TwoAxisError: bad arguments, an untraceable model, a failing importance, a network that no longer runs.
        UnreachableTargetError: no allowed removal reaches the target; the message gives the range.

    Example:
        >>> import torch
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
        ...     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
        >>> loader = [(torch.randn(64, 3, 12, 12), torch.randint(4, (64,)))]
        >>> x = torch.randn(1, 3, 12, 12)
        >>> report = prune_to_flops(net, x, "capture", flops=0.5, loader=loader, progress=False)
        >>> abs(report.achieved - 0.5) < 0.005
        True
    """
    network = unwrap(model)
    parameter = next(network.parameters(), None)
    if parameter is None:
        raise TwoAxisError(f"{type(network).__name__} has no parameters, so nothing can be removed")
    if budget not in get_args(Budget):
        raise TwoAxisError(f"budget: expected {' or '.join(get_args(Budget))}, got {budget!r}")
    repairs = check_repair(repair, network, loader, stats)
    folds = any(name in repairs for name in REPAIRS if name != "bn")
    inputs = tree_map(lambda x: x.to(parameter.device) if isinstance(x, Tensor) else x, example_inputs)
    ignored = _find_layers(network, ignored_layers)
    seconds: dict[str, float] = {}
    snapshot = ModelSnapshot(network)
    trained = {name: p.requires_grad for name, p in network.named_parameters()}
    modes = [(module, module.training) for module in network.modules()]
    try:
        with _timed(seconds, "calibrate"):
            ranking, label, stats = _resolve(importance, stats, loader, network, max_images, folds, progress)
        with _timed(seconds, "count"):
            dense = _count_dense(network, inputs)
            before = _size(network, inputs, dense, other_counters)
            milliseconds = _latencies(network, inputs) if latency else {}

        def plan_for(groups: list[ScoredGroup], cost: CostModel, share: float) -> PruningPlan:
            return make_plan(groups, cost, flops=share, min_keep=min_keep, round_to=round_to, tolerance=tolerance)

        # the copy reads the network as it is here: statistics and targets of repair are the dense network's
        original = copy.deepcopy(network).requires_grad_(False) if folds else None
        cut = _cut(network, inputs, ranking, ignored, dense, flops, budget, tolerance, plan_for, seconds)
        notes = cut.notes
        with _timed(seconds, "repair"):
            mended = repair_network(
                network,
                network if original is None else original,
                cut.losses,
                repairs,
                loader=loader,
                stats=stats,
                max_images=max_images,
                progress=progress,
            )
        seconds |= mended.seconds
        notes += mended.notes
        with _timed(seconds, "count"):
            after = _size(network, inputs, cut.count, other_counters)
            later = _latencies(network, inputs) if latency else {}
    except BaseException:
        snapshot.restore()
        raise
    for name, kept in network.named_parameters():
        kept.requires_grad_(trained.get(name, kept.requires_grad))  # a bias that repair added has no past
    for module, training in modes:
        module.training = training
    if isinstance(importance, str):
        network.zero_grad(set_to_none=True)  # gradients gathered for a criterion belong to the dense network
    if getattr(getattr(ranking, "stats", None), "target", None) == "predicted_margin":
        notes.append("calibrated without labels or on the prediction: the target axis uses the predicted margin")
    return PruningReport(
        label,
        flops,
        cut.achieved,
        before,
        after,
        cut.groups,
        cut.removed_channels,
        list(repairs),
        seconds,
        {key: (first, later[key]) for key, first in milliseconds.items()},
        notes,
        budget,
        mended.consumers,
    )


@dataclass(frozen=True)
class _Cut:
    """What a removal that ran left behind."""

    count: MacsCount
    achieved: float
    groups: list[GroupReport]
    removed_channels: dict[str, list[int]]
    losses: dict[str, LayerLoss]
    notes: list[str]


def _cut(
    network: nn.Module,
    inputs: ExampleInputs,
    ranking: Callable[[Any], Tensor],
    ignored: list[nn.Module],
    dense: MacsCount,
    flops: float,
    budget: Budget,
    tolerance: float,
    plan_for: Callable[[list[ScoredGroup], CostModel, float], PruningPlan],
    seconds: dict[str, float],
) -> _Cut:
    """Plan, remove and count, until the counter agrees with the target or the tries are used up."""
    snapshot = ModelSnapshot(network)
    aim = flops
    for attempt in range(1, TRIES + 1):
        with _timed(seconds, "graph"):
            graph = build_graph(network, inputs)
            groups, notes = sound_groups(graph, network, inputs, ignored)
        with _timed(seconds, "score"):
            scored, declined = score_groups(groups, ranking)
        with _timed(seconds, "plan"):
            try:
                plan = plan_for(scored, _cost(groups, network, dense, budget), aim)
            except UnreachableTargetError as error:
                raise UnreachableTargetError("; ".join([str(error), *notes, *declined])) from None
        with _timed(seconds, "remove"):
            lost, losses = removed_channels(groups, plan, network), layer_losses(groups, plan, network)
            reports = [group_report(group, plan, network) for group in groups]
            remove(graph, groups, plan)
            refresh_widths(network)
        with _timed(seconds, "count"):
            count = _count_pruned(network, inputs)
        if budget == "channels":  # counted, not predicted
            return _Cut(count, plan.macs / plan.dense, reports, lost, losses, notes + plan.notes + declined)
        achieved = count.total / dense.total
        met = abs(achieved - flops) <= tolerance * flops
        as_planned = abs(count.total - plan.macs) < 1.0 or count.total >= dense.total
        if met or as_planned or plan.notes or attempt == TRIES:
            break
        snapshot.restore()
        # what was removed by prediction and in truth are in proportion, near enough
        aim = min(1.0, max(1e-6, 1.0 - (1.0 - aim) * (1.0 - flops) / (1.0 - achieved)))
    notes += plan.notes + declined
    if not met and not plan.notes:
        notes.append(
            f"kept {achieved:.4f} of the MACs instead of {flops:g}: the model runs operations that the cost model "
            "cannot attribute to a group"
        )
    return _Cut(count, achieved, reports, lost, losses, notes)


def _cost(groups: list[PrunableGroup], network: nn.Module, dense: MacsCount, budget: Budget) -> CostModel:
    if budget == "channels":
        return channel_count({group_key(group): len(group.channels) for group in groups})
    return cost_model(groups, network, dense)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def _find_layers(network: nn.Module, layers: Iterable[nn.Module | str]) -> list[nn.Module]:
    modules = dict(network.named_modules())
    found = []
    for layer in layers:
        if isinstance(layer, str) and layer not in modules:
            raise TwoAxisError(f"ignored_layers: the model has no layer {layer!r}")
        module = modules[layer] if isinstance(layer, str) else layer
        if not any(module is other for other in modules.values()):
            raise TwoAxisError(
                f"ignored_layers: {type(module).__name__} is not part of this model; pass its own layers or their names"
            )
        found.append(module)
    return found


def _resolve(
    importance: str | Callable[[Any], Tensor],
    stats: CalibrationStatistics | None,
    loader: Iterable[Any] | None,
    network: nn.Module,
    max_images: int | None,
    consumers: bool,
    progress: bool,
) -> tuple[Callable[[Any], Tensor], str, CalibrationStatistics | None]:
    """Find what ranks the channels, its name for the report, and what statistics there are."""
    if isinstance(importance, str):
        entry = find_importance(importance)
        if stats is None and loader is not None and requires(entry.needs, "stats"):
            stats = calibrate(
                network,
                loader,
                max_images=max_images,
                gradients=requires(entry.needs, "gradient-stats"),
                consumers=consumers or requires(entry.needs, "consumer-stats"),
                progress=progress,
            )
        ranking = build_importance(
            importance, entry, stats=stats, model=network, loader=loader, max_images=max_images, progress=progress
        )
        return ranking, importance, stats
    if not callable(importance):
        raise TwoAxisError(
            f"importance: expected a Torch-Pruning importance or a name, got {type(importance).__name__}; "
            f"names are {', '.join(IMPORTANCES)}"
        )
    if isinstance(importance, TwoAxisImportance):
        return importance, repr(importance), importance.stats if stats is None else stats
    return importance, type(importance).__name__, stats


def _count_dense(network: nn.Module, inputs: ExampleInputs) -> MacsCount:
    with running_layers(network) as running:
        try:
            return count_macs(network, inputs)
        except TwoAxisError:
            raise
        except Exception as error:
            raise TwoAxisError(
                f"{type(network).__name__} does not run on example_inputs{inside(running, network)} "
                f"({type(error).__name__}: {error}); "
                "give it what its forward takes, for example torch.randn(1, 3, 224, 224)"
            ) from error


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


def _size(network: nn.Module, inputs: ExampleInputs, count: MacsCount, other_counters: bool) -> Size:
    if not other_counters:
        return Size(count.total, count.params)
    return Size(count.total, count.params, host_macs(network, inputs), thop_macs(network, inputs))


def _latencies(network: nn.Module, inputs: ExampleInputs) -> dict[str, float]:
    return {f"batch {n}": measure_latency(network, inputs, n) for n in LATENCY_BATCHES}
