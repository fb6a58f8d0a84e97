"""Repairs by name, in any combination, on a network from which channels were removed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tp_twoaxis.borrow import unwrap
from tp_twoaxis.errors import TwoAxisError, listing
from tp_twoaxis.pruning.phases import timed
from tp_twoaxis.pruning.repair.batch_norm import reestimate_batch_norm
from tp_twoaxis.pruning.repair.images import RepairImages
from tp_twoaxis.pruning.repair.losses import LayerLoss
from tp_twoaxis.pruning.repair.measure import layer_errors
from tp_twoaxis.pruning.repair.one_shot import (
    OneShot,
    check_removed,
    fit_patches,
    fold_layer,
    mixes,
    refuse,
)
from tp_twoaxis.pruning.repair.report import ConsumerRepair, RemovedChannel, RepairReport, relative, removed_channels_of
from tp_twoaxis.pruning.repair.request import WEIGHTS, check_repair
from tp_twoaxis.pruning.repair.sequential import BY_CHANNELS, refit_in_order
from tp_twoaxis.pruning.repair.weights import cannot_fold, shared_weights
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.store import CalibrationStatistics

# fewer rows than this many an input: the fold leans on its ridge
FEW_ROWS = 4
# a sequential repair starts from the channel fold and goes far from it; statistics of so many images will do for that
START_IMAGES = 256


def repair_network(
    network: nn.Module,
    dense: nn.Module,
    losses: dict[str, LayerLoss],
    repair: Iterable[str] = ("sequential",),
    *,
    loader: Iterable[Any] | None = None,
    stats: CalibrationStatistics | None = None,
    max_images: int | None = 5000,
    ridge: float | None = None,
    measure: bool = True,
    progress: bool = True,
) -> RepairReport:
    """Let the channels that stay supply what the removed ones told the layers that read them.

    No labels, no gradients. ``bias`` folds the removed channels' means into each reader; ``ridge`` their best affine
    prediction from the kept ones (one pass for the statistics, or none with ``stats``); ``patch`` goes on from
    there by least squares over whole patches where these have at most 4,608 numbers; ``sequential`` refits all
    layers in forward order on what the repaired network really delivers, BatchNorm included, towards what the dense
    network has behind its sums and rectifiers; ``joint`` also lets a layer that only the next one reads write what
    that one can use best, for several times the cost. Each contains those before it, so of several the last one
    counts. ``bn`` runs after them; after ``sequential`` and ``joint`` it is not needed. Neighbours: He et al. 2017
    (reconstruction of feature maps), ThiNet (Luo et al. 2017).

    A convolution without bias whose BatchNorm alone reads it gets its shift into the running mean; other layers
    without bias get one. Frozen parameters are repaired too and stay frozen. A layer behind a LayerNorm or
    GroupNorm that lost channels is left to ``sequential``, because the norm changes the channels that stay.
    Ranks of ``torchrun`` must read the same images, or their weights part ways; ``bias`` and ``ridge`` may use
    statistics that were reduced over all ranks instead.

    Args:
        network: after removal; changed in place: parameters and buffers are replaced, never written into.
        dense: a copy of it from before removal.
        losses: from :func:`~tp_twoaxis.pruning.repair.losses.layer_losses`, before removal.
        repair: names in :data:`~tp_twoaxis.pruning.repair.request.REPAIRS`; the default kept most accuracy for every
            criterion (``benchmarks/results/cifar10_repair``).
        loader: images, re-iterable; labels are not used. Without it ``stats`` must have the inputs.
        stats: statistics of the dense network by ``calibrate(consumers=True)``; otherwise gathered from ``loader``, for
            ``sequential`` and ``joint`` from 256 images.
        max_images: at most so many for each step.
        ridge: relative ridge of the channel fold; default :func:`~tp_twoaxis.pruning.repair.fold.ridge_for`.
        measure: also measure the layers' errors, on images that no fit has seen.
        progress: show progress bars on stderr.

    Returns:
        Explained shares, predicted and measured errors of every layer that read a removed channel.

    Raises:
        TwoAxisError: bad arguments; the network was already repaired or trained.
        StaleStatisticsError: the statistics are not of ``dense``.

    Example:
        >>> import copy
        >>> import numpy as np
        >>> import torch
        >>> from tp_twoaxis.pruning.graph import build_graph, prunable_groups
        >>> from tp_twoaxis.pruning.plan import PruningPlan
        >>> from tp_twoaxis.pruning.removal import remove
        >>> from tp_twoaxis.pruning.repair.losses import layer_losses
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with torch.no_grad():  # channel 3 is twice channel 0
        ...     net[0].weight[3], net[0].bias[3] = 2 * net[0].weight[0], 2 * net[0].bias[0]
        >>> dense, x = copy.deepcopy(net), torch.randn(256, 3)
        >>> graph = build_graph(net, x)
        >>> groups, _ = prunable_groups(graph, net, [])
        >>> plan = PruningPlan({"0": np.array([False, False, False, True])}, 0.0, 0.0, 1.0, 0.0)
        >>> losses = layer_losses(groups, plan, net)
        >>> remove(graph, groups, plan)
        >>> report = repair_network(net, dense, losses, ("ridge",), loader=[x], progress=False)
        >>> torch.allclose(net(x), dense(x), atol=1e-4), report.consumers[0].removed[0].peers[0][0]
        (True, 0)
    """
    network, dense = unwrap(network), unwrap(dense)
    wanted = check_repair(repair, network, loader, stats)
    level = max((WEIGHTS.index(name) for name in wanted if name in WEIGHTS), default=-1)
    images = None if loader is None else RepairImages(loader, max_images, progress)
    seconds: dict[str, float] = {}
    notes: list[str] = []
    consumers: list[ConsumerRepair] = []
    if level >= 0:
        before = _without_bias(network)
        consumers, notes = _repair_weights(network, dense, losses, level, images, stats, ridge, seconds)
        if new := sorted(before - _without_bias(network)):
            notes.append(f"{listing(new)} got a bias to hold what removed channels supplied on average")
    if "bn" in wanted and loader is not None:
        with timed(seconds, "repair/bn"):
            reestimate_batch_norm(network, loader, max_images=max_images, progress=progress)
    if measure and images is not None and consumers:
        with timed(seconds, "repair/measure"):
            consumers = _measured(consumers, network, dense, losses, images.held_out)
    held = 0 if not measure or images is None or not consumers else len(images.held_out)
    return RepairReport(list(wanted), consumers, held, seconds, notes)


def _repair_weights(
    network: nn.Module,
    dense: nn.Module,
    losses: dict[str, LayerLoss],
    level: int,
    images: RepairImages | None,
    stats: CalibrationStatistics | None,
    ridge: float | None,
    seconds: dict[str, float],
) -> tuple[list[ConsumerRepair], list[str]]:
    """Fold at channel level, and go on from there as far as asked for; describe each reader."""
    reasons = _readers(network, dense, losses)
    with timed(seconds, "repair/statistics"):
        folded = [name for name, reason in reasons.items() if not reason]
        stats = _statistics(dense, folded, stats, images, START_IMAGES if level >= 3 else None)
    done: dict[str, OneShot] = {}
    first = WEIGHTS[min(level, 1)]
    with timed(seconds, f"repair/{first}"):
        for name in [name for name, reason in reasons.items() if not reason]:
            if stats is None or stats[name].inputs is None:
                reasons[name] = "its input is too wide for statistics"
                continue
            norm = losses[name].batch_norm
            done[name] = fold_layer(
                network.get_submodule(name),
                dense.get_submodule(name),
                losses[name],
                stats[name],
                means_only=level == 0,
                ridge=ridge,
                batch_norm=None if norm is None else network.get_submodule(norm),
            )
    by = {name: first if name in done else "none" for name in reasons}
    notes = []
    if level >= 2 and images is not None:
        with timed(seconds, f"repair/{WEIGHTS[level]}"):
            if level == 2:
                outcome = fit_patches(network, dense, losses, list(done), images)
            else:
                outcome, used = refit_in_order(network, dense, losses, images, joint=WEIGHTS[level] == "joint")
                notes.append(f"{WEIGHTS[level]} repair ran on {used} images")
        for name in [name for name in reasons if name in outcome]:
            reasons[name] = outcome[name]
            by[name] = WEIGHTS[level] if outcome[name] in ("", BY_CHANNELS) else by[name]
    consumers = [_describe(n, by[n], reason, losses[n], done.get(n), stats) for n, reason in reasons.items()]
    fallen: dict[str, list[str]] = {}
    for consumer in consumers:
        if consumer.reason:
            how = "not folded" if consumer.repair == "none" else f"mended by {consumer.repair}"
            fallen.setdefault(f"{how}, {consumer.reason}", []).append(consumer.layer)
    notes += [f"{listing(names)}: {why}" for why, names in fallen.items()]
    if norms := dict.fromkeys(norm for name in reasons for norm in losses[name].norms):
        notes.append(f"{listing(norms)}: mean and variance over fewer channels than before, which no fold can undo")
    for consumer in consumers:
        if 0 < consumer.rows < FEW_ROWS * consumer.kept:
            notes.append(
                f"{consumer.layer}: {consumer.rows} rows for {consumer.kept} inputs are few, so the fold is damped; "
                "repair from more images"
            )
    return consumers, notes


def _readers(network: nn.Module, dense: nn.Module, losses: dict[str, LayerLoss]) -> dict[str, str]:
    """List the layers that read removed channels, each with why it cannot be folded, or ``""``.

    Depthwise convolutions are not among them: they pass channels on to the next layer, which is.
    """
    shared = shared_weights(network)
    readers = {}
    for name, loss in losses.items():
        if not bool(loss.inputs.any()):
            continue
        layer, original = network.get_submodule(name), dense.get_submodule(name)
        if cannot_fold(original) is None:
            check_removed(name, layer, original, loss)
            if not mixes(original, loss):
                continue
        readers[name] = refuse(layer, loss, shared)
    return readers


def _statistics(
    dense: nn.Module,
    names: list[str],
    stats: CalibrationStatistics | None,
    images: RepairImages | None,
    enough: int | None,
) -> CalibrationStatistics | None:
    """Give statistics of what the layers read: those at hand if they have them all, or new ones of enough images."""
    if not names:
        return None
    if stats is not None and stats.consumers and all(name in stats for name in names):
        stats.verify(dense, names)
        return stats
    if images is None:
        missing = [name for name in names if stats is None or name not in stats]
        raise TwoAxisError(
            f"{listing(missing or names)}: what these layers read was not recorded; call calibrate(consumers=True) "
            "with all layers, or pass loader=..."
        )
    return calibrate(
        dense,
        images.rest,
        target=None,
        layers=names,
        consumers=True,
        max_images=min((limit for limit in (images.max_images, enough) if limit is not None), default=None),
        progress=images.progress,
    )


def _describe(
    name: str, by: str, reason: str, loss: LayerLoss, done: OneShot | None, stats: CalibrationStatistics | None
) -> ConsumerRepair:
    kept = int((~loss.inputs).sum())
    if done is None or stats is None:
        removed = [RemovedChannel(channel, None, []) for channel in loss.inputs.nonzero()[:, 0].tolist()]
        return ConsumerRepair(name, by, reason, 0, kept, removed)
    entry = stats[name]
    variance = entry.input_covariance.diagonal()
    removed = [
        channel
        for first, fold in done.folds.items()
        for channel in removed_channels_of(fold, variance[first : first + len(fold.kept) + len(fold.removed)], first)
    ]
    power = entry.variance[~loss.outputs]
    return ConsumerRepair(name, by, reason, done.rows, kept, removed, relative(done.predicted, power))


def _measured(
    consumers: list[ConsumerRepair],
    network: nn.Module,
    dense: nn.Module,
    losses: dict[str, LayerLoss],
    images: Tensor,
) -> list[ConsumerRepair]:
    parameter = next(network.parameters())
    names = [c.layer for c in consumers if cannot_fold(dense.get_submodule(c.layer)) is None]
    errors = layer_errors(network, dense, losses, names, images.to(parameter.device, parameter.dtype))
    return [
        replace(c, measured=errors[c.layer][0], in_network=errors[c.layer][1]) if c.layer in errors else c
        for c in consumers
    ]


def _without_bias(network: nn.Module) -> set[str]:
    return {name for name, module in network.named_modules() if module._parameters.get("bias", ...) is None}
