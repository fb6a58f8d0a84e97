"""Which refitted layer produced the tensor at a sum or a rectifier, and the layer's correction there."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tp_twoaxis.reconstruction.patches import PatchFit, TargetFunction
from tp_twoaxis.repair.joint import (
    ProducerOutput,
    RectifiedInput,
    apply_weight,
    has_transpose,
    joint_reconstruction,
)
from tp_twoaxis.repair.lockstep import RECTIFIER, SUM, LockstepReference
from tp_twoaxis.repair.op_interceptor import OpInterceptor
from tp_twoaxis.runtime.layers import broadcast_channels, channel_axis, select_channels
from tp_twoaxis.runtime.weights import add_bias

# rounds of a fit to a rectifier's input: the error after it falls further, but 4 or 12 rounds made neither of two
# CIFAR-10 ResNet-20s more accurate on 2,000 held-out training images (89.9 / 91.0, 89.6 / 90.7, 89.8 / 90.7 %)
ROUNDS = 1
# rounds of joint reconstruction. On the same networks, half the MACs, 1,000 images, accuracy in % on 8,000 held-out
# training images: 91.4 / 91.6 without and 92.2 / 92.7 with them where channels were selected by reconstruction errors
# of channels, 92.1 / 91.9 and 93.5 / 93.0 where by those of patches
JOINT_ROUNDS = 3


class OutputCorrector:
    """Traces outputs of refitted layers through BatchNorm to sums and rectifiers, and corrects the layers there.

    A layer's own output matters less than its effect downstream. At a sum the layer also compensates for the error of
    the other operand: its target is the dense network's sum less that operand. At a rectifier, values that the dense
    network cuts off need only be cut off here too: where the dense input is not above the lower bound, the target is
    the current input, clamped to the bound. The layer is fitted in rounds, each of which lowers the error after the
    rectifier (ours; the nonlinear reconstruction of Zhang et al. 2016 solves a similar problem by splitting). The
    corrected outputs replace those in the running pass. At rectifiers, a layer and the one before it can also be fitted
    together, see :func:`~tp_twoaxis.repair.joint.joint_reconstruction`, if that one has no other consumer.

    Only the outputs of layers, BatchNorms and additions are traced; after any other operation a layer keeps its
    weights.

    Args:
        dense: the dense network's pass; taken to the next sum or rectifier at each of them.
        single_consumer: layers that may be changed for the sake of the next, from :func:`single_consumer_layers`.
    """

    def __init__(self, dense: LockstepReference, single_consumer: set[nn.Module]) -> None:
        self.interceptor = OpInterceptor(
            on_add=self._on_add,
            on_rectifier=self._on_rectifier,
            on_norm=self._on_norm,
            on_rectified=self._on_rectified,
        )
        self._dense = dense
        self._single_consumer = single_consumer
        self._registered: dict[nn.Module, ProducerOutput] = {}
        self._producers: MutableMapping[Tensor, tuple[ProducerOutput, ...]] = WeakTensorKeyDictionary()
        # producers whose outputs went into a sum: corrected at the rectifier after it, but not at the next sum
        self._summed: MutableMapping[Tensor, tuple[ProducerOutput, ...]] = WeakTensorKeyDictionary()
        self._rectified: MutableMapping[Tensor, RectifiedInput] = WeakTensorKeyDictionary()
        self._pending: RectifiedInput | None = None  # of the rectifier that is running

    def register(self, layer: nn.Module, fit: PatchFit, inputs: Tensor, norm: nn.Module | None, kept: Tensor) -> None:
        """Register a layer that was refitted and is about to run; see :class:`ProducerOutput`."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        scale = torch.ones(int(kept.sum()), dtype=weight.dtype, device=weight.device)
        rectified = self._rectified.get(inputs)
        self._registered[layer] = ProducerOutput(layer, fit, inputs, norm, kept.to(weight.device), scale, rectified)

    def trace_output(self, layer: nn.Module, inputs: object, output: Tensor) -> None:
        """Forward hook of the layers."""
        if (producer := self._registered.pop(layer, None)) is not None:
            self._producers[output] = (producer,)

    def _on_norm(self, x: Tensor, out: Tensor, scale: Tensor) -> None:
        self._producers[out] = tuple(replace(p, scale=p.scale * scale) for p in self._producers.get(x, ()))

    def _on_add(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        (reference,) = self._dense.next(SUM)
        # the layer with the larger patch can correct more, so it comes first
        both = (*self._producers.get(a, ()), *self._producers.get(b, ()))
        producers = sorted(both, key=lambda p: p.fit.width, reverse=True)
        for producer in producers:
            self._correct(producer, out, reference, _equal, 1)
        self._summed[out] = tuple(producers)
        self._producers.pop(out, None)

    def _on_rectifier(self, x: Tensor, low: float, high: float) -> None:
        (reference,) = self._dense.next(RECTIFIER)

        def target_fn(current: Tensor, dense: Tensor) -> Tensor:
            # where the dense input is at or beyond a bound, any value beyond it has the same effect
            target = torch.where(dense > low, dense, current.clamp(max=low))
            return torch.where(dense < high, target, current.clamp(min=high))

        own = self._producers.get(x, ())
        for producer in own or self._summed.get(x, ()):
            self._correct(producer, x, reference, target_fn, ROUNDS)
            fitted = self._reconstruct_jointly(producer, x, reference, target_fn)
            if len(own) == 1 and producer.layer in self._single_consumer:
                self._pending = RectifiedInput(fitted, x.clone(), low, high)

    def _on_rectified(self, out: Tensor) -> None:
        self._producers.pop(out, None)  # the rectifier may have worked in place
        if self._pending is not None:
            self._rectified[out], self._pending = self._pending, None

    def _reconstruct_jointly(
        self, producer: ProducerOutput, current: Tensor, dense: Tensor, target_fn: TargetFunction
    ) -> ProducerOutput:
        reference = _kept_part(producer, current, dense)
        if producer.rectified is None or reference is None or not has_transpose(producer.layer):
            return producer
        return joint_reconstruction(producer, current, reference, target_fn, JOINT_ROUNDS)

    def _correct(
        self, producer: ProducerOutput, current: Tensor, dense: Tensor, target_fn: TargetFunction, rounds: int
    ) -> None:
        layer = producer.layer
        reference = _kept_part(producer, current, dense)
        if reference is None:
            return
        weight_change, shift = producer.fit.refine(
            producer.inputs, current, reference, producer.scale, target_fn, rounds
        )
        add_bias(layer, shift, producer.norm)
        delta = apply_weight(layer, producer.inputs, weight_change)
        current += broadcast_channels(producer.scale, delta, layer) * (delta + broadcast_channels(shift, delta, layer))


def single_consumer_layers(network: nn.Module, layers: Iterable[nn.Module], images: Tensor) -> set[nn.Module]:
    """Find the layers with a single consumer, after at most a BatchNorm and one rectifier.

    The outputs of such a layer may change, if its consumer is changed with it.

    Args:
        network: in eval mode; run once.
        layers: of it, each called once in a pass.
        images: a few, on the network's device.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> single_consumer_layers(net, [net[0], net[2]], torch.zeros(2, 2)) == {net[0], net[2]}
        True
    """
    producer: MutableMapping[Tensor, nn.Module] = WeakTensorKeyDictionary()
    reads: MutableMapping[Tensor, list[int]] = WeakTensorKeyDictionary()
    counts: dict[nn.Module, list[list[int]]] = {}
    rectified: nn.Module | None = None

    def trace(tensor: Tensor, layer: nn.Module) -> None:
        producer[tensor], reads[tensor] = layer, [0]
        counts.setdefault(layer, []).append(reads[tensor])

    def trace_output(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            trace(output, layer)

    def on_norm(x: Tensor, out: Tensor, scale: Tensor) -> None:
        if x in producer:
            trace(out, producer[x])

    def on_rectifier(x: Tensor, low: float, high: float) -> None:
        nonlocal rectified
        rectified = producer.get(x)

    def on_rectified(out: Tensor) -> None:
        if rectified is not None:
            trace(out, rectified)

    def on_read(tensor: Tensor) -> None:
        if tensor in reads:
            reads[tensor][0] += 1

    interceptor = OpInterceptor(on_norm=on_norm, on_rectifier=on_rectifier, on_rectified=on_rectified, on_read=on_read)
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(trace_output).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(interceptor)
        network(images)
    return {layer for layer, tensors in counts.items() if all(count[0] <= 1 for count in tensors)}


def _kept_part(producer: ProducerOutput, current: Tensor, dense: Tensor) -> Tensor | None:
    """Select the channels of the dense network's tensor that the pruned one has; None where their shapes differ."""
    axis, kept = channel_axis(producer.layer), producer.kept
    if current.ndim != dense.ndim or dense.shape[axis] != len(kept) or current.shape[axis] != int(kept.sum()):
        return None
    return select_channels(dense, producer.layer, kept)


def _equal(current: Tensor, reference: Tensor) -> Tensor:
    return reference
