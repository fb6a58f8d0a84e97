"""Remove channels on trial, and see whether what is left computes what the dense network computes there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tp_twoaxis.dependency.channel_marks import (
    MIXING_LAYERS,
    ChooseUnits,
    first_third,
    marked_roots,
    own_layers,
    single_units,
    unit_count,
)
from tp_twoaxis.dependency.flops import ExampleInputs, all_tensors, call, inside, running_layers
from tp_twoaxis.dependency.graph import PrunableGroup, build_graph, group_key
from tp_twoaxis.dependency.groups import root_layer
from tp_twoaxis.dependency.removal import refresh_widths, remove
from tp_twoaxis.errors import listing
from tp_twoaxis.runtime.layers import MIXING_NORMS, channel_axis
from tp_twoaxis.runtime.model_state import ModelSnapshot, eval_mode, fork_rng

EXACT = 1e-3
"""Relative difference of a channel from the dense network's that rounding explains."""

MIXED = 0.5
"""Relative difference of a channel that one channel less in a mean, norm or product over channels explains; a channel
in another's place differs by about 1.4."""


class _MisfitError(Exception):
    """What is left does not fit; the message says where."""


def trial_removal(groups: Sequence[PrunableGroup], model: nn.Module, example_inputs: ExampleInputs) -> str | None:
    """Remove channels of some groups, compare layer by layer with the dense network, and put everything back.

    Every layer that mixes channels is compared by what it reads, and every norm over channels, and hands on what the
    dense network's writes; so each stretch of operations between two such layers is judged by itself. A third of the
    channels is removed first. Where the outcome is the dense network's to rounding, all is well. Where an operation
    over all channels (a mean, a product of a feature with itself) makes it differ, single channels are removed instead,
    whose absence can change the others a little but not put one in another's place.

    Args:
        groups: removed together.
        model: the dense model; afterwards it is as before.
        example_inputs: of its forward.

    Returns:
        None, or what does not fit, in words.
    """
    dense = _Recording()
    with fork_rng(), eval_mode(model), dense.recorded(model):
        dense.outputs = [tensor.shape for tensor in all_tensors(call(model, example_inputs))]
    try:
        if _difference(groups, first_third, model, example_inputs, dense) <= EXACT:
            return None
        for choose in single_units(min(unit_count(group) for group in groups)):
            if (found := _difference(groups, choose, model, example_inputs, dense)) > MIXED:
                return f"what is left differs from the dense network by {found:.0%}"
    except _MisfitError as error:
        return str(error)
    return None


def _difference(
    groups: Sequence[PrunableGroup], choose: ChooseUnits, model: nn.Module, inputs: ExampleInputs, dense: _Recording
) -> float:
    """Give the largest relative difference of any channel that a layer reads, the rest being the dense network's."""
    snapshot, graph = ModelSnapshot(model), build_graph(model, inputs)
    masks = {group_key(group): marked_roots(group, choose) for group in groups}
    gone: dict[tuple[nn.Module, bool], set[int]] = {}
    for group in groups:
        for part in group.parts:
            leaving = part.channels[masks[group_key(group)][part.roots]].tolist()
            for at_outputs in (True,) * part.is_producer + (False,) * part.is_consumer:
                gone.setdefault((part.module, at_outputs), set()).update(leaving)
    # heads that lose some of their channels mix queries and keys; they are tried on their own
    free = {root_layer(g.group) for g in groups if g.attention is not None and g.attention.unit == "head-dims"}
    try:
        with running_layers(model) as running:
            try:
                remove(graph, list(groups), {key: mask.numpy() for key, mask in masks.items()})
                refresh_widths(model)
                with fork_rng(), eval_mode(model), dense.compared(model, gone, free) as differences:
                    shapes = [tensor.shape for tensor in all_tensors(call(model, inputs))]
            except _MisfitError:
                raise
            except Exception as error:
                where = running[-1] if running else ""
                snapshot.restore()
                held = listing(tensors_of_width(model, {len(group.channels) for group in groups}, where))
                held = f"; {held} may hold its width" if held else ""
                raise _MisfitError(f"{type(error).__name__}{inside(running, model)}: {error}{held}") from error
    finally:
        snapshot.restore()
    if shapes != dense.outputs:
        raise _MisfitError("an output of the model would lose channels")
    return max(differences, default=0.0)


def tensors_of_width(model: nn.Module, widths: set[int], where: str) -> list[str]:
    """Name parameters and buffers outside known layers that have a dimension of some width.

    Args:
        model: the dense model.
        widths: in channels.
        where: the module in which a removal failed; if it holds such tensors only those are named.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))
        >>> net.register_buffer("mean", torch.zeros(1, 6, 1, 1))
        >>> tensors_of_width(net, {6}, "0")
        ['mean [1, 6, 1, 1]']
    """
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.modules.") and next(module.children(), None) is None:
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if widths.intersection(tensor.shape):
                found[f"{prefix}.{name}".lstrip(".") + f" {list(tensor.shape)}"] = prefix
    near = [name for name, prefix in found.items() if prefix == where]
    return near or list(found)


class _Recording:
    """What every mixing layer and norm of the dense network read and wrote, call by call."""

    def __init__(self) -> None:
        self.outputs: list[torch.Size] = []
        self._calls: dict[nn.Module, list[tuple[Tensor, Any, int]]] = {}

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator[None]:
        """Record inside the block."""

        def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if (read := _first(args, kwargs)) is not None:
                call = read.detach().clone(), _copied(output), _channels_of(layer, read)
                self._calls.setdefault(layer, []).append(call)

        with _hooked(model, keep):
            yield

    @contextmanager
    def compared(
        self, model: nn.Module, gone: dict[tuple[nn.Module, bool], set[int]], free: set[nn.Module]
    ) -> Iterator[list[float]]:
        """Compare inside the block, where layers hand on what the dense network's wrote.

        Args:
            model: with channels removed.
            gone: layer, whether of its outputs -> the channels that it lost.
            free: layers that are not compared.

        Yields:
            The largest difference at every call so far.
        """
        left = {layer: list(calls) for layer, calls in self._calls.items()}
        names = {module: name for name, module in model.named_modules()}
        differences: list[float] = []

        def compare(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> Any:
            read = _first(args, kwargs)
            if read is None or not left.get(layer):
                return None
            before, wrote, axis = left[layer].pop(0)
            kept = _without(before, gone.get((layer, False), set()), axis)
            if kept.shape != read.shape:
                raise _MisfitError(
                    f"{names[layer]} would read {list(read.shape)} where {list(kept.shape)} is left of what it read"
                )
            if layer not in free:
                differences.append(_worst_channel(read, kept, axis))
            lost = gone.get((layer, True), set())
            if isinstance(wrote, tuple):
                return _copied((_without(wrote[0], lost, axis), *wrote[1:]))
            return _copied(_without(wrote, lost, axis))

        with _hooked(model, compare):
            yield differences


@contextmanager
def _hooked(model: nn.Module, hook: Any) -> Iterator[None]:
    """Hook all layers that mix channels, and the norms over channels."""
    with ExitStack() as stack:
        for layer in own_layers(model):
            if isinstance(layer, (*MIXING_LAYERS, *MIXING_NORMS)):
                stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _copied(value: Any) -> Any:
    """Copy tensors, which operations in place would change."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)


def _channels_of(layer: nn.Module, read: Tensor) -> int:
    """Dimension of the channels in what a layer reads; norms over the last one are also made to take maps."""
    if isinstance(layer, MIXING_LAYERS):
        return channel_axis(layer)
    width = getattr(layer, "normalized_shape", (None,))[-1]
    maps = width is None or (read.ndim > 2 and read.shape[1] == width and type(layer) is not nn.LayerNorm)
    return 1 - read.ndim if maps else -1


def _without(tensor: Tensor, gone: set[int], axis: int) -> Tensor:
    if not gone:
        return tensor
    kept = [place for place in range(tensor.shape[axis]) if place not in gone]
    return tensor.index_select(axis, torch.tensor(kept, device=tensor.device))


def _worst_channel(found: Tensor, expected: Tensor, axis: int) -> float:
    """Largest relative difference of a channel; channels without much in them are measured by the others."""
    if not found.is_floating_point() or not found.numel():
        return 0.0
    found, expected = (t.double().movedim(axis, 0).flatten(1) for t in (found, expected))
    size = expected.square().sum(1).sqrt()
    scale = torch.maximum(size, 0.1 * size.square().mean().sqrt()).clamp_min(1e-12)
    return float(((found - expected).square().sum(1).sqrt() / scale).nan_to_num(torch.inf).max())


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
