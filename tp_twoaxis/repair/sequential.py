"""Layers refitted in forward order: from their inputs in the repaired network to their outputs in the dense one."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.reconstruction.affine import ridge_for, ridge_regression
from tp_twoaxis.reconstruction.patches import FEWEST_ROWS, MOST_ROWS, PatchFit, fits
from tp_twoaxis.repair.batch_norm import batch_norms
from tp_twoaxis.repair.images import RepairImages
from tp_twoaxis.repair.lockstep import LockstepReference
from tp_twoaxis.repair.op_interceptor import unintercepted
from tp_twoaxis.repair.output_corrector import OutputCorrector, single_consumer_layers
from tp_twoaxis.repair.pruned_consumers import first_input
from tp_twoaxis.repair.repair_task import Outcome, RepairTask
from tp_twoaxis.runtime.forward import inference_state
from tp_twoaxis.runtime.layers import blocks_of, channel_layers, flatten_positions, select_channels, weight_blocks
from tp_twoaxis.runtime.weights import SHARED, add_bias, cannot_refit, shared_weights, write_weight
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.recorder import WIDEST_INPUT
from tp_twoaxis.statistics.sampling import stratified

BY_CHANNELS = "by channels because its patch is too large"
# the images run as one batch, so many that their activations in both networks stay below this
BYTES = 2**32
# activations alive at a time, in units of the largest layer's input and output: a shortcut, a branch, a copy of work
ALIVE, ALIVE_JOINT = 3, 5


def refit_sequentially(task: RepairTask, *, joint: bool = False) -> dict[str, Outcome]:
    """Repairs ``sequential`` and ``joint``: see :func:`refit_in_order`.

    Args:
        task: with images.
        joint: also reconstruct layers jointly with the one before.
    """
    assert task.images is not None
    reasons, used = refit_in_order(task.network, task.dense, task.masks, task.images, joint=joint)
    task.notes.append(f"{'joint' if joint else 'sequential'} repair ran on {used} images")
    return {name: Outcome(reason in ("", BY_CHANNELS), reason) for name, reason in reasons.items()}


def refit_in_order(
    network: nn.Module,
    dense: nn.Module,
    masks: dict[str, PrunedChannels],
    images: RepairImages,
    *,
    joint: bool = False,
) -> tuple[dict[str, str], int]:
    """Refit every layer behind the first removal, and re-estimate every BatchNorm, in the course of one forward pass.

    When a layer is about to run in the pruned network, its weights become the least-squares map from its present
    inputs to the dense layer's outputs for the same images (those that stay), shrunk towards its present weights; then
    it runs. So each layer compensates for the errors of those before it. A BatchNorm takes mean and variance from its
    present inputs. Layers that lost nothing are refitted as well, because their inputs changed. Where a layer's output
    arrives at a sum or a rectifier, the layer is corrected once more, for the result there: see
    :class:`~tp_twoaxis.repair.output_corrector.OutputCorrector`. A layer whose patch is too large is refitted by
    channels: its dense inputs are predicted from its present ones, and the prediction is absorbed into its weights at
    every tap.

    All images run as one batch, and the dense network beside it, so the pass costs two forward passes plus the
    fits. Memory: the activations of that batch; it is cut to about 4 GiB of them, at the price of fewer images
    (``joint`` has more of them alive at a time, so fewer still).

    Args:
        network: the pruned network; parameters and buffers are replaced.
        dense: its original.
        masks: layer name -> channels that it lost, of all layers.
        images: read once.
        joint: at rectifiers, also fit a layer and the one before it together.

    Returns:
        Layer name -> why it was not refitted or how, ``""`` for a whole patch; and the number of images.
    """
    layers, originals = channel_layers(network), channel_layers(dense)
    parameter = next(network.parameters())
    with ExitStack() as stack:
        stack.enter_context(inference_state(network))
        stack.enter_context(inference_state(dense))
        gathered, calls = _gather(dense, originals, images, ALIVE_JOINT if joint else ALIVE)
        batch = gathered.to(parameter.device, parameter.dtype)
        once = {name: layer for name, layer in layers.items() if calls.get(name) == 1}
        single_consumer = single_consumer_layers(network, once.values(), batch[:2]) if joint else set()
        lockstep = stack.enter_context(LockstepReference(dense, {name: originals[name] for name in once}, batch))
        corrector = OutputCorrector(lockstep, single_consumer)
        refit = _OrderedRefit(network, masks, lockstep, corrector, joint=joint)
        for name, layer in once.items():
            hook = unintercepted(refit.layer_hook(name, originals[name]))
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(corrector.trace_output).remove)
        for batch_norm in batch_norms(network):
            stack.callback(batch_norm.register_forward_pre_hook(unintercepted(refit.before_batch_norm)).remove)
        with corrector.interceptor:
            network(batch)
    repeated = {name: "it runs more than once in a pass" for name in layers if calls.get(name, 0) > 1}
    return repeated | refit.reasons, len(batch)


class _OrderedRefit:
    """Pre-forward hooks that refit layers and BatchNorms on the inputs that they are about to take.

    Attributes:
        reasons: layer name -> why it was not refitted or how; ``""`` for a whole patch.
    """

    def __init__(
        self,
        network: nn.Module,
        masks: dict[str, PrunedChannels],
        lockstep: LockstepReference,
        corrector: OutputCorrector,
        *,
        joint: bool,
    ) -> None:
        self.reasons: dict[str, str] = {}
        self._network, self._masks = network, masks
        self._lockstep, self._corrector, self._joint = lockstep, corrector, joint
        self._shared = shared_weights(network)
        self._dtype = next(network.parameters()).dtype
        self._changed = False  # whether a layer before the present one lost channels

    def layer_hook(self, name: str, original: nn.Module) -> Any:
        """Make the hook of a layer."""

        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            pruned = self._masks[name]
            dense_x, dense_y = self._lockstep.next(name)
            self._changed = self._changed or bool(pruned.inputs.any())
            lost_outputs = bool(pruned.outputs.any())
            reason = cannot_refit(layer) or (SHARED if self._shared[id(layer.weight)] > 1 else "")
            # joint: a layer that only lost outputs is fitted too, which changes nothing yet but registers it
            if (self._changed or (self._joint and lost_outputs)) and not reason:
                reason = self._refit(name, layer, original, first_input(inputs, named), dense_x, dense_y)
            self._changed = self._changed or lost_outputs
            self.reasons[name] = reason

        return hook

    def _refit(
        self, name: str, layer: nn.Module, original: nn.Module, x: Tensor, dense_x: Tensor, dense_y: Tensor
    ) -> str:
        pruned = self._masks[name]
        norm = None if pruned.batch_norm is None else self._network.get_submodule(pruned.batch_norm)
        if fits(layer):
            fit = PatchFit(layer, images=len(x))
            fit.update(x, select_channels(dense_y, layer, ~pruned.outputs))
            add_bias(layer, fit.solve(), norm)
            self._corrector.register(layer, fit, x, norm, ~pruned.outputs)
            return ""
        if not self._changed:
            return ""
        if blocks_of(layer) == 1 and len(pruned.inputs) <= WIDEST_INPUT:
            add_bias(layer, _refit_channels(layer, original, x, dense_x, pruned), norm)
            return BY_CHANNELS
        return "its patch is too large"

    def before_batch_norm(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Hook of a BatchNorm."""
        x = inputs[0]
        if self._changed and x.numel() > x.shape[1]:  # one row has no variance
            variance, mean = torch.var_mean(x.to(self._dtype), [d for d in range(x.ndim) if d != 1])
            norm.running_mean, norm.running_var = mean, variance


def _gather(
    dense: nn.Module, layers: dict[str, nn.Module], images: RepairImages, alive: int
) -> tuple[Tensor, dict[str, int]]:
    """Read as many images as fit into memory; also count how often each layer runs."""
    calls: dict[str, int] = {}
    largest = 0

    def count(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            nonlocal largest
            calls[name] = calls.get(name, 0) + 1
            x, y = first_input(inputs, named), output[0] if isinstance(output, tuple) else output
            largest = max(largest, (x.numel() + y.numel()) * x.element_size())

        return hook

    kept: list[Tensor] = []
    with images.forward_pass(dense, "read images") as run:
        for name, layer in layers.items():
            run.hook(layer, count(name), with_kwargs=True)
        room = None
        for batch in run.batches:
            if room is None:
                run(batch._replace(inputs=batch.inputs[:1]))
                room = max(1, BYTES // max(1, 2 * alive * largest))
            kept.append(batch.images[:room])
            room -= len(kept[-1])
            if room <= 0:
                break
    return torch.cat(kept), calls


def _refit_channels(layer: nn.Module, dense: nn.Module, x: Tensor, dense_x: Tensor, pruned: PrunedChannels) -> Tensor:
    """Predict the dense inputs from the present ones, absorb the prediction into every tap; returns the shift."""
    present, original = flatten_positions(x, layer, len(x), ""), flatten_positions(dense_x, dense, len(x), "")
    width, count = present.shape[-1], present.shape[1]
    needed = min(max(32 * width, FEWEST_ROWS), MOST_ROWS)
    positions = stratified(count, min(count, max(1, -(-needed // len(x))))).to(x.device)
    present, original = present.index_select(1, positions), original.index_select(1, positions)
    kept = (~pruned.inputs).nonzero()[:, 0].to(x.device)
    device = x.device if x.device.type in ("cpu", "cuda") else torch.device("cpu")
    inputs, cross = CoMoments(width, device=device), CoMoments(width, original.shape[-1], device=device)
    inputs.update(present)
    cross.update(present, original)
    inputs.symmetrize()
    # shrunk towards each kept channel predicting itself
    start = torch.zeros_like(cross.scatter)
    start[torch.arange(width, device=device), kept.to(device)] = 1.0
    covariance = inputs.covariance
    ridge = ridge_for(inputs.count, width)
    map_ = start + ridge_regression(covariance, cross.covariance - covariance @ start, ridge)  # [K, C]
    rows = (~pruned.outputs).nonzero()[:, 0]
    weight = weight_blocks(dense)[0][rows.to(x.device)].double().to(device)  # [O, C, taps]
    write_weight(layer, torch.einsum("oct,kc->okt", weight, map_)[None])
    return weight.sum(2) @ (cross.other_mean - map_.T @ inputs.mean)
