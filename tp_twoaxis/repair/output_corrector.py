"""Which refitted layer produced the tensor at a sum or a rectifier, and the layer's correction there."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tp_twoaxis.dependency.flops import all_tensors
from tp_twoaxis.reconstruction.patch_fit import PatchFit, TargetFunction, apply_weight
from tp_twoaxis.repair.joint import (
    ProducerOutput,
    RectifiedInput,
    has_transpose,
    joint_reconstruction,
)
from tp_twoaxis.repair.lockstep import RECTIFIER, SUM, LockstepReference
from tp_twoaxis.repair.op_interceptor import OpInterceptor
from tp_twoaxis.runtime.inputs import Inputs
from tp_twoaxis.runtime.layers import broadcast_channels, channel_axis, select_channels
from tp_twoaxis.runtime.weights import add_bias

# rounds of a fit to a rectifier's input: the error after it falls further, but 4 or 12 rounds made neither of two
# CIFAR-10 ResNet-20s more accurate on 2,000 held-out training images (89.9 / 91.0, 89.6 / 90.7, 89.8 / 90.7 %)
ROUNDS = 1
# rounds of joint reconstruction. On the same networks, half the MACs, 1,000 images, accuracy in % on 8,000 held-out
# training images: 91.4 / 91.6 without and 92.2 / 92.7 with them where channels were selected by reconstruction errors
# of channels, 92.1 / 91.9 and 93.5 / 93.0 where by those of patches
JOINT_ROUNDS = 3


_Traced = MutableMapping[Tensor, tuple[ProducerOutput, ...]]


class OutputCorrector:
    """Traces outputs of refitted layers through BatchNorm to sums and rectifiers, and corrects the layers there.

    A layer's own output matters less than its effect downstream. At a sum the layer also compensates for the error of
    the other operand: its target is the dense network's sum less that operand. At a rectifier, values that the dense
    network cuts off need only be cut off here too: where the dense input is not above the lower bound, the target is
    the current input, clamped to the bound. The layer is fitted in rounds, each of which lowers the error after the
    rectifier (ours; the nonlinear reconstruction of Zhang et al. 2016 solves a similar problem by splitting). The
    corrected outputs replace those in the running pass. At rectifiers, a layer and the one before it can also be fitted
    together, see :func:`~tp_twoaxis.repair.joint.joint_reconstruction`.

    Only the outputs of layers, BatchNorms and additions are traced, and only as long as nothing but the next of these
    operations reads them: another reader has taken the tensor as it was, or would be served worse by the corrected
    one. After any other operation a layer keeps its weights.

    Args:
        dense: the dense network's pass; taken to the next sum or rectifier at each of them.
        readers: from :func:`count_readers`.
        joint: also fit layers together.
    """

    def __init__(self, dense: LockstepReference, readers: list[int], *, joint: bool) -> None:
        self.interceptor = OpInterceptor(
            on_add=self._on_add,
            on_rectifier=self._on_rectifier,
            on_norm=self._on_norm,
            on_rectified=self._on_rectified,
        )
        self._dense = dense
        self._readers = iter(readers)
        self._joint = joint
        self._registered: dict[nn.Module, ProducerOutput] = {}
        self._producers: _Traced = WeakTensorKeyDictionary()
        # producers whose outputs went into a sum: corrected at the rectifier after it, but not at the next sum
        self._summed: _Traced = WeakTensorKeyDictionary()
        self._rectified: MutableMapping[Tensor, RectifiedInput] = WeakTensorKeyDictionary()
        self._pending: RectifiedInput | None = None  # of the rectifier that is running

    def register(self, layer: nn.Module, fit: PatchFit, inputs: Tensor, norm: nn.Module | None, kept: Tensor) -> None:
        """Register a layer that was refitted and is about to run; see :class:`ProducerOutput`."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        scale = torch.ones(int(kept.sum()), dtype=weight.dtype, device=weight.device)
        rectified = self._rectified.get(inputs)
        self._registered[layer] = ProducerOutput(layer, fit, inputs, norm, kept.to(weight.device), scale, rectified)

    def trace_output(self, layer: nn.Module, inputs: object, output: object) -> None:
        """Forward hook of the layers."""
        producer = self._registered.pop(layer, None)
        if isinstance(output, Tensor):
            self._trace(output, () if producer is None else (producer,), self._producers)

    def _trace(self, tensor: Tensor, producers: tuple[ProducerOutput, ...], where: _Traced) -> None:
        self._producers.pop(tensor, None)
        self._summed.pop(tensor, None)
        if self._has_one_reader() and producers:
            where[tensor] = producers

    def _has_one_reader(self) -> bool:
        """Whether the tensor that was just computed is read once; to be asked of each in its turn."""
        return next(self._readers, 2) <= 1

    def _on_norm(self, x: Tensor, out: Tensor, scale: Tensor) -> None:
        producers = tuple(replace(p, scale=p.scale * scale) for p in self._producers.get(x, ()))
        self._trace(out, producers, self._producers)

    def _on_add(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        (reference,) = self._dense.next(SUM)
        # the layer with the larger patch can correct more, so it comes first
        both = (*self._producers.get(a, ()), *self._producers.get(b, ()))
        producers = sorted(both, key=lambda p: p.fit.width, reverse=True)
        for producer in producers:
            self._correct(producer, out, reference, _equal, 1)
        self._trace(out, tuple(producers), self._summed)

    def _on_rectifier(self, x: Tensor, low: float, high: float) -> None:
        (reference,) = self._dense.next(RECTIFIER)

        def target_fn(current: Tensor, dense: Tensor) -> Tensor:
            # where the dense input is at or beyond a bound, any value beyond it has the same effect
            target = torch.where(dense > low, dense, current.clamp(max=low))
            return torch.where(dense < high, target, current.clamp(min=high))

        own = self._producers.get(x, ())
        for producer in own or self._summed.get(x, ()):
            self._correct(producer, x, reference, target_fn, ROUNDS)
            if self._joint:
                fitted = self._reconstruct_jointly(producer, x, reference, target_fn)
                if len(own) == 1:
                    self._pending = RectifiedInput(fitted, x.clone(), low, high)

    def _on_rectified(self, out: Tensor) -> None:
        self._producers.pop(out, None)  # the rectifier may have worked in place
        self._summed.pop(out, None)
        pending, self._pending = self._pending, None
        if self._has_one_reader() and pending is not None:
            self._rectified[out] = pending

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


def count_readers(network: nn.Module, layers: Iterable[nn.Module], inputs: Inputs) -> list[int]:
    """Count the operations that read the outputs of layers, BatchNorms, additions and rectifiers, in their order.

    Being one of the model's outputs counts as being read. Views are not followed: they are one reader.

    Args:
        network: in eval mode; run once.
        layers: of it.
        inputs: a few images, on the network's device.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> count_readers(net, [net[0], net[2]], Inputs((torch.zeros(2, 2),)))
        [1, 1, 1]
    """
    reads: MutableMapping[Tensor, list[int]] = WeakTensorKeyDictionary()
    counts: list[list[int]] = []

    def trace(tensor: object) -> None:
        if isinstance(tensor, Tensor):
            reads[tensor] = [0]
            counts.append(reads[tensor])

    def on_read(tensor: Tensor) -> None:
        if tensor in reads:
            reads[tensor][0] += 1

    interceptor = OpInterceptor(
        on_add=lambda a, b, out: trace(out),
        on_norm=lambda x, out, scale: trace(out),
        on_rectified=trace,
        on_read=on_read,
    )
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(lambda layer, inputs, output: trace(output)).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(interceptor)
        for tensor in all_tensors(network(*inputs.args, **inputs.kwargs)):
            on_read(tensor)
    return [count for (count,) in counts]


def _kept_part(producer: ProducerOutput, current: Tensor, dense: Tensor) -> Tensor | None:
    """Select the channels of the dense network's tensor that the pruned one has; None where their shapes differ."""
    axis, kept = channel_axis(producer.layer), producer.kept
    if current.ndim != dense.ndim or dense.shape[axis] != len(kept) or current.shape[axis] != int(kept.sum()):
        return None
    return select_channels(dense, producer.layer, kept)


def _equal(current: Tensor, reference: Tensor) -> Tensor:
    return reference
