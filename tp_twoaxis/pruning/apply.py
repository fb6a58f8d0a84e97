"""From a trained network and an importance to a smaller network at a MACs target, or to no change at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, get_args

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tp_twoaxis.borrow import ModelSnapshot, unwrap
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.pruning.attention import AttentionUnit
from tp_twoaxis.pruning.criterion import check_steps, interim, renew, resolve
from tp_twoaxis.pruning.cut import Budget, Limits
from tp_twoaxis.pruning.iterate import prune_in_steps
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
from tp_twoaxis.pruning.phases import timed
from tp_twoaxis.pruning.repair import REPAIRS, check_repair, repair_network
from tp_twoaxis.pruning.report import PruningReport, Size
from tp_twoaxis.statistics.store import CalibrationStatistics

LATENCY_BATCHES = (1, 64)


def prune_to_flops(
    model: nn.Module,
    example_inputs: ExampleInputs,
    importance: str | Callable[[Any], Tensor],
    *,
    flops: float = 0.5,
    budget: Budget = "macs",
    steps: int = 1,
    repair: Iterable[str] = ("bn",),
    stats: CalibrationStatistics | None = None,
    loader: Iterable[Any] | None = None,
    ignored_layers: Iterable[nn.Module | str] = (),
    min_keep: float = 0.1,
    round_to: int | None = None,
    attention: AttentionUnit = "heads",
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
        steps: remove in so many steps, each the same share of what is there (``flops ** (i / steps)`` is left after
            step i): score, remove, repair, gather statistics anew, score again. See the notes.
        repair: any of ``bn`` (re-estimate BatchNorm statistics), ``bias``, ``ridge``, ``patch``, ``sequential`` and
            ``joint`` (let the channels that stay supply what left), from ``loader``; see
            :func:`~tp_twoaxis.pruning.repair.repair_network`. ``()`` leaves the cut as it is.
        stats: calibration statistics for an importance given by name; with ``consumers=True`` they serve the
            repairs as well. Later steps score by new ones, of the same layers and target.
        loader: images for repair (labels are not used there) and, if needed, for calibration; re-iterable where there
            are several steps.
        ignored_layers: layers or their names that keep their output channels.
        min_keep: share of every group's channels that always stays; of the dense network's, whatever the steps.
        round_to: keep multiples of this many channels in every group that is cut.
        attention: what attention that is built from linear layers loses: whole ``heads``, or ``head-dims``, the same
            number of queries, keys and values of every head, at places of its own in each. PyTorch's own
            ``nn.MultiheadAttention`` loses head dims with the stream that it reads, either way.
        tolerance: accepted relative distance to the target.
        max_images: at most this many images for repair, for calibration and for what a named baseline gathers.
        other_counters: also report the host's and thop's MACs; in a sweep over small networks they take most of
            the time.
        latency: also measure milliseconds at batch 1 and batch 64, before and after.
        progress: show progress bars on stderr.

    Returns:
        The report; when the target could not be met within ``tolerance``, its notes say why. All of it, channel
        numbers and repaired layers too, compares the dense network with the outcome of all steps.

    Raises:
        TwoAxisError: bad arguments, an untraceable model, a failing importance, a network that no longer runs.
        UnreachableTargetError: no allowed removal reaches the target; the message gives the range.

    Notes:
        Between two steps the repaired network is what is scored. The repair itself starts from the dense network's
        weights and statistics each time and mends all removals so far, so errors do not add up
        (:func:`~tp_twoaxis.pruning.iterate.prune_in_steps`). For training between steps call this function
        once a step, with ``flops`` the share of what is there then.

        An importance given by name is built anew after every step. One given as an object is replaced by a copy with
        new statistics where it is ours, from its own ``loader`` if it has one, and called again as it is where it
        reads nothing but weights. The host's and ours that read gradients or activations stored on the model
        are refused for several steps, because those are of the dense network: give the name.

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
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...     nn.Linear(32, 4))
        >>> report = prune_to_flops(net, x, "cap-a", flops=0.5, steps=3, loader=loader, progress=False)
        >>> report.steps, abs(report.achieved - 0.5) < 0.005
        (3, True)
    """
    network = unwrap(model)
    parameter = next(network.parameters(), None)
    if parameter is None:
        raise TwoAxisError(f"{type(network).__name__} has no parameters, so nothing can be removed")
    if budget not in get_args(Budget):
        raise TwoAxisError(f"budget: expected {' or '.join(get_args(Budget))}, got {budget!r}")
    if attention not in get_args(AttentionUnit):
        raise TwoAxisError(f"attention: expected {' or '.join(get_args(AttentionUnit))}, got {attention!r}")
    repairs = check_repair(repair, network, loader, stats)
    check_steps(steps, importance, loader)
    folds = any(name in repairs for name in REPAIRS if name != "bn")
    inputs = tree_map(lambda x: x.to(parameter.device) if isinstance(x, Tensor) else x, example_inputs)
    limits = Limits(_find_layers(network, ignored_layers), budget, min_keep, round_to, tolerance, attention)
    seconds: dict[str, float] = {}
    snapshot = ModelSnapshot(network)
    trained = {name: p.requires_grad for name, p in network.named_parameters()}
    modes = [(module, module.training) for module in network.modules()]
    try:
        with timed(seconds, "calibrate"):
            ranking, label, stats = resolve(importance, stats, loader, network, max_images, folds, progress)
        with timed(seconds, "count"):
            dense = _count_dense(network, inputs)
            before = _size(network, inputs, dense, other_counters)
            milliseconds = _latencies(network, inputs) if latency else {}
        # the copy reads the network as it is here: statistics and targets of repair are the dense network's
        original = copy.deepcopy(network).requires_grad_(False) if folds else network
        pruned = prune_in_steps(
            network,
            inputs,
            ranking,
            limits,
            dense,
            seconds,
            flops=flops,
            steps=steps,
            mend=lambda losses, last: repair_network(
                network,
                original,
                losses,
                repairs,
                loader=loader,
                stats=stats,
                max_images=max_images,
                measure=last,
                progress=progress,
            ),
            renew=lambda losses: renew(importance, stats, interim(network, losses, loader, max_images, progress)),
            progress=progress,
        )
        with timed(seconds, "count"):
            after = _size(network, inputs, pruned.count, other_counters)
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
    notes = [*pruned.notes, *pruned.mended.notes]
    if getattr(getattr(ranking, "stats", None), "target", None) == "predicted_margin":
        notes.append("calibrated without labels or on the prediction: the target axis uses the predicted margin")
    return PruningReport(
        label,
        flops,
        pruned.achieved,
        before,
        after,
        [report for _, report in pruned.removals.groups],
        pruned.removals.removed_channels,
        list(repairs),
        seconds,
        {key: (first, later[key]) for key, first in milliseconds.items()},
        notes,
        budget,
        pruned.mended.consumers,
        steps,
    )


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


def _size(network: nn.Module, inputs: ExampleInputs, count: MacsCount, other_counters: bool) -> Size:
    if not other_counters:
        return Size(count.total, count.params)
    return Size(count.total, count.params, host_macs(network, inputs), thop_macs(network, inputs))


def _latencies(network: nn.Module, inputs: ExampleInputs) -> dict[str, float]:
    return {f"batch {n}": measure_latency(network, inputs, n) for n in LATENCY_BATCHES}
