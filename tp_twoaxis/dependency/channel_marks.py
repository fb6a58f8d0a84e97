"""Follow channels by marks: one forward pass in which some channels are NaN tells who reads which of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from tp_twoaxis.dependency.flops import ExampleInputs, all_tensors, call
from tp_twoaxis.dependency.graph import PrunableGroup
from tp_twoaxis.dependency.groups import members, root_layer
from tp_twoaxis.dependency.recurrent import RECURRENT_LAYERS
from tp_twoaxis.runtime.layers import CHANNEL_LAYERS, MIXING_NORMS, channel_axis
from tp_twoaxis.runtime.model_state import ModelSnapshot, eval_mode, fork_rng

MIXING_LAYERS = (*CHANNEL_LAYERS, *RECURRENT_LAYERS, nn.Bilinear)
"""Layers each of whose outputs depends on all inputs (of a block): channels end here."""

ChooseUnits = Callable[[int], Tensor]
"""From a number of units (channels of one block, heads) to [units] bool, those to mark."""


@dataclass
class Sightings:
    """What a pass with marks showed.

    Attributes:
        misread: layers that received other marked channels than those that would be removed.
        blind: layers that received nothing but marks, or none where some were expected: they prove nothing.
        outputs: whether marks came out of the model past all layers.
        error: what the pass raised, if it did not end; then nothing is proven.
    """

    misread: dict[str, None] = field(default_factory=dict)
    blind: dict[str, None] = field(default_factory=dict)
    outputs: bool = False
    error: Exception | None = None

    def __bool__(self) -> bool:
        return bool(self.misread or self.blind or self.outputs or self.error)


def first_third(units: int) -> Tensor:
    """Choose the first third of the units, at least one."""
    return torch.arange(units) < max(1, units // 3)


def scattered_third(units: int) -> Tensor:
    """Choose a third of the units, at least one, without a pattern that a reshape could follow."""
    order = torch.randperm(units, generator=torch.Generator().manual_seed(units))
    return order < max(1, units // 3)


def single_units(units: int) -> list[ChooseUnits]:
    """Choose single units: first, last, and some between them."""
    places = sorted({0, 1 % units, units // 3, units // 2, (2 * units) // 3 + 1, units - 1} & set(range(units)))
    return [lambda n, place=place: torch.arange(n) == place for place in places]  # type: ignore[misc]


def unit_count(group: PrunableGroup) -> int:
    """Count what of a group can be marked alone: channels of a block, or heads."""
    return len(group.channels) // group.blocks // group.run


def marked_roots(group: PrunableGroup, choose: ChooseUnits) -> Tensor:
    """Give [size] bool, the root channels of the chosen units, the same in every block."""
    units = unit_count(group)
    return choose(units)[torch.arange(len(group.channels)) // group.run % units]


def follow_marks(
    groups: Sequence[PrunableGroup],
    choose: ChooseUnits,
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    mode: Callable[[nn.Module], Any] = eval_mode,
    unlisted: Iterable[nn.Module] = (),
) -> Sightings:
    """Mark channels where they are written and compare what every layer receives with what would be removed from it.

    Layers that mix channels go on with zeros, so that every stretch between two of them is looked at by itself.
    Norms over channels are looked through: a mark stays with its channel. Parameters along channels carry the
    marks too. Where heads of attention lose some of their channels only values are marked, because a query reaches
    all channels of its head; the projection of an attention module receives the marked heads' channels and no others,
    or the channels do not make up heads as supposed.

    Args:
        groups: whose channels are marked.
        choose: which of them.
        model: the dense model; afterwards it is as before.
        example_inputs: of its forward.
        mode: a context in which the model runs.
        unlisted: layers whose marks are not compared: they may only receive none.
    """
    expectation = _Expectation(groups, choose, frozenset(unlisted))
    seen = Sightings()
    names = {module: name for name, module in model.named_modules()}

    def receive(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first, others = _read_by(layer, args, kwargs)
        for tensor in first:
            expectation.compare(layer, tensor, names[layer], seen)
        if any(bool(tensor.isnan().any()) for tensor in others):
            seen.misread[names[layer]] = None
        if isinstance(layer, MIXING_LAYERS):
            return tree_map(lambda x: x.nan_to_num(0.0) if _is_float(x) else x, (args, kwargs))
        return None

    def mark(layer: nn.Module, _: Any, output: Any) -> Any:
        values = output[0] if isinstance(output, tuple) else output
        values = values.clone()
        values.movedim(channel_axis(layer), -1)[..., sorted(expectation.written[layer])] = torch.nan
        return (values, *output[1:]) if isinstance(output, tuple) else values

    def through_norm(norm: nn.Module, inputs: tuple[Any, ...]) -> Any:
        marks[norm] = inputs[0].isnan()
        return (inputs[0].nan_to_num(0.0), *inputs[1:])

    def behind_norm(norm: nn.Module, _: Any, output: Tensor) -> Tensor:
        return output.masked_fill(marks.pop(norm), torch.nan)

    marks: dict[nn.Module, Tensor] = {}
    snapshot = ModelSnapshot(model)
    try:
        with ExitStack() as stack:
            stack.enter_context(fork_rng())
            stack.enter_context(mode(model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused kernels have ways of their own with NaN
            expectation.mark_parameters()
            for layer in own_layers(model):
                if isinstance(layer, MIXING_LAYERS) or layer in expectation.read:
                    stack.callback(layer.register_forward_pre_hook(receive, with_kwargs=True).remove)
                if expectation.written.get(layer) and isinstance(layer, (*CHANNEL_LAYERS, nn.Embedding)):
                    stack.callback(layer.register_forward_hook(mark).remove)
                if isinstance(layer, MIXING_NORMS):
                    stack.callback(layer.register_forward_pre_hook(through_norm).remove)
                    stack.callback(layer.register_forward_hook(behind_norm).remove)
            seen.outputs = any(_is_float(t) and bool(t.isnan().any()) for t in all_tensors(call(model, example_inputs)))
    except Exception as error:  # it refuses NaN, or to run in this mode
        seen.error = error
    finally:
        snapshot.restore()
    return seen


def own_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Iterate over modules that are called as modules: not over those inside ``nn.MultiheadAttention``."""
    attention = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    inside = {child for module in attention for child in module.modules()} - set(attention)
    return (module for module in model.modules() if module not in inside)


class _Expectation:
    """Which channels are marked, and which of them each layer should receive."""

    def __init__(self, groups: Sequence[PrunableGroup], choose: ChooseUnits, unlisted: frozenset[nn.Module]) -> None:
        self.written: dict[nn.Module, set[int]] = {}
        self.read: dict[nn.Module, set[int]] = {}
        self._unlisted = unlisted
        self._projections = {root_layer(group.group) for group in groups if group.attention}
        self._parameters: list[tuple[nn.Parameter, int, list[int]]] = []
        for group in groups:
            marked = marked_roots(group, choose)
            parts = group.parts
            if group.attention is not None and group.attention.unit == "head-dims":
                parts = list(members(group.attention.value))
            for part in parts:
                channels = part.channels[marked[part.roots]].tolist()
                if part.is_producer:
                    self.written.setdefault(part.module, set()).update(channels)
                if part.is_consumer and (isinstance(part.module, MIXING_LAYERS) or _has_width(part.module)):
                    self.read.setdefault(part.module, set()).update(channels)
            leaving = {channel for channel, chosen in zip(group.channels, marked.tolist(), strict=True) if chosen}
            for item in group.group:
                parameter, roots = item.dep.target.module, getattr(item, "root_idxs", None)
                if isinstance(parameter, nn.Parameter) and parameter.is_floating_point() and roots is not None:
                    places = [i for i, root in zip(item.idxs, roots, strict=True) if root in leaving]
                    self._parameters.append((parameter, item.dep.target.pruning_dim, places))

    def mark_parameters(self) -> None:
        """Mark parameters that have a value for every channel; a snapshot takes it back."""
        for parameter, dim, places in self._parameters:
            values = parameter.detach().clone()
            values.movedim(dim, -1)[..., places] = torch.nan
            parameter.data = values

    def compare(self, layer: nn.Module, tensor: Tensor, name: str, seen: Sightings) -> None:
        """Compare the marks in what a layer reads with those that would be removed."""
        expected = self.read.get(layer, set())
        nan = tensor.isnan()
        if layer in self._unlisted:
            if bool(nan.any()):
                seen.misread[name] = None
            return
        found = [_marked_along(nan, axis) for axis in _axes(layer, tensor)]
        if not found or any(got == expected for got, _ in found):
            return
        got, width = found[0]
        if layer not in self._projections and (not got or len(got) == width):
            seen.blind[name] = None
        else:
            seen.misread[name] = None


def _has_width(module: nn.Module) -> bool:
    """Whether a module has a value for every channel: a norm, slopes."""
    return any(p.numel() > 1 for p in module.parameters(recurse=False))


def _axes(layer: nn.Module, tensor: Tensor) -> list[int]:
    """Dimensions that can be the channels of what a layer reads."""
    if isinstance(layer, MIXING_LAYERS):
        return [channel_axis(layer)]
    if isinstance(layer, MIXING_NORMS) and not isinstance(layer, nn.GroupNorm):
        width = next(iter(layer.parameters(recurse=False))).shape[-1]
        return [axis for axis in (-1, 1) if tensor.ndim > 1 and tensor.shape[axis] == width]
    return [1] if tensor.ndim > 1 and not isinstance(layer, nn.Embedding) else []


def _marked_along(nan: Tensor, axis: int) -> tuple[set[int], int]:
    """Give the places along a dimension that hold any mark, and how many places there are."""
    nan = nan.movedim(axis, -1)
    return set(nan.reshape(-1, nan.shape[-1]).any(0).nonzero()[:, 0].tolist()), nan.shape[-1]


def _read_by(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Find what a layer reads along its input channels, and what it reads besides along channels that never leave.

    Of attention query, key and value are read, of others the first argument; a recurrent layer's states come besides.
    """
    given = [*args, *kwargs.values()]
    count = 3 if isinstance(layer, nn.MultiheadAttention) else 2 if isinstance(layer, nn.Bilinear) else 1
    tensors = [value.data if isinstance(value, nn.utils.rnn.PackedSequence) else value for value in given]
    first = [value for value in tensors[:count] if _is_float(value)]
    states = tensors[count:] if isinstance(layer, RECURRENT_LAYERS) else []
    return first, [leaf for leaf in tree_leaves(states) if _is_float(leaf)]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
