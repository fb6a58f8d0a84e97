"""Layers refitted in forward order: from their inputs in the repaired network to their outputs in the dense one."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.errors import listing
from tp_twoaxis.reconstruction.patch_fit import PatchFit, safe_inverse
from tp_twoaxis.reconstruction.patch_moments import PatchMoments
from tp_twoaxis.reconstruction.patches import fits, positions_of, select_positions
from tp_twoaxis.reconstruction.ridge import choose_ridge, default_ridge_fit
from tp_twoaxis.repair.batch_norm import batch_norms
from tp_twoaxis.repair.images import RepairImages
from tp_twoaxis.repair.lockstep import LockstepReference
from tp_twoaxis.repair.op_interceptor import unintercepted
from tp_twoaxis.repair.output_corrector import OutputCorrector, count_readers
from tp_twoaxis.repair.repair_task import NO_GAIN, Outcome, RepairTask
from tp_twoaxis.runtime.forward import inference_state
from tp_twoaxis.runtime.inputs import Inputs
from tp_twoaxis.runtime.kernels import first_input, kernel_input
from tp_twoaxis.runtime.layers import blocks_of, channel_layers, flatten_positions, select_channels, weight_blocks
from tp_twoaxis.runtime.weights import SHARED, add_bias, cannot_refit, shared_weights, write_weight
from tp_twoaxis.statistics.moments import float64_device
from tp_twoaxis.statistics.recorder import WIDEST_INPUT

BY_CHANNELS = "by channels because its patch is too large"
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
    if kept := [name for name, reason in reasons.items() if reason == NO_GAIN]:
        task.notes.append(f"{listing(kept)}: kept as they were, {NO_GAIN}")
    return {
        name: Outcome(reason in ("", BY_CHANNELS), "" if reason == NO_GAIN else reason)
        for name, reason in reasons.items()
    }


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
    it runs. So each layer compensates for the errors of those before it. A BatchNorm's mean moves by the difference of
    its present inputs' mean to that of its inputs in the dense network, on the same images, and its variance by their
    ratio: few images measure that well, and where nothing changed it changes nothing. Layers that lost nothing are
    refitted as well, because their inputs changed. Where a layer's output arrives at a sum or a rectifier, the layer is
    corrected once more, for the result there: see :class:`~tp_twoaxis.repair.output_corrector.OutputCorrector`. A layer
    whose patch is too large is refitted by channels: its dense inputs are predicted from its present ones, and the
    prediction is absorbed into its weights at every tap. Images that are held out run along: on them each fit chooses
    its ridge, and each correction its size.

    All images run as one batch, and the dense network beside it, so the pass costs two forward passes plus the
    fits. Memory: the activations of that batch; it is cut to ``max_memory`` of them, at the price of fewer images
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
        judges = [] if images.held_out is None else [images.held_out.to(gathered.tensors[0].device)]
        batch = Inputs.concatenate([gathered, *judges]).to(parameter.device, parameter.dtype)
        once = {name: layer for name, layer in layers.items() if calls.get(name) == 1}
        readers = count_readers(network, once.values(), batch[:2])
        norms = {name: norm for name, norm in _named_norms(network).items() if calls.get(name) == 1}
        dense_norms = {name: dense.get_submodule(name) for name in norms}
        lockstep = stack.enter_context(
            LockstepReference(dense, {name: originals[name] for name in once}, batch, dense_norms)
        )
        corrector = OutputCorrector(lockstep, readers, joint=joint)
        refit = _OrderedRefit(network, masks, lockstep, corrector, (len(gathered), len(batch)), joint=joint)
        for name, layer in once.items():
            hook = unintercepted(refit.layer_hook(name, originals[name]))
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(corrector.trace_output).remove)
        for name, norm in _named_norms(network).items():
            hook = unintercepted(refit.norm_hook(name, dense_norms.get(name)))
            stack.callback(norm.register_forward_pre_hook(hook).remove)
        with corrector.interceptor:
            network(*batch.args, **batch.kwargs)
    repeated = {name: "it runs more than once in a pass" for name in layers if calls.get(name, 0) > 1}
    return repeated | refit.reasons, len(gathered)


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
        images: tuple[int, int],
        *,
        joint: bool,
    ) -> None:
        self.reasons: dict[str, str] = {}
        self._network, self._masks = network, masks
        self._lockstep, self._corrector, self._joint = lockstep, corrector, joint
        self._fitted, self._images = images  # of the batch's images the first so many are fitted
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
                reason = self._refit(name, layer, original, (inputs, named), dense_x, dense_y)
            self._changed = self._changed or lost_outputs
            self.reasons[name] = reason

        return hook

    def _refit(
        self, name: str, layer: nn.Module, original: nn.Module, arguments: Any, dense_x: Tensor, dense_y: Tensor
    ) -> str:
        pruned = self._masks[name]
        norm = None if pruned.batch_norm is None else self._network.get_submodule(pruned.batch_norm)
        if fits(layer):
            x, target = kernel_input(layer, *arguments), select_channels(dense_y, layer, ~pruned.outputs)
            cut = self._cut(x)
            fit = PatchFit(layer, images=cut)
            fit.update_all(x, target)
            add_bias(layer, fit.solve(), norm)
            gained = not math.isnan(fit.solved.ridge)
            self._corrector.register(layer, fit, x, norm, ~pruned.outputs)
            return "" if gained else NO_GAIN
        if not self._changed:
            return ""
        if blocks_of(layer) == 1 and len(pruned.inputs) <= WIDEST_INPUT:
            x = first_input(*arguments)
            add_bias(layer, _refit_channels(layer, original, x, dense_x, pruned, self._cut(x)), norm)
            return BY_CHANNELS
        return "its patch is too large"

    def _cut(self, x: Tensor) -> int:
        """Where the held-out images begin; images may be cut into windows, one image's after the other's.

        What does not begin with the batch (sequence-first layers) is fitted whole.
        """
        return len(x) if len(x) % self._images else len(x) // self._images * self._fitted

    def norm_hook(self, name: str, original: nn.Module | None) -> Any:
        """Make the hook of a BatchNorm; ``original`` is None where it runs more than once."""
        kept = [~pruned.outputs for pruned in self._masks.values() if pruned.batch_norm == name]

        def hook(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
            dense_x = None if original is None else self._lockstep.next(name)[0]
            cut = self._cut(inputs[0])
            x, dense_x = inputs[0][:cut], None if dense_x is None else dense_x[:cut]
            if not self._changed or x.numel() <= x.shape[1]:  # one row has no variance
                return
            variance, mean = _moments(x)
            if original is not None and dense_x is not None:
                stay = kept[0] if kept else torch.ones(dense_x.shape[1], dtype=torch.bool)
                stay = stay.to(x.device)
                if int(stay.sum()) == x.shape[1]:
                    dense_variance, dense_mean = (m[stay] for m in _moments(dense_x))
                    old_mean, old_variance = (b.double()[stay] for b in _running(original))
                    mean = old_mean + mean - dense_mean
                    ratio = variance / dense_variance
                    variance = torch.where(dense_variance > 0, old_variance * ratio, variance)
            norm.running_mean, norm.running_var = mean.to(self._dtype), variance.to(self._dtype)

        return hook


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean of each channel, [C] float64."""
    variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1])
    return variance.double(), mean.double()


def _running(norm: nn.Module) -> tuple[Tensor, Tensor]:
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    return mean, variance


def _named_norms(network: nn.Module) -> dict[str, nn.Module]:
    norms = {id(norm) for norm in batch_norms(network)}
    return {name: module for name, module in network.named_modules() if id(module) in norms}


def _gather(
    dense: nn.Module, layers: dict[str, nn.Module], images: RepairImages, alive: int
) -> tuple[Inputs, dict[str, int]]:
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

    kept: list[Inputs] = []
    with images.forward_pass(dense, "read images") as run:
        for name, layer in (layers | _named_norms(dense)).items():
            run.hook(layer, count(name), with_kwargs=True)
        room = None
        for batch in run.batches:
            if room is None:
                run(batch._replace(inputs=batch.inputs[:1]))
                room = max(1, int(images.max_memory * 2**30) // max(1, 2 * alive * largest))
            kept.append(batch.inputs[:room])
            room -= len(kept[-1])
            if room <= 0:
                break
    return Inputs.concatenate(kept), calls


def _refit_channels(
    layer: nn.Module, dense: nn.Module, x: Tensor, dense_x: Tensor, pruned: PrunedChannels, fitted: int
) -> Tensor:
    """Predict the dense inputs from the present ones, absorb the prediction into every tap; returns the shift.

    The first ``fitted`` images are fitted, the others are held out to choose the ridge.
    """
    present, original = flatten_positions(x, layer, len(x), ""), flatten_positions(dense_x, dense, len(x), "")
    kept = (~pruned.inputs).nonzero()[:, 0].to(x.device)
    rows = (~pruned.outputs).nonzero()[:, 0]
    device = float64_device(x.device)
    weight = weight_blocks(dense)[0][rows.to(x.device)].double().to(device)  # [O, C, taps]
    importance = weight.square().sum((0, 2)).sqrt()  # errors of a channel count as much as the layer's weights on it
    moments = []
    for part in (slice(0, fitted), slice(fitted, len(x))):
        if part.start == part.stop:
            continue
        positions = positions_of(layer, present.shape[1], fitted, range(part.start, part.stop)).to(x.device)
        own = select_positions(present[part], positions).flatten(0, 1)
        # what each kept channel predicts of itself is the start, and shrunk towards
        target = select_positions(original[part], positions).flatten(0, 1).double().to(device)
        target[:, kept] -= own.to(target)
        moments.append(PatchMoments(1, own.shape[1], target.shape[1], device))
        moments[-1].update(own[:, None], (target * importance)[:, None])
    found = choose_ridge(*moments) if len(moments) == 2 else default_ridge_fit(*moments)
    unscaled = safe_inverse(importance)
    map_ = found.change[0] * unscaled  # [K, C]
    map_[torch.arange(len(kept), device=device), kept.to(device)] += 1.0
    write_weight(layer, torch.einsum("oct,kc->okt", weight, map_)[None])
    return weight.sum(2) @ (found.shift[0] * unscaled)
