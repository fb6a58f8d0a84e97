"""Which refitted layer wrote what arrives at a sum or a rectifier, and its correction there."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils.weak import WeakTensorKeyDictionary

from tp_twoaxis.pruning.repair.companion import RECTIFIER, SUM, Companion
from tp_twoaxis.pruning.repair.junctions import Junctions
from tp_twoaxis.pruning.repair.patch import PatchFit
from tp_twoaxis.pruning.repair.weights import add_bias

# rounds of a fit to a rectifier's input: the error behind it falls on, but 4 or 12 rounds made neither of two
# CIFAR-10 ResNet-20s more accurate on 2,000 held-out training images (89.9 / 91.0, 89.6 / 90.7, 89.8 / 90.7 %)
ROUNDS = 1


@dataclass(frozen=True)
class Writer:
    """A refitted layer and how its outputs got where they are.

    Attributes:
        layer: its weights are final but for what a junction corrects.
        fit: what :meth:`PatchFit.solve` was called on.
        inputs: what the layer read.
        norm: the BatchNorm that takes its shift, if any.
        kept: [dense C_out] bool, channels of the dense layer that it still writes.
        scale: [C_out] factor from its outputs to here.
    """

    layer: nn.Module
    fit: PatchFit
    inputs: Tensor
    norm: nn.Module | None
    kept: Tensor
    scale: Tensor


class Writers:
    """Follows what refitted layers write through BatchNorm to sums and rectifiers, and corrects the layers there.

    What counts is not what a layer writes but what becomes of it. At a sum the layer also makes good for what the other
    operand lacks: its target is the dense network's sum less that operand. At a rectifier, values that the dense
    network cuts off need only stay cut off: where the dense input is not above the lower bound, the target is the
    present input, cut at the bound. It is fitted in rounds, each of which lowers the error behind the rectifier
    (ours; the nonlinear reconstruction of Zhang et al. 2016 solves a similar problem by splitting). The corrected
    outputs replace those in the running pass.

    Only tensors as a layer, a BatchNorm or a sum left them are followed; behind any other operation a layer keeps
    the weights that it has.

    Args:
        companion: the dense network's pass; advanced at each junction.
    """

    def __init__(self, companion: Companion) -> None:
        self.junctions = Junctions(self._summed, self._rectified, self._normed)
        self._companion = companion
        self._expected: dict[nn.Module, Writer] = {}
        self._of: MutableMapping[Tensor, tuple[Writer, ...]] = WeakTensorKeyDictionary()
        # writers whose outputs went through a sum: the next sum is another block's business
        self._spent: MutableMapping[Tensor, tuple[Writer, ...]] = WeakTensorKeyDictionary()

    def expect(self, layer: nn.Module, fit: PatchFit, inputs: Tensor, norm: nn.Module | None, kept: Tensor) -> None:
        """Announce that a layer was refitted and is about to run."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        scale = torch.ones(int(kept.sum()), dtype=weight.dtype, device=weight.device)
        self._expected[layer] = Writer(layer, fit, inputs, norm, kept.to(weight.device), scale)

    def wrote(self, layer: nn.Module, inputs: object, output: Tensor) -> None:
        """Forward hook of the layers."""
        if (writer := self._expected.pop(layer, None)) is not None:
            self._of[output] = (writer,)

    def _normed(self, x: Tensor, out: Tensor, scale: Tensor) -> None:
        self._of[out] = tuple(replace(writer, scale=writer.scale * scale) for writer in self._of.get(x, ()))

    def _summed(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        (wanted,) = self._companion.advance(SUM)
        # the layer with the larger patch can do more, so it goes first
        writers = sorted((*self._of.get(a, ()), *self._of.get(b, ())), key=lambda w: w.fit.width, reverse=True)
        for writer in writers:
            self._correct(writer, out, wanted, _plain, 1)
        self._spent[out] = tuple(writers)
        self._of.pop(out, None)

    def _rectified(self, x: Tensor, low: float, high: float) -> None:
        (wanted,) = self._companion.advance(RECTIFIER)

        def aim(now: Tensor, dense: Tensor) -> Tensor:
            # what ends at a bound there may lie anywhere beyond it here
            target = torch.where(dense > low, dense, now.clamp(max=low))
            return torch.where(dense < high, target, now.clamp(min=high))

        for writer in self._of.get(x, ()) or self._spent.get(x, ()):
            self._correct(writer, x, wanted, aim, ROUNDS)

    def _correct(
        self, writer: Writer, now: Tensor, dense: Tensor, aim: Callable[[Tensor, Tensor], Tensor], rounds: int
    ) -> None:
        layer = writer.layer
        axis = 1 if isinstance(layer, _ConvNd) else -1
        kept = writer.kept.nonzero()[:, 0]
        if dense.shape[axis] != len(writer.kept) or now.shape[axis] != len(kept):
            return
        wanted = dense if len(kept) == dense.shape[axis] else dense.index_select(axis, kept)
        change, shift = writer.fit.refine(writer.inputs, now, wanted, writer.scale, aim, rounds)
        add_bias(layer, shift, writer.norm)
        shape = [1] * now.ndim
        shape[axis] = -1
        scale = writer.scale.reshape(shape)
        moved = F.linear(writer.inputs, change) if axis == -1 else layer._conv_forward(writer.inputs, change, None)  # type: ignore[operator]
        now += scale * (moved + shift.to(moved).reshape(shape))


def _plain(now: Tensor, dense: Tensor) -> Tensor:
    return dense
