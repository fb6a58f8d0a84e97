"""Repairs by name, in any combination, of a network from which channels were removed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.errors import TwoAxisError, listing
from tp_twoaxis.repair.batch_norm import batch_norms, reestimate_batch_norm
from tp_twoaxis.repair.guard import output_distance
from tp_twoaxis.repair.images import FEWEST_HELD_OUT, HELD_OUT_EVERY, RepairImages
from tp_twoaxis.repair.layer_errors import layer_errors
from tp_twoaxis.repair.pruned_consumers import pruned_consumers
from tp_twoaxis.repair.repair_report import HELD_BACK, ConsumerRepair, Distance, RemovedChannel, RepairReport
from tp_twoaxis.repair.repair_task import TRAINING_STEPS, ConsumerState, RepairTask
from tp_twoaxis.repair.strategies import REPAIRS, RepairStrategy, check_repair, refits, stages_of
from tp_twoaxis.runtime.inputs import CallSignature
from tp_twoaxis.runtime.model_state import ModelSnapshot, unwrap
from tp_twoaxis.runtime.timing import timed
from tp_twoaxis.runtime.weights import cannot_refit
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.store import CalibrationStatistics

# with fewer rows than this many an input, a reconstruction by channels depends on its ridge
FEW_ROWS = 4
# images that BatchNorm is re-estimated on to be compared with
JUDGED_NORM_IMAGES = 256
# held-out images that the layers' errors are measured on, at most
MEASURED_IMAGES = 64


def repair_network(
    network: nn.Module,
    dense: nn.Module,
    masks: dict[str, PrunedChannels],
    repair: str | Iterable[str] = ("sequential",),
    *,
    loader: Iterable[Any] | None = None,
    stats: CalibrationStatistics | None = None,
    max_images: int | None = 5000,
    ridge: float | None = None,
    whole: Iterable[str] = (),
    measure: bool = True,
    guard: bool = True,
    max_memory: float = 4.0,
    training_steps: int = TRAINING_STEPS,
    progress: bool = True,
) -> RepairReport:
    """Reconstruct, from the channels that stay, what the removed ones contributed to their consumers.

    No labels, and but for ``distill`` no gradients. ``bias`` adds the contribution of the removed channels' means to
    each consumer's bias; ``ridge`` absorbs their best affine prediction from the kept ones into its weight (one pass
    for the statistics, or none with ``stats``); ``patch`` goes on from there by least squares over whole patches where
    these have at most 4,608 numbers; ``sequential`` refits all layers in forward order on their inputs in the repaired
    network, BatchNorm included, towards the dense network's tensors after its sums and rectifiers; ``joint`` also
    changes a layer whose only consumer is the next one to compute what that one can use best, for several times the
    cost; ``distill`` goes on from ``joint`` and trains all layers together towards the dense network's features,
    minutes instead of seconds (:func:`~tp_twoaxis.repair.distillation.distill`). Each contains those before it, so of
    several only the last one runs. ``bn`` runs after them; after ``sequential`` and the later ones it is not needed.

    Every fifth image, at most 128, is held out of all fits. On these images each fit chooses its ridge, and each change
    is made whole, in part, or not at all. In the end the outputs of the network are compared with those after the same
    repair without refits (``bn`` for ``sequential`` and the later ones): where these are nearer to the dense network's,
    they stay. The report says so. Related work: He et al. 2017 (reconstruction of feature maps), ThiNet (Luo et al.
    2017).

    The shift of a convolution without bias whose only consumer is a BatchNorm goes into the running mean; other layers
    without bias get one. Frozen parameters are repaired too and stay frozen. A layer behind a LayerNorm or GroupNorm
    that lost channels is repaired by ``sequential`` and ``joint`` only, because the norm changes the kept channels.
    Ranks of ``torchrun`` must read the same images, or their weights diverge; ``bias`` and ``ridge`` may use
    statistics that were reduced over all ranks instead.

    Args:
        network: after removal; changed in place: parameters and buffers are replaced, never written into.
        dense: a copy of it from before removal.
        masks: from :func:`~tp_twoaxis.dependency.channel_masks.pruned_channels`, before removal.
        repair: names in :data:`~tp_twoaxis.repair.strategies.REPAIRS`, see
            :func:`~tp_twoaxis.known_names.parse_repair`; the default kept most accuracy for every criterion
            (``benchmarks/results/cifar10_repair``).
        loader: images, re-iterable; labels are not used. Without it ``stats`` must have the inputs.
        stats: statistics of the dense network by ``calibrate(consumers=True)``; otherwise gathered from ``loader``, for
            ``sequential`` and ``joint`` from 128 images.
        max_images: at most so many for each step.
        ridge: relative ridge of ``ridge``; default by the images held out, or from the number of rows where there are
            none, :func:`~tp_twoaxis.reconstruction.affine.ridge_for`.
        whole: names of layers that keep their weights unless they read a removed channel; ``sequential`` and ``joint``
            refit all others behind the first removal, because their inputs changed. BatchNorms have statistics, not
            weights, and go with their inputs.
        guard: hold images out and judge every change on them; without, all images are fitted and every fit is kept.
        measure: also measure the layers' errors, on images that no fit has used.
        max_memory: GiB for the activations that wait in ``sequential`` and ``joint``; images that are too many for the
            first layers join behind them, where activations are smaller.
        training_steps: of ``distill``.
        progress: show progress bars on stderr.

    Returns:
        Explained shares, predicted and measured errors of every consumer of a removed channel.

    Raises:
        TwoAxisError: bad arguments; the network was already repaired or trained; fewer than ten images and ``guard``.
        StaleStatisticsError: the statistics are not of ``dense``.

    Example:
        >>> import copy
        >>> import numpy as np
        >>> import torch
        >>> from tp_twoaxis.dependency.channel_masks import pruned_channels
        >>> from tp_twoaxis.dependency.graph import build_graph, prunable_groups
        >>> from tp_twoaxis.dependency.removal import remove
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with torch.no_grad():  # channel 3 is twice channel 0
        ...     net[0].weight[3], net[0].bias[3] = 2 * net[0].weight[0], 2 * net[0].bias[0]
        >>> dense, x = copy.deepcopy(net), torch.randn(256, 3)
        >>> graph = build_graph(net, x)
        >>> groups, _ = prunable_groups(graph, net, [])
        >>> removed = {"0": np.array([False, False, False, True])}
        >>> masks = pruned_channels(groups, removed, net)
        >>> remove(graph, groups, removed)
        >>> report = repair_network(net, dense, masks, "ridge", loader=[x], progress=False)
        >>> torch.allclose(net(x), dense(x), atol=1e-4), report.consumers[0].removed[0].peers[0][0]
        (True, 0)
    """
    network, dense = unwrap(network), unwrap(dense)
    repairs = check_repair(repair, network, loader, stats)
    images = (
        None
        if loader is None
        else RepairImages(
            loader, max_images, progress, guard and refits(repairs), CallSignature.of(network), max_memory
        )
    )
    task = RepairTask(network, dense, masks, images, stats, ridge, frozenset(whole), training_steps=training_steps)
    seconds: dict[str, float] = {}
    consumers: list[ConsumerRepair] = []
    stages = stages_of(repairs)
    unrepaired = ModelSnapshot(network)
    if refits(repairs):
        task.consumers = {name: ConsumerState(why) for name, why in pruned_consumers(network, dense, masks).items()}
        before = _without_bias(network)
        with timed(seconds, "repair/statistics"):
            task.stats, task.held_out_stats = _consumer_statistics(task, stages)
        _run([stage for stage in stages if stage.refits], task, seconds)
        consumers = [_describe(name, task) for name in task.consumers]
        _add_notes(task, consumers)
        if new := sorted(before - _without_bias(network)):
            task.notes.append(f"{listing(new)} got a bias for what removed channels contributed on average")
    _run([stage for stage in stages if not stage.refits], task, seconds)
    distance = None
    if consumers and images is not None and images.hold_out:
        with timed(seconds, "repair/judge"):
            distance = _judge(task, repairs, unrepaired)
        if distance.held_back:
            consumers = [replace(c, repair="none", reason=HELD_BACK) for c in consumers]
    elif consumers and guard:
        task.notes.append("no images to hold out, so nothing judged the repair; pass loader=... to have it judged")
    held_out = 0
    if measure and images is not None and images.hold_out and consumers:
        with timed(seconds, "repair/measure"):
            consumers = _measure(task, consumers, images)
        held_out = min(len(images.held_out or ()), MEASURED_IMAGES)
    return RepairReport(list(repairs), consumers, held_out, seconds, task.notes, distance)


def _run(stages: list[RepairStrategy], task: RepairTask, seconds: dict[str, float]) -> None:
    for stage in stages:
        with timed(seconds, f"repair/{stage.name}"):
            task.record(stage.name, stage.run(task))


def _judge(task: RepairTask, repairs: tuple[str, ...], unrepaired: ModelSnapshot) -> Distance:
    """Compare the repaired network with the same repair without refits, on images held out; the nearer one stays."""
    assert task.images is not None
    network, images = task.network, task.images
    after = output_distance(network, task.dense, images.held_out_batches)
    repaired = ModelSnapshot(network)
    unrepaired.restore()
    renews = bool(batch_norms(network)) and any(REPAIRS[name].renews_norms for name in repairs)

    def renew(most: int | None) -> None:
        limits = [limit for limit in (images.most_fitted, most) if limit is not None]
        reestimate_batch_norm(
            network, images.fit_batches, max_images=min(limits, default=None), progress=images.progress
        )

    if renews:
        renew(JUDGED_NORM_IMAGES)
    simple = output_distance(network, task.dense, images.held_out_batches)
    held_back = not after <= simple * (1 + 1e-6)
    if held_back and renews:
        renew(None)
    if held_back:
        what = "BatchNorm statistics alone" if renews else "no repair"
        task.notes.append(
            f"held back: on {len(images.held_out or ())} images that no fit saw, the outputs' distance from the dense "
            f"network's is {after:.3g} with {'+'.join(repairs)} and {simple:.3g} with {what}, so that was kept; repair "
            "from more images"
        )
    else:
        repaired.restore()
    return Distance(after, simple, held_back)


def _consumer_statistics(
    task: RepairTask, stages: list[RepairStrategy]
) -> tuple[CalibrationStatistics | None, CalibrationStatistics | None]:
    """Give statistics of the consumers' inputs on the fitted images, and on those held out, if there are any.

    Where no image is held out, statistics at hand serve if they have all consumers.
    """
    names, stats, images = task.refittable, task.stats, task.images
    if not names or not any("consumer statistics" in stage.needs for stage in stages):
        return None, None
    judged = images is not None and images.hold_out
    if not judged and stats is not None and stats.consumers and all(name in stats for name in names):
        stats.verify(task.dense, names)
        return stats, None
    if images is None:
        missing = [name for name in names if stats is None or name not in stats]
        raise TwoAxisError(
            f"{listing(missing or names)}: what these layers read was not recorded; call calibrate(consumers=True) "
            "with all layers, or pass loader=..."
        )
    enough = min((stage.start_images for stage in stages if stage.start_images is not None), default=None)
    limits = [limit for limit in (images.most_fitted, enough) if limit is not None]
    gather = partial(calibrate, task.dense, target=None, layers=names, consumers=True)
    fitted = gather(images.fit_batches, max_images=min(limits, default=None), progress=images.progress)
    if not judged:
        return fitted, None
    judges = None if enough is None else max(enough // HELD_OUT_EVERY, FEWEST_HELD_OUT)
    return fitted, gather(images.held_out_batches, max_images=judges, progress=False)


def _describe(name: str, task: RepairTask) -> ConsumerRepair:
    state, pruned = task.consumers[name], task.masks[name]
    kept, found = int((~pruned.inputs).sum()), state.channels
    if found is None:
        removed = [RemovedChannel(channel, None, []) for channel in pruned.inputs.nonzero()[:, 0].tolist()]
        return ConsumerRepair(name, state.repair, state.reason, 0, kept, removed)
    return ConsumerRepair(name, state.repair, state.reason, found.rows, kept, found.removed, found.predicted)


def _add_notes(task: RepairTask, consumers: list[ConsumerRepair]) -> None:
    """Note the consumers that were not repaired as requested, norms over fewer channels, and scarce rows."""
    exceptions: dict[str, list[str]] = {}
    for consumer in consumers:
        if consumer.reason:
            how = "not refitted" if consumer.repair == "none" else f"repaired by {consumer.repair}"
            exceptions.setdefault(f"{how}, {consumer.reason}", []).append(consumer.layer)
    task.notes += [f"{listing(names)}: {why}" for why, names in exceptions.items()]
    if norms := dict.fromkeys(norm for consumer in consumers for norm in task.masks[consumer.layer].norms):
        task.notes.append(f"{listing(norms)}: mean and variance over fewer channels than before, which no refit undoes")
    if scarce := [consumer for consumer in consumers if 0 < consumer.rows < FEW_ROWS * consumer.kept]:
        least = min(scarce, key=lambda consumer: consumer.rows / consumer.kept)
        task.notes.append(
            f"{listing(consumer.layer for consumer in scarce)}: few rows, such as {least.rows} for {least.kept} inputs "
            f"in {least.layer}, so reconstructions shrink towards no change; repair from more images"
        )


def _measure(task: RepairTask, consumers: list[ConsumerRepair], images: RepairImages) -> list[ConsumerRepair]:
    names = [c.layer for c in consumers if cannot_refit(task.dense.get_submodule(c.layer)) is None]
    assert images.held_out is not None
    errors = layer_errors(task.network, task.dense, task.masks, names, images.held_out[:MEASURED_IMAGES])
    return [
        replace(c, measured=errors[c.layer][0], in_network=errors[c.layer][1]) if c.layer in errors else c
        for c in consumers
    ]


def _without_bias(network: nn.Module) -> set[str]:
    return {name for name, module in network.named_modules() if module._parameters.get("bias", ...) is None}
