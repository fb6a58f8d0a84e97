"""Layers refitted in forward order: from their inputs in the repaired network to their outputs in the dense one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.errors import TwoAxisError, listing
from tp_twoaxis.reconstruction.patch_fit import PatchFit, safe_inverse
from tp_twoaxis.reconstruction.patch_moments import PatchMoments
from tp_twoaxis.reconstruction.patches import fits, positions_of, select_positions
from tp_twoaxis.reconstruction.ridge import choose_ridge, default_ridge_fit
from tp_twoaxis.repair.batch_norm import batch_norms
from tp_twoaxis.repair.channel_moments import ChannelMoments
from tp_twoaxis.repair.chunk_memory import ChunkMemory, LiveTensors
from tp_twoaxis.repair.images import ImageChunk, RepairImages
from tp_twoaxis.repair.lockstep import Lockstep, Place
from tp_twoaxis.repair.output_corrector import OutputCorrector, count_readers
from tp_twoaxis.repair.paused_pass import LAYER, NORM, RECTIFIER, PausingNetwork
from tp_twoaxis.repair.repair_task import NO_GAIN, Outcome, RepairTask
from tp_twoaxis.runtime.forward import inference_state
from tp_twoaxis.runtime.freed_memory import give_back
from tp_twoaxis.runtime.inputs import Inputs
from tp_twoaxis.runtime.kernels import first_input, kernel_input
from tp_twoaxis.runtime.layers import blocks_of, channel_layers, flatten_positions, weight_blocks
from tp_twoaxis.runtime.progress_bar import progress_bar
from tp_twoaxis.runtime.weights import SHARED, add_bias, cannot_refit, shared_weights, write_weight
from tp_twoaxis.statistics.moments import float64_device
from tp_twoaxis.statistics.recorder import WIDEST_INPUT

BY_CHANNELS = "by channels because its patch is too large"
# there must be room for so many images, of which some are held out, or for all where there are fewer
FEWEST_IMAGES = 10


def refit_sequentially(task: RepairTask, *, joint: bool = False) -> dict[str, Outcome]:
    """Repairs ``sequential`` and ``joint``: see :func:`refit_in_order`.

    Args:
        task: with images.
        joint: also reconstruct layers jointly with the one before.
    """
    assert task.images is not None
    reasons, joined = refit_in_order(task.network, task.dense, task.masks, task.images, joint=joint, whole=task.whole)
    first, last = joined
    task.notes.append(
        f"{'joint' if joint else 'sequential'} repair ran on {last} images"
        + (f"; its first layers, whose activations are large, on {first} (max_memory)" if first < last else "")
    )
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
    whole: Collection[str] = (),
) -> tuple[dict[str, str], tuple[int, int]]:
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

    The images run in chunks, and the dense network beside them, so the pass costs two forward passes plus the fits. All
    chunks wait for each other at every layer. As many run as their activations fit into ``max_memory``; where layers
    become smaller, more join (see :class:`~tp_twoaxis.repair.lockstep.Lockstep`): large maps have enough rows in few
    images.

    Args:
        network: the pruned network; parameters and buffers are replaced.
        dense: its original.
        masks: layer name -> channels that it lost, of all layers.
        images: read once.
        joint: at rectifiers, also fit a layer and the one before it together.
        whole: names of layers that keep their weights unless they lost inputs.

    Returns:
        Layer name -> why it was not refitted or how, ``""`` for a whole patch; and how many images the first and the
        last layer met, without those held out.

    Raises:
        TwoAxisError: ``max_memory`` is too small for ten images, or the networks' layers run in different orders.
    """
    layers, originals = channel_layers(network), channel_layers(dense)
    give_back()  # what statistics took
    with ExitStack() as stack:
        stack.enter_context(inference_state(network))
        stack.enter_context(inference_state(dense))
        few, calls = _look(dense, originals, images)
        once = {name: layer for name, layer in layers.items() if calls.get(name) == 1}
        norms = {name: norm for name, norm in _named_norms(network).items() if calls.get(name) == 1}
        pair = _PausingPair(
            PausingNetwork(network, once, norms, after_layers=False),
            PausingNetwork(
                dense,
                {name: originals[name] for name in once},
                {name: dense.get_submodule(name) for name in norms},
                after_layers=True,
            ),
            next(network.parameters()),
        )
        stack.enter_context(pair.pruned)
        stack.enter_context(pair.dense)
        readers = count_readers(network, once.values(), few)
        memory = _rehearse(pair, masks, readers, few, images, joint=joint)
        chunks = pair.moved(stack.enter_context(images.chunks(memory.chunk_images)))
        bar = stack.enter_context(progress_bar(total=len(once), desc="repair", unit="layer", show=images.progress))
        lockstep = Lockstep(pair.pruned, pair.dense, chunks, memory)
        corrector = OutputCorrector(readers, joint=joint)
        refit = _OrderedRefit(pair, masks, corrector, bar, joint=joint, whole=whole)
        lockstep.run(refit.handle, refit.catch_up, corrector)
    repeated = {name: "it runs more than once in a pass" for name in layers if calls.get(name, 0) > 1}
    return repeated | refit.reasons, (lockstep.joined[0], lockstep.joined[-1])


@dataclass(frozen=True)
class _PausingPair:
    """Both networks, and where and in which dtype they run."""

    pruned: PausingNetwork
    dense: PausingNetwork
    parameter: Tensor

    def moved(self, chunks: Iterator[ImageChunk]) -> Iterator[ImageChunk]:
        """Move images to the networks."""
        for inputs, held_out in chunks:
            yield ImageChunk(inputs.to(self.parameter.device, self.parameter.dtype), held_out)


def _look(dense: nn.Module, layers: dict[str, nn.Module], images: RepairImages) -> tuple[Inputs, dict[str, int]]:
    """Read a few images, and count how often each layer and BatchNorm runs."""
    calls: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] = calls.get(name, 0) + 1

        return hook

    with images.forward_pass(dense, "read images") as run:
        for name, layer in (layers | _named_norms(dense)).items():
            run.hook(layer, count(name))
        batch = next(run.batches)
        run(batch._replace(inputs=batch.inputs[:1]))
        few = batch.inputs[torch.arange(len(batch.inputs))[:2]]  # a copy: a slice would keep the whole batch
        return few.to(run.device, run.dtype), calls


def _rehearse(
    pair: _PausingPair,
    masks: dict[str, PrunedChannels],
    readers: list[int],
    few: Inputs,
    images: RepairImages,
    *,
    joint: bool,
) -> ChunkMemory:
    """Run a few images to see what an image's tensors take at each place; nothing is changed."""
    live = LiveTensors()
    corrector = OutputCorrector(readers, joint=joint, rehearsal=True)
    needs: list[int] = []

    def handle(place: Place) -> None:
        if place.kind == LAYER:
            layer = pair.pruned.model.get_submodule(place.name)
            if fits(layer) and not cannot_refit(layer):
                x = kernel_input(layer, *place.pruned[0])
                corrector.register(place.number, layer, None, [x], None, ~masks[place.name].outputs)
        corrector.correct(place)
        # a joint fit has a reference and a direction besides
        work = 2 * place.pruned[0][0].nbytes if joint and place.kind == RECTIFIER else 0
        needs.append((live.bytes([*few.tensors, *corrector.kept]) + work) // len(few))

    pair.pruned.on_result = pair.dense.on_result = live.add
    lockstep = Lockstep(pair.pruned, pair.dense, iter([ImageChunk(few, held_out=False)]), None)
    lockstep.run(handle, lambda *_: None, corrector)
    pair.pruned.on_result = pair.dense.on_result = None
    memory = ChunkMemory(needs, images.max_memory * 2**30)
    least = min(FEWEST_IMAGES, images.count)
    if least * memory.largest > memory.limit:
        raise TwoAxisError(
            f"repair: expected max_memory of at least {least * memory.largest / 2**30:.2g} GiB, what {least} images "
            f"need in this network, got {images.max_memory:g}"
        )
    return memory


class _OrderedRefit:
    """Refits layers and BatchNorms at the places before them, on the inputs that they are about to take.

    Attributes:
        reasons: layer name -> why it was not refitted or how; ``""`` for a whole patch.
    """

    def __init__(
        self,
        pair: _PausingPair,
        masks: dict[str, PrunedChannels],
        corrector: OutputCorrector,
        bar: Any,
        *,
        joint: bool,
        whole: Collection[str],
    ) -> None:
        self.reasons: dict[str, str] = {}
        self._network, self._dense = pair.pruned.model, pair.dense.model
        self._masks, self._corrector, self._bar, self._joint = masks, corrector, bar, joint
        self._whole = whole
        self._shared = shared_weights(self._network)
        self._dtype = pair.parameter.dtype
        self._changed = False  # whether a layer before the present one lost channels

    def handle(self, place: Place) -> None:
        """Do what is to be done at a place."""
        if place.kind == LAYER:
            self._refit_layer(place)
            give_back()
            self._bar.update()
        elif place.kind == NORM:
            self._move_norm(place)
        else:
            self._corrector.correct(place)

    def catch_up(self, index: int, kind: str, name: str, values: tuple[Any, ...]) -> None:
        """Keep what is wanted of a chunk that joins."""
        if kind in (LAYER, RECTIFIER):
            self._corrector.catch_up(index, self._network.get_submodule(name) if kind == LAYER else None, values)

    def _refit_layer(self, place: Place) -> None:
        layer, pruned = self._network.get_submodule(place.name), self._masks[place.name]
        lost_inputs, lost_outputs = bool(pruned.inputs.any()), bool(pruned.outputs.any())
        self._changed = self._changed or lost_inputs
        allowed = lost_inputs or place.name not in self._whole
        reason = cannot_refit(layer) or (SHARED if self._shared[id(layer.weight)] > 1 else "")
        # joint: a layer that only lost outputs is fitted too, which changes nothing yet but registers it
        if allowed and (self._changed or (self._joint and lost_outputs)) and not reason:
            reason = self._refit(place, layer)
        self._changed = self._changed or lost_outputs
        self.reasons[place.name] = reason

    def _refit(self, place: Place, layer: nn.Module) -> str:
        pruned = self._masks[place.name]
        norm = None if pruned.batch_norm is None else self._network.get_submodule(pruned.batch_norm)
        if fits(layer):
            x = [kernel_input(layer, *arguments) for arguments in place.pruned]
            fit = PatchFit(layer, images=_count(x, place))
            for own, (_, dense_y), held_out in zip(x, place.dense, place.held_out, strict=True):
                fit.update(own, dense_y, held_out=held_out, kept=~pruned.outputs)
            add_bias(layer, fit.solve(), norm)
            self._corrector.register(place.number, layer, fit, x, norm, ~pruned.outputs)
            return NO_GAIN if math.isnan(fit.solved.ridge) else ""
        if not self._changed:
            return ""
        if blocks_of(layer) == 1 and len(pruned.inputs) <= WIDEST_INPUT:
            add_bias(layer, _refit_channels(layer, self._dense.get_submodule(place.name), place, pruned), norm)
            return BY_CHANNELS
        return "its patch is too large"

    def _move_norm(self, place: Place) -> None:
        norm, original = (network.get_submodule(place.name) for network in (self._network, self._dense))
        x, dense_x = (_moments(side, place.held_out) for side in (place.pruned, place.dense))
        if not self._changed or x.rows <= 1:  # one row has no variance
            return
        kept = next((~p.outputs for p in self._masks.values() if p.batch_norm == place.name), None)
        stay = torch.ones(len(dense_x.mean), dtype=torch.bool) if kept is None else kept
        stay = stay.to(x.mean.device)
        mean, variance = x.mean, x.variance
        if int(stay.sum()) == len(mean):
            old_mean, old_variance = (buffer.to(mean)[stay] for buffer in _running(original))
            mean = old_mean + mean - dense_x.mean[stay]
            before = dense_x.variance[stay]
            variance = torch.where(before > 0, old_variance * (variance / before), variance)
        norm.running_mean, norm.running_var = (m.to(_running(norm)[0].device, self._dtype) for m in (mean, variance))


def _moments(values: list[tuple[Any, ...]], held_out: list[bool]) -> ChannelMoments:
    """Describe what a BatchNorm reads, over the chunks that are fitted."""
    moments = ChannelMoments()
    for (x,), judges in zip(values, held_out, strict=True):
        if not judges:
            moments.update(x)
    return moments


def _count(x: list[Tensor], place: Place) -> int:
    """Count what is fitted along the first dimension: images, or windows of them."""
    return sum(len(own) for own, held_out in zip(x, place.held_out, strict=True) if not held_out)


def _running(norm: nn.Module) -> tuple[Tensor, Tensor]:
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    return mean, variance


def _named_norms(network: nn.Module) -> dict[str, nn.Module]:
    norms = {id(norm) for norm in batch_norms(network)}
    return {name: module for name, module in network.named_modules() if id(module) in norms}


def _refit_channels(layer: nn.Module, dense: nn.Module, place: Place, pruned: PrunedChannels) -> Tensor:
    """Predict the dense inputs from the present ones, absorb the prediction into every tap; returns the shift."""
    x = [first_input(*arguments) for arguments in place.pruned]
    images = _count(x, place)
    kept, rows = (~pruned.inputs).nonzero()[:, 0].to(x[0].device), (~pruned.outputs).nonzero()[:, 0]
    device = float64_device(x[0].device)
    weight = weight_blocks(dense)[0][rows.to(x[0].device)].double().to(device)  # [O, C, taps]
    importance = weight.square().sum((0, 2)).sqrt()  # errors of a channel count as much as the layer's weights on it
    moments: dict[bool, PatchMoments] = {}
    seen = {False: 0, True: 0}
    for own, (dense_x, _), held_out in zip(x, place.dense, place.held_out, strict=True):
        present, original = flatten_positions(own, layer, len(own), ""), flatten_positions(dense_x, dense, len(own), "")
        drawn = range(seen[held_out], seen[held_out] + len(own))
        positions = positions_of(layer, present.shape[1], images, drawn).to(own.device)
        predictors = select_positions(present, positions).flatten(0, 1)
        # what each kept channel predicts of itself is the start, and shrunk towards
        target = select_positions(original, positions).flatten(0, 1).double().to(device)
        target[:, kept] -= predictors.to(target)
        sums = moments.setdefault(held_out, PatchMoments(1, predictors.shape[1], target.shape[1], device))
        sums.update(predictors[:, None], (target * importance)[:, None])
        seen[held_out] += len(own)
    found = choose_ridge(moments[False], moments[True]) if True in moments else default_ridge_fit(moments[False])
    unscaled = safe_inverse(importance)
    map_ = found.change[0] * unscaled  # [K, C]
    map_[torch.arange(len(kept), device=device), kept.to(device)] += 1.0
    write_weight(layer, torch.einsum("oct,kc->okt", weight, map_)[None])
    return weight.sum(2) @ (found.shift[0] * unscaled)
