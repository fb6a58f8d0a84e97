"""Do removed channels arrive where Torch-Pruning says they do? One forward pass with marked channels tells.

Torch-Pruning maps channels through reshapes by rules of its own. Two common patterns break them and still run:
``permute(0, 2, 3, 1).flatten(1)`` (it takes the flattened order for channel-major) and ``chunk`` (it takes
the halves in the order in which it met them); then the wrong inputs of the next layer would be removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from tp_twoaxis.dependency.attention import Attention, AttentionUnit
from tp_twoaxis.dependency.flops import ExampleInputs, call
from tp_twoaxis.dependency.graph import PrunableGroup, build_graph, group_key, prunable_groups
from tp_twoaxis.dependency.groups import members, root_layer
from tp_twoaxis.dependency.removal import prune_group
from tp_twoaxis.errors import listing
from tp_twoaxis.runtime.layers import MIXING_NORMS, channel_axis, channel_layers
from tp_twoaxis.runtime.model_state import ModelSnapshot, eval_mode, fork_rng


def verified_groups(
    graph: Any,
    model: nn.Module,
    example_inputs: ExampleInputs,
    ignored_layers: list[nn.Module],
    attention: AttentionUnit = "heads",
) -> tuple[list[PrunableGroup], list[str]]:
    """List the prunable groups whose channels arrive at the inputs that Torch-Pruning would remove.

    Returns:
        The groups, and notes on what stays whole or may break.
    """
    groups, notes = prunable_groups(graph, model, ignored_layers, attention)
    if any(group.attention for group in groups):
        stuck = fixed_heads(model, example_inputs, ignored_layers, attention)
        groups = [group for group in groups if group_key(group) not in stuck]
        if stuck:
            reason = next(iter(stuck.values()))
            notes.append(f"{listing(stuck, 3)}: keeps its heads{_HOW[attention]} ({reason})")
    misrouted = misrouted_groups(groups, model, example_inputs)
    notes += [
        f"{name}: stays whole, because Torch-Pruning maps it to the wrong inputs of {listing(consumers)}"
        for name, consumers in misrouted.items()
    ]
    if idle := [name for name, layer in channel_layers(model).items() if layer not in graph.module2node]:
        notes.append(
            f"{listing(idle)} did not run on example_inputs, or without gradients, where Torch-Pruning cannot follow; "
            "they may no longer fit what they read"
        )
    return [group for group in groups if group_key(group) not in misrouted], notes


_HOW = {
    "heads": ", its code does not run with one less",
    "head-dims": " as wide as they are, its code does not work with narrower ones",
}


def fixed_heads(
    model: nn.Module,
    example_inputs: ExampleInputs,
    ignored_layers: list[nn.Module],
    attention: AttentionUnit = "heads",
) -> dict[str, str]:
    """Find attention modules whose code holds a width that it does not keep in a known attribute: by trying.

    One head of every module of a class is removed, or one channel of every head, the model runs, and everything is
    put back. Where channels of heads were removed the projections must also write what they write when the dense
    network's queries, keys and values are zero there, at the temperature of the narrower heads: one that no known
    attribute holds, or positions rotated into queries and keys, would show.

    Returns:
        Group key -> what running raised, or that it came out otherwise.

    Example:
        >>> fixed_heads(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(1, 4), [])
        {}
    """
    graph = build_graph(model, example_inputs)  # of its own, because removal leaves its mark on a graph
    listed = prunable_groups(graph, model, ignored_layers, attention)[0]
    groups = [(group, group.attention) for group in listed if group.attention]
    snapshot = ModelSnapshot(model)
    stuck: dict[str, str] = {}
    for kind in dict.fromkeys(type(heads.module) for _, heads in groups):
        alike = [(group, heads) for group, heads in groups if type(heads.module) is kind]
        projections = [root_layer(group.group) for group, _ in alike]
        try:
            with fork_rng(), eval_mode(model):
                if attention == "head-dims":
                    for _, heads in alike:
                        _silence(heads)
                    expected = _written(projections, model, example_inputs)
                    snapshot.restore()
                for group, heads in alike:
                    prune_group(graph, group, _first(heads))
                found = _written(projections, model, example_inputs)
        except Exception as error:
            stuck |= {group_key(group): f"{type(error).__name__}: {error}" for group, _ in alike}
        else:
            if attention == "head-dims":
                stuck |= {
                    group_key(group): "attention comes out otherwise"
                    for (group, _), before, after in zip(alike, expected, found, strict=True)
                    if not _close(before, after)
                }
        finally:
            snapshot.restore()
    return stuck


def _first(heads: Attention) -> list[int]:
    """Channels of the first head, or the first channel of every head."""
    return list(range(heads.head_width) if heads.unit == "heads" else range(0, heads.width, heads.head_width))


def _silence(heads: Attention) -> None:
    """Let queries, keys and values be zero in the first channel of every head, and products as large as without it."""
    leaving = torch.zeros(heads.width, dtype=torch.bool)
    leaving[_first(heads)] = True
    for part in heads.parts:
        if part.is_producer and isinstance(part.module, nn.Linear):
            for parameter in part.module.parameters(recurse=False):
                silent = parameter.detach().clone()
                silent[part.channels[leaving[part.roots]]] = 0.0
                if part.module is heads.query.module:
                    silent[heads.query.channels] *= (heads.head_width / (heads.head_width - 1)) ** 0.5
                parameter.data = silent


def _written(layers: list[nn.Module], model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    """Run a model and give what some of its layers write."""
    written: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, _: Any, output: Tensor) -> None:
        written[layer] = output.detach()

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        call(model, example_inputs)
    return [written[layer] for layer in layers]


def _close(expected: Tensor, found: Tensor) -> bool:
    tolerance = max(1e-4, 20.0 * torch.finfo(expected.dtype).eps)
    return bool((expected - found).abs().max() <= tolerance * expected.abs().max())


def misrouted_groups(
    groups: list[PrunableGroup], model: nn.Module, example_inputs: ExampleInputs
) -> dict[str, list[str]]:
    """Find groups whose channels reach other inputs of a layer than Torch-Pruning would remove.

    The first third of each group's channels (of each block; of the heads) is set to NaN where it is written;
    every layer that reads compares the NaN channels it receives with those that would be removed, and goes on
    with zeros instead. A layer that receives none or nothing but NaN proves nothing: some operation swallowed the
    marks or spread them. Not so the projection of an attention module: where channels make up heads as supposed,
    it receives those of the marked heads and no others. Where heads lose some of their channels only values are
    marked, because a query reaches all channels of its head.

    Args:
        groups: the prunable groups.
        model: the dense model; afterwards it is as before.
        example_inputs: of its forward.

    Returns:
        Group key -> the layers that disagree; empty when all is well, or when the model does not run on NaN.

    Example:
        >>> from tp_twoaxis.dependency.graph import build_graph, prunable_groups
        >>> net, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6 * 4, 2)), torch.randn(1, 3, 4, 4)
        >>> groups, _ = prunable_groups(build_graph(net, x), net, [])
        >>> misrouted_groups(groups, net, x)
        {}
    """
    written: dict[nn.Module, set[int]] = {}
    read: dict[nn.Module, set[int]] = {}
    for group in groups:
        units = len(group.channels) // group.blocks // group.run
        unit = torch.arange(len(group.channels)) // group.run % units
        marked = unit < max(1, units // 3)
        parts = group.parts
        if group.attention is not None and group.attention.unit == "head-dims":
            parts = list(members(group.attention.value))
        for part in parts:
            channels = part.channels[marked[part.roots]].tolist()
            if part.is_producer:
                written.setdefault(part.module, set()).update(channels)
            if part.is_consumer:
                read.setdefault(part.module, set()).update(channels)
    layers = {module: name for name, module in channel_layers(model).items()}
    projections = {root_layer(group.group) for group in groups if group.attention}
    disagree: set[nn.Module] = set()

    def receive(layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if layer in read and inputs and isinstance(inputs[0], Tensor):
            nan = inputs[0].movedim(channel_axis(layer), -1).isnan()
            got = nan.reshape(-1, nan.shape[-1]).any(0)
            telling = layer in projections or 0 < int(got.sum()) < len(got)
            if telling and set(got.nonzero()[:, 0].tolist()) != read[layer]:
                disagree.add(layer)
        return tree_map(lambda x: x.nan_to_num(0.0) if _is_float(x) else x, inputs)

    def mark(layer: nn.Module, _: Any, output: Any) -> Any:
        values = output[0] if isinstance(output, tuple) else output
        values = values.clone()
        values.movedim(channel_axis(layer), -1)[..., sorted(written[layer])] = torch.nan
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
            stack.enter_context(eval_mode(model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused kernels have ways of their own with NaN
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(receive).remove)
                if written.get(layer):
                    stack.callback(layer.register_forward_hook(mark).remove)
            for norm in model.modules():
                if isinstance(norm, MIXING_NORMS):
                    stack.callback(norm.register_forward_pre_hook(through_norm).remove)
                    stack.callback(norm.register_forward_hook(behind_norm).remove)
            call(model, example_inputs)
    except (RuntimeError, ValueError, AssertionError):
        return {}  # it refuses NaN; whether it runs at all is found out elsewhere
    finally:
        snapshot.restore()
    return {
        group_key(group): wrong
        for group in groups
        if (
            wrong := _names(
                layers, (part.module for part in group.parts if part.is_consumer and part.module in disagree)
            )
        )
    }


def _names(layers: dict[nn.Module, str], chosen: Iterable[nn.Module]) -> list[str]:
    return [layers[layer] for layer in chosen if layer in layers]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
