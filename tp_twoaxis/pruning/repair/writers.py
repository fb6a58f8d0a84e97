"""Which refitted layer wrote what arrives at a sum or a rectifier, and its correction there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tp_twoaxis.pruning.repair.companion import RECTIFIER, SUM, Companion
from tp_twoaxis.pruning.repair.junctions import Junctions
from tp_twoaxis.pruning.repair.pairs import Source, Writer, along, axis_of, can_pair, refine_pair, written
from tp_twoaxis.pruning.repair.patch import PatchFit
from tp_twoaxis.pruning.repair.weights import add_bias

# rounds of a fit to a rectifier's input: the error behind it falls on, but 4 or 12 rounds made neither of two
# CIFAR-10 ResNet-20s more accurate on 2,000 held-out training images (89.9 / 91.0, 89.6 / 90.7, 89.8 / 90.7 %)
ROUNDS = 1
# rounds of a fit of two layers together. On the same networks, half the MACs, 1,000 images, accuracy in % on 8,000
# held-out training images: 91.4 / 91.6 without and 92.2 / 92.7 with them where channels were selected by channel folds,
# 92.1 / 91.9 and 93.5 / 93.0 where by patches
PAIR_ROUNDS = 3


class Writers:
    """Follows what refitted layers write through BatchNorm to sums and rectifiers, and corrects the layers there.

    What counts is not what a layer writes but what becomes of it. At a sum the layer also makes good for what the other
    operand lacks: its target is the dense network's sum less that operand. At a rectifier, values that the dense
    network cuts off need only stay cut off: where the dense input is not above the lower bound, the target is the
    present input, cut at the bound. It is fitted in rounds, each of which lowers the error behind the rectifier
    (ours; the nonlinear reconstruction of Zhang et al. 2016 solves a similar problem by splitting). The corrected
    outputs replace those in the running pass. There, too, a layer and the one before it can be fitted together, see
    :func:`~tp_twoaxis.pruning.repair.pairs.refine_pair`, if no other reads what lies between.

    Only tensors as a layer, a BatchNorm or a sum left them are followed; behind any other operation a layer keeps
    the weights that it has.

    Args:
        companion: the dense network's pass; advanced at each junction.
        private: layers that may be changed for the sake of the next, from :func:`private_layers`.
    """

    def __init__(self, companion: Companion, private: set[nn.Module]) -> None:
        self._private = private
        self.junctions = Junctions(self._summed, self._rectified, self._normed, self._passed)
        self._companion = companion
        self._expected: dict[nn.Module, Writer] = {}
        self._of: MutableMapping[Tensor, tuple[Writer, ...]] = WeakTensorKeyDictionary()
        # writers whose outputs went through a sum: the next sum is another block's business
        self._spent: MutableMapping[Tensor, tuple[Writer, ...]] = WeakTensorKeyDictionary()
        self._sources: MutableMapping[Tensor, Source] = WeakTensorKeyDictionary()
        self._passing: Source | None = None

    def expect(self, layer: nn.Module, fit: PatchFit, inputs: Tensor, norm: nn.Module | None, kept: Tensor) -> None:
        """Announce that a layer was refitted and is about to run."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        scale = torch.ones(int(kept.sum()), dtype=weight.dtype, device=weight.device)
        source = self._sources.get(inputs)
        self._expected[layer] = Writer(layer, fit, inputs, norm, kept.to(weight.device), scale, source)

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

        own = self._of.get(x, ())
        for writer in own or self._spent.get(x, ()):
            self._correct(writer, x, wanted, aim, ROUNDS)
            paired = self._pair(writer, x, wanted, aim)
            if len(own) == 1 and writer.layer in self._private:
                self._passing = Source(paired, x.clone(), low, high)

    def _passed(self, out: Tensor) -> None:
        self._of.pop(out, None)  # the rectifier may have worked in place
        if self._passing is not None:
            self._sources[out], self._passing = self._passing, None

    def _pair(self, writer: Writer, now: Tensor, dense: Tensor, aim: Callable[[Tensor, Tensor], Tensor]) -> Writer:
        wanted = self._kept(writer, now, dense)
        if writer.source is None or wanted is None or not can_pair(writer.layer):
            return writer
        return refine_pair(writer, now, wanted, aim, PAIR_ROUNDS)

    def _kept(self, writer: Writer, now: Tensor, dense: Tensor) -> Tensor | None:
        """Select what the pruned network still has of the dense one's tensor, where their shapes say that it can be."""
        axis = axis_of(writer.layer)
        kept = writer.kept.nonzero()[:, 0]
        if dense.shape[axis] != len(writer.kept) or now.shape[axis] != len(kept):
            return None
        return dense if len(kept) == dense.shape[axis] else dense.index_select(axis, kept)

    def _correct(
        self, writer: Writer, now: Tensor, dense: Tensor, aim: Callable[[Tensor, Tensor], Tensor], rounds: int
    ) -> None:
        layer = writer.layer
        wanted = self._kept(writer, now, dense)
        if wanted is None:
            return
        change, shift = writer.fit.refine(writer.inputs, now, wanted, writer.scale, aim, rounds)
        add_bias(layer, shift, writer.norm)
        moved = written(layer, writer.inputs, change)
        now += along(writer.scale, moved, layer) * (moved + along(shift, moved, layer))


def private_layers(network: nn.Module, layers: Iterable[nn.Module], images: Tensor) -> set[nn.Module]:
    """Find the layers whose outputs nobody reads but one other, behind a BatchNorm or not and one rectifier.

    Such a layer may write something else than it used to, if the one that reads it is changed with it.

    Args:
        network: in eval mode; run once.
        layers: of it, each called once in a pass.
        images: a few, on the network's device.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> private_layers(net, [net[0], net[2]], torch.zeros(2, 2)) == {net[0], net[2]}
        True
    """
    owner: MutableMapping[Tensor, nn.Module] = WeakTensorKeyDictionary()
    reads: MutableMapping[Tensor, list[int]] = WeakTensorKeyDictionary()
    counts: dict[nn.Module, list[list[int]]] = {}
    rectified: nn.Module | None = None

    def track(tensor: Tensor, layer: nn.Module) -> None:
        owner[tensor], reads[tensor] = layer, [0]
        counts.setdefault(layer, []).append(reads[tensor])

    def wrote(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            track(output, layer)

    def normed(x: Tensor, out: Tensor, scale: Tensor) -> None:
        if x in owner:
            track(out, owner[x])

    def before(x: Tensor, low: float, high: float) -> None:
        nonlocal rectified
        rectified = owner.get(x)

    def passed(out: Tensor) -> None:
        if rectified is not None:
            track(out, rectified)

    def read(tensor: Tensor) -> None:
        if tensor in reads:
            reads[tensor][0] += 1

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(wrote).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(Junctions(lambda a, b, out: None, before, normed, passed, read))
        network(images)
    return {layer for layer, tensors in counts.items() if all(count[0] <= 1 for count in tensors)}


def _plain(now: Tensor, dense: Tensor) -> Tensor:
    return dense
