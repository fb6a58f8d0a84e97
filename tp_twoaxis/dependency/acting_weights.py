"""Layers whose stored weights are not those that act: standardised, normalised or scaled anew in every forward pass.

A slice of the stored weights need not act as the slice of those that act does. Whether it does is tried layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from tp_twoaxis.dependency.channel_marks import own_layers
from tp_twoaxis.dependency.flops import ExampleInputs, all_tensors, call
from tp_twoaxis.dependency.graph import PrunableGroup, build_graph, group_key
from tp_twoaxis.dependency.groups import Member
from tp_twoaxis.errors import reason
from tp_twoaxis.runtime.kernels import has_own_forward
from tp_twoaxis.runtime.layers import channel_axis
from tp_twoaxis.runtime.model_state import ModelSnapshot, eval_mode, fork_rng


def layers_with_other_weights(
    groups: Sequence[PrunableGroup], model: nn.Module, example_inputs: ExampleInputs
) -> dict[str, str]:
    """Find groups of which some layer would compute other weights from the slice that is left of its stored ones.

    Only convolutions and linear layers are looked at whose class has a ``forward`` of its own, that are parametrised,
    or that hooks prepare. Each loses a third of the channels that the group would take, on what it reads in the
    network, and must compute what it computed without them. One that only pads does.

    Args:
        groups: the prunable groups.
        model: the dense model; afterwards it is as before.
        example_inputs: of its forward.

    Returns:
        Group key -> why it stays whole, with the layer and the way out.

    Example:
        >>> from tp_twoaxis.dependency.graph import prunable_groups
        >>> net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 4, 1)))
        >>> x = torch.randn(1, 3, 4, 4)
        >>> groups, _ = prunable_groups(build_graph(net.eval(), x), net, [])
        >>> list(layers_with_other_weights(groups, net, x))
        ['0']
    """
    names = {module: name for name, module in model.named_modules()}
    suspects = {layer: names[layer] for layer in own_layers(model) if _prepares_weights(layer)}
    touched = {part.module for group in groups for part in group.parts} & suspects.keys()
    if not touched:
        return {}
    read = _inputs_of(touched, model, example_inputs)
    snapshot, graph = ModelSnapshot(model), build_graph(model, example_inputs)
    found: dict[str, str] = {}
    for group in groups:
        for part in group.parts:
            if part.module not in touched or part.module not in read or group_key(group) in found:
                continue
            leaving = torch.zeros(len(group.channels), dtype=torch.bool)
            units = len(group.channels) // group.blocks
            leaving[torch.arange(len(group.channels)) % units < max(1, units // 3)] = True
            channels = sorted(part.channels[leaving[part.roots]].tolist())
            try:
                with fork_rng(), eval_mode(model):
                    differs = _differs(suspects[part.module], graph, part, channels, read[part.module])
            finally:
                snapshot.restore()
            if differs is not None:
                found[group_key(group)] = f"{differs}; {_way_out(part.module)}"
    return found


def _prepares_weights(layer: nn.Module) -> bool:
    """Whether a convolution or linear layer may compute the weights that act when it runs."""
    if not isinstance(layer, (_ConvNd, nn.Linear)):
        return False
    return (
        has_own_forward(layer)
        or is_parametrized(layer)
        or bool(layer._forward_pre_hooks)
        or "weight" not in layer._parameters
    )


def _inputs_of(layers: set[nn.Module], model: nn.Module, example_inputs: ExampleInputs) -> dict[nn.Module, Tensor]:
    read: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = all_tensors([*args, *kwargs.values()])
        if tensors:
            read.setdefault(layer, tensors[0].detach().clone())

    with ExitStack() as stack:
        stack.enter_context(fork_rng())
        stack.enter_context(eval_mode(model))
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        call(model, example_inputs)
    return read


def _differs(name: str, graph: Any, part: Member, channels: list[int], read: Tensor) -> str | None:
    """Explain how a layer without some channels differs from what it computes with them; None if it does not."""
    layer, axis = part.module, channel_axis(part.module)
    pruner = graph.get_pruner_of_module(layer)
    silent = read.clone()
    if part.is_consumer:
        silent.movedim(axis, -1)[..., channels] = 0.0
    before = layer(silent)
    try:
        if part.is_consumer:
            read = _without(read, channels, axis)
        if part.is_producer:
            before = _without(before, channels, axis)
        (pruner.prune_out_channels if part.is_producer else pruner.prune_in_channels)(layer, channels)
        after = layer(read)
    except Exception as error:
        return f"channels cannot leave {name} ({reason(error)})"
    tolerance = max(1e-3, 50.0 * torch.finfo(before.dtype).eps)
    if after.shape == before.shape and bool((after - before).abs().max() <= tolerance * before.abs().max()):
        return None
    return f"the weights that {name} stores are not those that act"


def _without(tensor: Tensor, channels: list[int], axis: int) -> Tensor:
    kept = sorted(set(range(tensor.shape[axis])).difference(channels))
    return tensor.index_select(axis, torch.tensor(kept, device=tensor.device))


def _way_out(layer: nn.Module) -> str:
    if is_parametrized(layer):
        names = [name for name in ("weight", "bias") if is_parametrized(layer, name)]
        calls = " and ".join(f"remove_parametrizations(layer, {name!r})" for name in names)
        return f"call torch.nn.utils.parametrize.{calls} before pruning"
    if hasattr(layer, "weight_g"):
        return "call torch.nn.utils.remove_weight_norm(layer) before pruning"
    if hasattr(layer, "weight_mask"):
        return "call torch.nn.utils.prune.remove(layer, 'weight') before pruning"
    if hasattr(layer, "weight_orig"):
        return "call torch.nn.utils.remove_spectral_norm(layer) before pruning"
    plain = next(c.__name__ for c in type(layer).__mro__ if c.__module__.startswith("torch.nn.modules"))
    return f"put a plain {plain} that holds the weights that act in place of this {type(layer).__name__} before pruning"
