"""From a trained network and an importance to a smaller network at a MACs target, or to no change at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tp_twoaxis.borrow import ModelSnapshot, preserved_rng, unwrap
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance.groups import root_size
from tp_twoaxis.importance.two_axis import TwoAxisImportance
from tp_twoaxis.pruning.graph import PrunableGroup, build_graph, cost_model, group_key, prunable_groups
from tp_twoaxis.pruning.macs import (
    ExampleInputs,
    MacsCount,
    count_macs,
    host_macs,
    measure_latency,
    thop_macs,
)
from tp_twoaxis.pruning.plan import PruningPlan, ScoredGroup, make_plan
from tp_twoaxis.pruning.repair import check_repair, reestimate_batch_norm
from tp_twoaxis.pruning.report import GroupReport, PruningReport, Size
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.layers import CHANNEL_LAYERS
from tp_twoaxis.statistics.store import CalibrationStatistics

# the cost model is exact but for exotic graphs; each further try corrects it by what was measured
TRIES = 4
LATENCY_BATCHES = (1, 64)


def prune_to_flops(
    model: nn.Module,
    example_inputs: ExampleInputs,
    importance: str | Callable[[Any], Tensor],
    *,
    flops: float = 0.5,
    repair: Iterable[str] = ("bn",),
    stats: CalibrationStatistics | None = None,
    loader: Iterable[Any] | None = None,
    ignored_layers: Iterable[nn.Module | str] = (),
    min_keep: float = 0.1,
    round_to: int | None = None,
    tolerance: float = 0.01,
    max_images: int | None = 5000,
    latency: bool = False,
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
        importance: any Torch-Pruning importance, ours or the host's, or a score's name (then ``stats``, or
            ``loader`` to calibrate from). Gradient-based ones need ``loss.backward()`` before.
        flops: share of the dense MACs to **keep**, in (0, 1].
        repair: ``("bn",)`` re-estimates BatchNorm statistics from ``loader``; ``()`` leaves the cut as it is.
        stats: calibration statistics for an importance given by name.
        loader: images for repair (labels are not used there) and, if needed, for calibration.
        ignored_layers: layers or their names that keep their output channels.
        min_keep: share of every group's channels that always stays.
        round_to: keep multiples of this many channels in every group that is cut.
        tolerance: accepted relative distance to the target.
        max_images: at most this many images for repair and for calibration.
        latency: also measure milliseconds at batch 1 and batch 64, before and after.
        progress: show progress bars on stderr.

    Returns:
        The report; when the target could not be met within ``tolerance``, its notes say why.

    Raises:
        TwoAxisError: bad arguments, an untraceable model, a failing importance, a network that no longer runs.
        UnreachableTargetError: no allowed removal reaches the target; the message gives the range.

    Example:
        >>> import tp_twoaxis
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
        ...     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
        >>> loader = [(torch.randn(64, 3, 12, 12), torch.randint(4, (64,)))]
        >>> report = prune_to_flops(net, torch.randn(1, 3, 12, 12), "capture", flops=0.5, loader=loader, progress=False)
        >>> abs(report.achieved - 0.5) < 0.005
        True
    """
    network = unwrap(model)
    seconds: dict[str, float] = {}
    repairs = check_repair(repair, network, loader)
    parameter = next(network.parameters(), None)
    if parameter is None:
        raise TwoAxisError(f"{type(network).__name__} has no parameters, so nothing can be removed")
    inputs = tree_map(lambda x: x.to(parameter.device) if isinstance(x, Tensor) else x, example_inputs)
    ignored = _find_layers(network, ignored_layers)
    with _timed(seconds, "calibrate"):
        ranking, label = _resolve(importance, stats, loader, network, max_images, progress)
    with _timed(seconds, "count"):
        dense = count_macs(network, inputs)
        before = _size(network, inputs, dense)
        latencies = _latencies(network, inputs) if latency else {}
    snapshot = ModelSnapshot(network)
    flags = {name: (p.requires_grad, p.dtype) for name, p in network.named_parameters()}
    modes = [(module, module.training) for module in network.modules()]
    try:
        aim = flops
        for _ in range(TRIES):
            with _timed(seconds, "graph"):
                graph = build_graph(network, inputs)
                groups, notes = prunable_groups(graph, network, ignored)
            with _timed(seconds, "score"):
                scored, unranked = _score(groups, ranking)
            with _timed(seconds, "plan"):
                cost = cost_model(groups, network, dense)
                plan = make_plan(scored, cost, flops=aim, min_keep=min_keep, round_to=round_to, tolerance=tolerance)
            with _timed(seconds, "remove"):
                removed_channels = _describe(groups, plan, network)
                reports = [_group_report(group, plan, network) for group in groups]
                _remove(graph, groups, plan)
                _refresh_widths(network)
            with _timed(seconds, "count"):
                pruned = _count_pruned(network, inputs)
            achieved = pruned.total / dense.total
            missed = abs(achieved - flops) > tolerance * flops
            if not missed or plan.notes or abs(pruned.total - plan.macs) < 1.0:
                break
            snapshot.restore()
            aim = min(1.0, max(1e-6, aim * flops / achieved))
        notes += plan.notes + unranked
        if missed and not plan.notes:
            notes.append(
                f"kept {achieved:.4f} of the MACs instead of {flops:g}: the model runs operations that the cost model "
                "cannot attribute to a group"
            )
        with _timed(seconds, "repair"):
            if "bn" in repairs and loader is not None:
                reestimate_batch_norm(network, loader, max_images=max_images, progress=progress)
        with _timed(seconds, "count"):
            after = _size(network, inputs, pruned)
            if latency:
                later = _latencies(network, inputs)
                latencies = {key: (value[0], later[key][0]) for key, value in latencies.items()}
    except BaseException:
        snapshot.restore()
        raise
    for name, kept in network.named_parameters():
        kept.requires_grad_(flags[name][0])
    for module, training in modes:
        module.training = training
    target = getattr(getattr(importance, "stats", stats), "target", None)
    if target == "predicted_margin":
        notes.append("calibrated without labels or on the prediction: the target axis uses the predicted margin")
    return PruningReport(
        label, flops, achieved, before, after, reports, removed_channels, list(repairs), seconds, latencies, notes
    )


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
    progress: bool,
) -> tuple[Callable[[Any], Tensor], str]:
    if not isinstance(importance, str):
        if not callable(importance):
            raise TwoAxisError(
                f"importance: expected a Torch-Pruning importance or a score's name, got {type(importance).__name__}"
            )
        return importance, repr(importance) if isinstance(importance, TwoAxisImportance) else type(importance).__name__
    if stats is None:
        if loader is None:
            raise TwoAxisError(f"importance {importance!r}: pass stats=calibrate(model, loader), or loader=...")
        stats = calibrate(network, loader, max_images=max_images, progress=progress)
    return TwoAxisImportance(stats, importance), importance


def _score(groups: list[PrunableGroup], importance: Callable[[Any], Tensor]) -> tuple[list[ScoredGroup], list[str]]:
    """Rank every group's channels; a group that the importance declines (None) is left whole."""
    scored, notes = [], []
    for group in groups:
        try:
            scores = importance(group.group)
        except TwoAxisError:
            raise
        except Exception as error:
            raise TwoAxisError(
                f"{type(importance).__name__} raised {type(error).__name__} on the group of {group.name}: {error}; "
                "gradient-based importances need loss.backward() before, others their own preparation"
            ) from error
        if scores is None:
            notes.append(f"{group.name}: {type(importance).__name__} gave no scores, so the group stays whole")
            continue
        size = root_size(group.group)
        if not isinstance(scores, Tensor) or scores.shape != (size,):
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise TwoAxisError(
                f"{type(importance).__name__}: expected a tensor of {size} scores for the group of {group.name}, got {got}"
            )
        values = scores.detach().double().cpu().numpy()
        if not np.isfinite(values).all():
            raise TwoAxisError(
                f"{type(importance).__name__}: expected finite scores for the group of {group.name}, got NaN or infinity"
            )
        place = {channel: position for position, channel in enumerate(group.group[0].idxs)}
        chosen = values[[place[channel] for channel in group.channels]]
        scored.append(ScoredGroup(group_key(group), chosen, group.blocks, group.multiple))
    return scored, notes


def _mask(group: PrunableGroup, plan: PruningPlan) -> npt.NDArray[np.bool_]:
    return plan.removed.get(group_key(group), np.zeros(len(group.channels), dtype=bool))


def _remove(graph: Any, groups: list[PrunableGroup], plan: PruningPlan) -> None:
    """Remove through the host; groups that share a root layer shift each other's channel numbers."""
    gone: dict[nn.Module, list[int]] = {}
    for group in groups:
        mask = _mask(group, plan)
        if not mask.any():
            continue
        root, handler = group.group[0].dep.target.module, group.group[0].dep.handler
        earlier = np.array(gone.get(root, []), dtype=np.int64)
        leaving = [group.channels[i] for i in np.flatnonzero(mask)]
        now = [channel - int((earlier < channel).sum()) for channel in leaving]
        graph.get_pruning_group(root, handler, now).prune()
        for part in group.parts:
            if part.writes:
                lost = part.channels[torch.from_numpy(mask)[part.roots]].tolist()
                gone.setdefault(part.module, []).extend(lost)


def _refresh_widths(network: nn.Module) -> None:
    """Tell torchvision's vision transformer its new width: its forward reshapes to it."""
    for module in network.modules():
        projection = getattr(module, "conv_proj", None)
        if isinstance(projection, nn.Conv2d) and isinstance(getattr(module, "hidden_dim", None), int):
            module.hidden_dim = projection.out_channels  # type: ignore[assignment]


def _count_pruned(network: nn.Module, inputs: ExampleInputs) -> MacsCount:
    try:
        return count_macs(network, inputs)
    except Exception as error:
        raise TwoAxisError(
            f"{type(network).__name__} does not run after removal ({type(error).__name__}: {error}); its code holds a "
            "width that the host cannot see - put the layers concerned into ignored_layers; the model is as it was"
        ) from error


def _describe(groups: list[PrunableGroup], plan: PruningPlan, network: nn.Module) -> dict[str, list[int]]:
    """List the output channels that each layer loses, in dense numbering."""
    names = {module: name for name, module in network.named_modules()}
    lost: dict[str, set[int]] = {}
    for group in groups:
        mask = torch.from_numpy(_mask(group, plan))
        for part in group.parts:
            if part.writes and isinstance(part.module, CHANNEL_LAYERS):
                lost.setdefault(names[part.module], set()).update(part.channels[mask[part.roots]].tolist())
    return {name: sorted(channels) for name, channels in lost.items() if channels}


def _group_report(group: PrunableGroup, plan: PruningPlan, network: nn.Module) -> GroupReport:
    names = {module: name for name, module in network.named_modules()}
    mask = _mask(group, plan)
    layers = [
        f"{names[part.module]} ({'writes' if part.writes else 'reads'})"
        for part in group.parts
        if isinstance(part.module, CHANNEL_LAYERS) and part.module in names
    ]
    kept = [channel for channel, leaves in zip(group.channels, mask, strict=True) if not leaves]
    removed = [channel for channel, leaves in zip(group.channels, mask, strict=True) if leaves]
    return GroupReport(group_key(group), layers, kept, removed)


def _size(network: nn.Module, inputs: ExampleInputs, count: MacsCount) -> Size:
    with preserved_rng():
        return Size(count.total, count.params, host_macs(network, inputs), thop_macs(network, inputs))


def _latencies(network: nn.Module, inputs: ExampleInputs) -> dict[str, tuple[float, float]]:
    measured = {f"batch {n}": measure_latency(network, inputs, n) for n in LATENCY_BATCHES}
    return {key: (value, value) for key, value in measured.items()}
