"""Layers refitted in forward order: from what the repaired network delivers to what the dense one wrote."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.borrow import evaluating, preserved_rng
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.pruning.repair.batch_norm import batch_norms
from tp_twoaxis.pruning.repair.companion import Companion
from tp_twoaxis.pruning.repair.fold import ridge_for, ridge_regression
from tp_twoaxis.pruning.repair.images import RepairImages
from tp_twoaxis.pruning.repair.junctions import untold
from tp_twoaxis.pruning.repair.losses import LayerLoss
from tp_twoaxis.pruning.repair.one_shot import keep_channels
from tp_twoaxis.pruning.repair.patch import FEWEST_ROWS, MOST_ROWS, PatchFit, fits
from tp_twoaxis.pruning.repair.weights import (
    SHARED,
    add_bias,
    blocks_of,
    cannot_fold,
    read_weight,
    shared_weights,
    write_weight,
)
from tp_twoaxis.pruning.repair.writers import Writers, private_layers
from tp_twoaxis.statistics.layers import channel_layers, channels_last_view
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.recorder import WIDEST_INPUT, stratified

BY_CHANNELS = "by channels because its patch is too large"
# the images run as one batch, so many that their activations in both networks stay below this
BYTES = 2**32
# activations alive at a time, in units of the largest layer's input and output: a shortcut, a branch, a copy of work
ALIVE, ALIVE_JOINT = 3, 5


def refit_in_order(
    network: nn.Module,
    dense: nn.Module,
    losses: dict[str, LayerLoss],
    images: RepairImages,
    *,
    joint: bool = False,
) -> tuple[dict[str, str], int]:
    """Refit every layer behind the first removal, and re-estimate every BatchNorm, on the way of one forward pass.

    When a layer is about to run in the pruned network, its weights become the least-squares map from what it is about
    to read to what the dense layer writes for the same images (outputs that stay), shrunk towards its present
    weights; then it runs. So each layer makes good for what the ones before it could not. A BatchNorm takes mean
    and variance from what it is about to read. Layers that lost nothing are refitted as well, because their inputs
    changed. Where what a layer wrote arrives at a sum or a rectifier, it is corrected once more, by what counts
    there: see :class:`~tp_twoaxis.pruning.repair.writers.Writers`. A layer whose patch is too large is refitted at
    channel level: its dense inputs are predicted from its present ones, and the prediction goes into its weights at
    every tap.

    All images run as one batch, and the dense network beside it, so the pass costs two forward passes plus the
    fits. Memory: the activations of that batch; it is cut to about 4 GiB of them, at the price of fewer images
    (``joint`` has more of them alive at a time, so fewer still).

    Args:
        network: the pruned network; parameters and buffers are replaced.
        dense: its original.
        losses: from before removal.
        images: read once.
        joint: at rectifiers, also fit a layer and the one before it together.

    Returns:
        Layer name -> why it was not refitted or how, ``""`` for a whole patch; and the number of images.
    """
    names = {module: name for name, module in network.named_modules()}
    layers, originals = channel_layers(network), channel_layers(dense)
    parameter = next(network.parameters())
    outcome: dict[str, str] = {}
    shared = shared_weights(network)
    changed = False

    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(evaluating(network))
        stack.enter_context(evaluating(dense))
        gathered, calls = _gather(dense, originals, images, ALIVE_JOINT if joint else ALIVE)
        batch = gathered.to(parameter.device, parameter.dtype)
        once = {name: layer for name, layer in layers.items() if calls.get(name) == 1}
        outcome |= {name: "it runs more than once in a pass" for name in layers if calls.get(name, 0) > 1}
        private = private_layers(network, once.values(), batch[:2]) if joint else set()
        companion = stack.enter_context(Companion(dense, {name: originals[name] for name in once}, batch))
        writers = Writers(companion, private)

        def before_layer(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal changed
            name = names[layer]
            x = (inputs or tuple(named.values()))[0]
            dense_x, dense_y = companion.advance(name)
            loss = losses[name]
            changed = changed or bool(loss.inputs.any())
            reason = cannot_fold(layer) or (SHARED if shared[id(layer.weight)] > 1 else None)
            lost = bool(loss.outputs.any())
            # together: one that only lost outputs is fitted to change nothing, so that the next can ask for a change
            if (changed or (joint and lost)) and reason is None:
                norm = None if loss.batch_norm is None else network.get_submodule(loss.batch_norm)
                if fits(layer):
                    fit = PatchFit(layer, images=len(x))
                    fit.update(x, keep_channels(dense_y, layer, ~loss.outputs))
                    add_bias(layer, fit.solve(), norm)
                    writers.expect(layer, fit, x, norm, ~loss.outputs)
                    reason = ""
                elif changed and blocks_of(layer) == 1 and len(loss.inputs) <= WIDEST_INPUT:
                    add_bias(layer, _refit_channels(layer, originals[name], x, dense_x, loss), norm)
                    reason = BY_CHANNELS
                elif changed:
                    reason = "its patch is too large"
            changed = changed or lost
            outcome[name] = reason or ""

        def before_norm(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            if changed and x.numel() > x.shape[1]:  # one row has no variance
                variance, mean = torch.var_mean(x.to(batch.dtype), [d for d in range(x.ndim) if d != 1])
                norm.running_mean, norm.running_var = mean, variance

        for layer in once.values():
            stack.callback(layer.register_forward_pre_hook(untold(before_layer), with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(writers.wrote).remove)
        for batch_norm in batch_norms(network):
            stack.callback(batch_norm.register_forward_pre_hook(untold(before_norm)).remove)
        with writers.junctions:
            network(batch)
    return outcome, len(batch)


def _gather(
    dense: nn.Module, layers: dict[str, nn.Module], images: RepairImages, alive: int
) -> tuple[Tensor, dict[str, int]]:
    """Read as many images as fit; also count how often each layer runs."""
    calls: dict[str, int] = {}
    largest = 0
    parameter = next(dense.parameters())

    def count(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            nonlocal largest
            calls[name] = calls.get(name, 0) + 1
            read = (inputs or tuple(named.values()))[0]
            written = output[0] if isinstance(output, tuple) else output
            largest = max(largest, (read.numel() + written.numel()) * read.element_size())

        return hook

    kept: list[Tensor] = []
    with images.batches("read images") as batches:
        limit = None
        for batch in batches:
            if limit is None:
                handles = [layer.register_forward_hook(count(n), with_kwargs=True) for n, layer in layers.items()]
                try:
                    dense(batch.images[:1].to(parameter.device, parameter.dtype))
                finally:
                    for handle in handles:
                        handle.remove()
                limit = max(1, BYTES // max(1, 2 * alive * largest))
            left = limit - sum(map(len, kept))
            if left <= 0:
                break
            kept.append(batch.images[:left])
    if not kept:
        raise TwoAxisError("repair 'sequential': expected images from the loader, got none; check the data path")
    return torch.cat(kept), calls


def _refit_channels(layer: nn.Module, dense: nn.Module, x: Tensor, dense_x: Tensor, loss: LayerLoss) -> Tensor:
    """Predict the dense inputs from the present ones and write the prediction into every tap; returns the shift."""
    present, original = channels_last_view(x, layer, len(x), ""), channels_last_view(dense_x, dense, len(x), "")
    width, count = present.shape[-1], present.shape[1]
    wanted = min(max(32 * width, FEWEST_ROWS), MOST_ROWS)
    positions = stratified(count, min(count, max(1, -(-wanted // len(x))))).to(x.device)
    present, original = present.index_select(1, positions), original.index_select(1, positions)
    kept = (~loss.inputs).nonzero()[:, 0].to(x.device)
    device = x.device if x.device.type in ("cpu", "cuda") else torch.device("cpu")
    inputs, cross = CoMoments(width, device=device), CoMoments(width, original.shape[-1], device=device)
    inputs.update(present)
    cross.update(present, original)
    inputs.mirror()
    # shrunk towards each kept channel standing for itself
    start = torch.zeros_like(cross.scatter)
    start[torch.arange(width, device=device), kept.to(device)] = 1.0
    covariance = inputs.covariance
    ridge = ridge_for(inputs.count, width)
    map_ = start + ridge_regression(covariance, cross.covariance - covariance @ start, ridge)  # [K, C]
    rows = (~loss.outputs).nonzero()[:, 0]
    weight = read_weight(dense)[0][rows.to(x.device)].double().to(device)  # [O, C, taps]
    write_weight(layer, torch.einsum("oct,kc->okt", weight, map_)[None])
    return weight.sum(2) @ (cross.other_mean - map_.T @ inputs.mean)
