"""Repairs that refit every consumer by itself, on the dense network's inputs: by channels, and over patches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.errors import listing
from tp_twoaxis.reconstruction.affine import (
    RIDGES,
    AffineReconstruction,
    absorb_into_weight,
    affine_reconstruction,
    held_out_error,
    output_error,
    ridge_for,
)
from tp_twoaxis.reconstruction.patch_fit import PatchFit
from tp_twoaxis.reconstruction.patches import fits
from tp_twoaxis.repair.pruned_consumers import pruned_blocks
from tp_twoaxis.repair.repair_report import relative, removed_channels_of
from tp_twoaxis.repair.repair_task import NO_GAIN, ChannelReconstruction, Outcome, RepairTask
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.kernels import first_input, kernel_input
from tp_twoaxis.runtime.layers import select_channels, weight_blocks
from tp_twoaxis.runtime.weights import add_bias, write_weight
from tp_twoaxis.statistics.layer_statistics import LayerStatistics

# the normal equations of the layers that one pass over the images fits
PASS_BYTES = 2**30


def reconstruct_channels(task: RepairTask, *, means_only: bool = False) -> dict[str, Outcome]:
    """Repair ``ridge``: absorb the best affine prediction of the removed channels into every consumer.

    Args:
        task: with statistics of the refittable consumers.
        means_only: repair ``bias``: absorb the removed channels' means alone.
    """
    outcomes = {}
    for name in task.refittable:
        if task.stats is None or task.stats[name].inputs is None:
            outcomes[name] = Outcome(False, "its input is too wide for statistics")
            continue
        task.consumers[name].channels = reconstruct_layer(
            task.network.get_submodule(name),
            task.dense.get_submodule(name),
            task.masks[name],
            task.stats[name],
            None if task.held_out_stats is None else task.held_out_stats[name],
            means_only=means_only,
            ridge=task.ridge,
            batch_norm=task.batch_norm_of(name),
        )
        outcomes[name] = Outcome(True)
    task.stats = task.held_out_stats = None  # they are large, and what comes next needs memory for activations
    return outcomes


def reconstruct_layer(
    layer: nn.Module,
    dense: nn.Module,
    pruned: PrunedChannels,
    entry: LayerStatistics,
    held_out: LayerStatistics | None = None,
    *,
    means_only: bool,
    ridge: float | None,
    batch_norm: nn.Module | None,
) -> ChannelReconstruction:
    """Absorb the reconstruction of a layer's lost inputs into its weight and bias.

    Args:
        layer: of the pruned network.
        dense: its original.
        pruned: channels that it lost.
        entry: statistics of the original, with inputs.
        held_out: the same of images to choose the ridge on.
        means_only: reconstruct means alone; the weight stays.
        ridge: relative; default by the images held out, or from rows and width.
        batch_norm: see :func:`~tp_twoaxis.runtime.weights.add_bias`.
    """
    lost = pruned_blocks(dense, pruned)
    weight = weight_blocks(dense).cpu()
    if means_only:
        ridges: tuple[float, ...] = (float("inf"),)
    elif ridge is None and held_out is not None:
        ridges = RIDGES
    else:
        widest = int((~lost[1]).sum(1).max()) if len(lost[1]) else 0
        ridges = (ridge_for(entry.num_input_rows, widest) if ridge is None else ridge,)
    fits = [_reconstruct_blocks(entry, lost, strength) for strength in ridges]
    best = 0
    if held_out is not None and len(fits) > 1:
        errors = [_error_on(held_out, weight, lost, blocks) for blocks in fits]
        best = errors.index(min(errors))
    weights, shifts, predicted = [], [], []
    for i, reconstruction in enumerate(fits[best].values()):
        rows = weight[lost[0][i]][~lost[2][i]]
        absorbed, shift = absorb_into_weight(rows, reconstruction)
        weights.append(absorbed)
        shifts.append(shift)
        predicted.append(output_error(rows, reconstruction))
    if not means_only:
        write_weight(layer, torch.stack(weights))
    add_bias(layer, torch.cat(shifts), batch_norm)
    variance, width = entry.input_covariance.diagonal(), lost[1].shape[1]
    removed = [
        channel
        for first, reconstruction in fits[best].items()
        for channel in removed_channels_of(reconstruction, variance[first : first + width], first)
    ]
    error = relative(torch.cat(predicted), entry.variance[~pruned.outputs])
    return ChannelReconstruction(removed, error, entry.num_input_rows)


_Lost = tuple[Tensor, Tensor, Tensor]  # blocks that stay, and their lost inputs and outputs


def _reconstruct_blocks(entry: LayerStatistics, lost: _Lost, ridge: float) -> dict[int, AffineReconstruction]:
    """Reconstruct the lost inputs of each block that stays: first channel -> reconstruction."""
    mean, covariance = entry.input_mean, entry.input_covariance
    width = lost[1].shape[1]
    blocks = {}
    for block, inputs in zip(lost[0].tolist(), lost[1], strict=True):
        own = slice(block * width, (block + 1) * width)
        blocks[own.start] = affine_reconstruction(mean[own], covariance[own, own], inputs, ridge=ridge)
    return blocks


def _error_on(entry: LayerStatistics, weight: Tensor, lost: _Lost, blocks: dict[int, AffineReconstruction]) -> float:
    """Mean squared error of a layer's outputs for the inputs that statistics describe."""
    width, total = lost[1].shape[1], 0.0
    for i, (start, found) in enumerate(blocks.items()):
        own = slice(start, start + width)
        rows = weight[lost[0][i]][~lost[2][i]]
        total += held_out_error(rows, found, entry.input_mean[own], entry.input_covariance[own, own])
    return total


def refit_patches(task: RepairTask) -> dict[str, Outcome]:
    """Repair ``patch``: refit consumers by least squares over whole patches of the dense network's kept channels.

    The fit starts from, and shrinks towards, the weights that ``ridge`` gave them. Consumers whose patch is too large
    keep these. The images are read once for every GiB of normal equations.

    Args:
        task: with images, after ``ridge``.
    """
    assert task.images is not None
    network, dense = task.network, task.dense
    outcomes = {
        name: Outcome(True) if fits(network.get_submodule(name)) else Outcome(False, "its patch is too large")
        for name in task.refittable
    }
    for names in _passes([name for name, outcome in outcomes.items() if outcome.refitted], network):
        patch_fits = {name: PatchFit(network.get_submodule(name), images=task.images.count) for name in names}
        passes = [(task.images.forward_pass(dense, "repair patch"), False)]
        if task.images.held_out_batches:
            passes.append((forward_pass(dense, task.images.held_out_batches, what="repair patch"), True))
        for one, held_out in passes:
            with one as run:
                for name, fit in patch_fits.items():
                    hook = _accumulate(fit, task.masks[name], held_out=held_out)
                    run.hook(dense.get_submodule(name), hook, with_kwargs=True)
                for _ in run:
                    pass
        for name, fit in patch_fits.items():
            add_bias(network.get_submodule(name), fit.solve(), task.batch_norm_of(name))
        if kept := [name for name, fit in patch_fits.items() if math.isnan(fit.solved.ridge)]:
            task.notes.append(f"{listing(kept)}: kept as 'ridge' left them, {NO_GAIN}")
    return outcomes


def _accumulate(fit: PatchFit, pruned: PrunedChannels, *, held_out: bool = False) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        x = select_channels(first_input(inputs, named), layer, ~pruned.inputs)
        x = kernel_input(fit.layer, (x,), {})
        fit.update(x, select_channels(output, layer, ~pruned.outputs), held_out=held_out)

    return hook


def _passes(names: list[str], network: nn.Module) -> list[list[str]]:
    """Divide layers among passes whose normal equations stay within memory."""
    passes: list[list[str]] = []
    room = 0
    for name in names:
        blocks, outputs, *patch = weight_blocks(network.get_submodule(name)).shape
        size = patch[0] * patch[1]
        need = 8 * blocks * size * (size + outputs)
        if not passes or need > room:
            passes.append([])
            room = PASS_BYTES
        passes[-1].append(name)
        room -= need
    return passes
