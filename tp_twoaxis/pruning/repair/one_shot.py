"""Folds of one moment: every consumer on the dense network's own statistics of its inputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.borrow import evaluating, preserved_rng
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.pruning.repair.fold import Fold, affine_fold, fold_weight, output_error, ridge_for
from tp_twoaxis.pruning.repair.images import RepairImages
from tp_twoaxis.pruning.repair.losses import LayerLoss
from tp_twoaxis.pruning.repair.patch import PatchFit, fits
from tp_twoaxis.pruning.repair.weights import SHARED, add_bias, cannot_fold, read_weight, write_weight
from tp_twoaxis.statistics.layer_statistics import LayerStatistics

BEHIND_NORM = "a norm before it loses channels, so those that stay change too: sequential repair can reach it"
# the normal equations of the layers that one pass over the images fits
PASS_BYTES = 2**30


def kept_blocks(dense: nn.Module, loss: LayerLoss) -> tuple[Tensor, Tensor, Tensor]:
    """Arrange a layer's losses by its blocks.

    Returns:
        Blocks [B'] that keep an output, and of those blocks the lost inputs [B', I] and outputs [B', O], bool.
    """
    blocks = len(read_weight(dense))
    inputs, outputs = loss.inputs.reshape(blocks, -1), loss.outputs.reshape(blocks, -1)
    alive = (~outputs.all(1)).nonzero()[:, 0]
    return alive, inputs[alive], outputs[alive]


def mixes(dense: nn.Module, loss: LayerLoss) -> bool:
    """Whether a layer mixes a lost input into an output that stays; a depthwise convolution never does.

    Example:
        >>> lost = torch.tensor([True, False])
        >>> mixes(nn.Conv2d(2, 2, 3, groups=2), LayerLoss(lost, lost)), mixes(nn.Conv2d(2, 2, 3), LayerLoss(lost, lost))
        (False, True)
    """
    return bool(kept_blocks(dense, loss)[1].any())


def check_removed(name: str, layer: nn.Module, dense: nn.Module, loss: LayerLoss) -> None:
    """Check that a layer is the dense one with its lost channels cut out, and nothing else.

    Raises:
        TwoAxisError: it is not; for example because it was repaired before.
    """
    alive, inputs, outputs = kept_blocks(dense, loss)
    now, old = read_weight(layer), read_weight(dense).cpu()
    expected = [old[b][~outputs[i]][:, ~inputs[i]] for i, b in enumerate(alive.tolist())]
    if len(expected) != len(now) or any(
        part.shape != cut.shape or not torch.equal(part, cut) for part, cut in zip(now.cpu(), expected, strict=True)
    ):
        raise TwoAxisError(
            f"{name}: expected the dense layer's weights without the removed channels, got others - it was repaired or "
            "trained after removal; repair a network once, straight after removal"
        )


def refuse(layer: nn.Module, loss: LayerLoss, shared: Counter[int]) -> str:
    """Say why a layer is not folded at once, or ``""``."""
    if reason := cannot_fold(layer):
        return reason
    if shared[id(layer.weight)] > 1:
        return SHARED
    if loss.norms:
        return BEHIND_NORM
    return ""


@dataclass(frozen=True)
class OneShot:
    """What a fold did to one layer.

    Attributes:
        folds: first channel of each block that stays -> its fold, in the block's own numbering.
        predicted: [O] expected variance of the outputs' error.
        rows: behind the statistics.
    """

    folds: dict[int, Fold]
    predicted: Tensor
    rows: int


def fold_layer(
    layer: nn.Module,
    dense: nn.Module,
    loss: LayerLoss,
    entry: LayerStatistics,
    *,
    means_only: bool,
    ridge: float | None,
    batch_norm: nn.Module | None,
) -> OneShot:
    """Fold a layer's lost inputs into its weights and bias.

    Args:
        layer: of the pruned network.
        dense: its original.
        loss: between the two.
        entry: statistics of the original, with inputs.
        means_only: fold means and leave the weights.
        ridge: relative; default from rows and width.
        batch_norm: see :func:`~tp_twoaxis.pruning.repair.weights.add_bias`.
    """
    mean, covariance = entry.input_mean, entry.input_covariance
    alive, inputs, outputs = kept_blocks(dense, loss)
    width = inputs.shape[1]
    weight = read_weight(dense).cpu()
    folds: dict[int, Fold] = {}
    weights, shifts, errors = [], [], []
    for i, block in enumerate(alive.tolist()):
        own = slice(block * width, (block + 1) * width)
        strength = ridge_for(entry.num_input_rows, int((~inputs[i]).sum())) if ridge is None else ridge
        fold = affine_fold(mean[own], covariance[own, own], inputs[i], ridge=float("inf") if means_only else strength)
        rows = weight[block][~outputs[i]]
        folded, shift = fold_weight(rows, fold)
        folds[own.start] = fold
        weights.append(folded)
        shifts.append(shift)
        errors.append(output_error(rows, fold))
    if not means_only:
        write_weight(layer, torch.stack(weights))
    add_bias(layer, torch.cat(shifts), batch_norm)
    return OneShot(folds, torch.cat(errors), entry.num_input_rows)


def fit_patches(
    network: nn.Module,
    dense: nn.Module,
    losses: dict[str, LayerLoss],
    names: list[str],
    images: RepairImages,
) -> dict[str, str]:
    """Refit layers by least squares over whole patches of the dense network's kept channels.

    Args:
        network: pruned, and folded at channel level, which is where the fit starts and what it shrinks to.
        dense: its original.
        losses: from before removal.
        names: layers to fit; those whose patch is too large stay as they are.
        images: read once for every GiB of normal equations.

    Returns:
        Layer name -> ``""``, or why it was not fitted.
    """
    outcome = {name: "" if fits(network.get_submodule(name)) else "its patch is too large" for name in names}
    parameter = next(dense.parameters())
    for part in _passes([name for name, reason in outcome.items() if not reason], network):
        rounds = {name: PatchFit(network.get_submodule(name), images=images.count) for name in part}

        def hook_for(name: str, fit: PatchFit) -> Any:
            loss = losses[name]

            def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
                x = (inputs or tuple(named.values()))[0]
                fit.update(keep_channels(x, layer, ~loss.inputs), keep_channels(output, layer, ~loss.outputs))

            return hook

        handles = [
            dense.get_submodule(name).register_forward_hook(hook_for(name, fit), with_kwargs=True)
            for name, fit in rounds.items()
        ]
        try:
            with preserved_rng(), evaluating(dense), images.batches("repair patch") as batches:
                for batch in batches:
                    dense(batch.images.to(parameter.device, parameter.dtype))
        finally:
            for handle in handles:
                handle.remove()
        for name, fit in rounds.items():
            norm = losses[name].batch_norm
            add_bias(network.get_submodule(name), fit.solve(), None if norm is None else network.get_submodule(norm))
    return outcome


def _passes(names: list[str], network: nn.Module) -> list[list[str]]:
    """Share layers out to passes whose normal equations stay within memory."""
    passes: list[list[str]] = []
    room = 0
    for name in names:
        weight = read_weight(network.get_submodule(name))
        blocks, outputs, *patch = weight.shape
        size = patch[0] * patch[1]
        need = 8 * blocks * size * (size + outputs)
        if not passes or need > room:
            passes.append([])
            room = PASS_BYTES
        passes[-1].append(name)
        room -= need
    return passes


def keep_channels(tensor: Tensor, layer: nn.Module, kept: Tensor) -> Tensor:
    """Select channels of what a layer reads or writes; ``kept`` [C] bool."""
    if bool(kept.all()):
        return tensor
    dimension = -len(layer.kernel_size) - 1 if isinstance(layer, _ConvNd) else -1
    return tensor.index_select(dimension, kept.nonzero()[:, 0].to(tensor.device))
