"""Repairs that refit every consumer by itself, on the dense network's inputs: by channels, and over patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.reconstruction.affine import absorb_into_weight, affine_reconstruction, output_error, ridge_for
from tp_twoaxis.reconstruction.patches import PatchFit, fits
from tp_twoaxis.repair.pruned_consumers import first_input, pruned_blocks
from tp_twoaxis.repair.repair_task import ChannelReconstruction, Outcome, RepairTask
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
            means_only=means_only,
            ridge=task.ridge,
            batch_norm=task.batch_norm_of(name),
        )
        outcomes[name] = Outcome(True)
    return outcomes


def reconstruct_layer(
    layer: nn.Module,
    dense: nn.Module,
    pruned: PrunedChannels,
    entry: LayerStatistics,
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
        means_only: reconstruct means alone; the weight stays.
        ridge: relative; default from rows and width.
        batch_norm: see :func:`~tp_twoaxis.runtime.weights.add_bias`.
    """
    mean, covariance = entry.input_mean, entry.input_covariance
    alive, inputs, outputs = pruned_blocks(dense, pruned)
    width = inputs.shape[1]
    weight = weight_blocks(dense).cpu()
    blocks = {}
    weights, shifts, errors = [], [], []
    for i, block in enumerate(alive.tolist()):
        own = slice(block * width, (block + 1) * width)
        strength = ridge_for(entry.num_input_rows, int((~inputs[i]).sum())) if ridge is None else ridge
        reconstruction = affine_reconstruction(
            mean[own], covariance[own, own], inputs[i], ridge=float("inf") if means_only else strength
        )
        rows = weight[block][~outputs[i]]
        absorbed, shift = absorb_into_weight(rows, reconstruction)
        blocks[own.start] = reconstruction
        weights.append(absorbed)
        shifts.append(shift)
        errors.append(output_error(rows, reconstruction))
    if not means_only:
        write_weight(layer, torch.stack(weights))
    add_bias(layer, torch.cat(shifts), batch_norm)
    return ChannelReconstruction(blocks, torch.cat(errors), entry.num_input_rows)


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
        with task.images.forward_pass(dense, "repair patch") as run:
            for name, fit in patch_fits.items():
                run.hook(dense.get_submodule(name), _accumulate(fit, task.masks[name]), with_kwargs=True)
            for _ in run:
                pass
        for name, fit in patch_fits.items():
            add_bias(network.get_submodule(name), fit.solve(), task.batch_norm_of(name))
    return outcomes


def _accumulate(fit: PatchFit, pruned: PrunedChannels) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        x = select_channels(first_input(inputs, named), layer, ~pruned.inputs)
        fit.update(x, select_channels(output, layer, ~pruned.outputs))

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
