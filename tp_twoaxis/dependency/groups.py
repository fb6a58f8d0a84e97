"""Torch-Pruning's groups, read: producers and consumers of the channels, and which root channel each one is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.layers import in_channels_of
from tp_twoaxis.runtime.model_state import unwrap


@dataclass(frozen=True)
class Member:
    """One layer's part in a group.

    Attributes:
        module: the layer.
        channels: [n] int64, channels of the layer.
        roots: [n] int64, position of the matching root channel in the group, 0 <= root < size;
            a root channel may occur several times (fused qkv) or not at all (concatenation).
        is_producer: whether the layer's outputs are removed.
        is_consumer: whether its inputs are removed; both at once for depthwise convolutions and attention.
    """

    module: nn.Module
    channels: Tensor
    roots: Tensor
    is_producer: bool
    is_consumer: bool


def root_size(group: Any) -> int:
    """Count the root channels of a group: the length of the importance it needs."""
    return len(group[0].idxs)


def members(group: Any) -> Iterator[Member]:
    """Read a group's layers in Torch-Pruning's order, without parameters of no module and items without root channels.

    Args:
        group: a ``torch_pruning`` group, full or partial.

    Example:
        >>> import torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))
        >>> [(type(m.module).__name__, m.is_producer, m.is_consumer) for m in members(group)]
        [('Conv2d', True, False), ('BatchNorm2d', True, True), ('Conv2d', False, True)]
    """
    graph = group._DG
    place = {channel: position for position, channel in enumerate(group[0].idxs)}
    for item in group:
        module, handler = item.dep.target.module, item.dep.handler
        if not isinstance(module, nn.Module):
            continue
        roots = getattr(item, "root_idxs", None)
        # grouped-query attention maps to no root channel (None); nothing can be attributed there
        if roots is None or None in roots:
            continue
        yield Member(
            module,
            _int64(item.idxs),
            _int64([place[root] for root in roots]),
            is_producer=graph.is_out_channel_pruning_fn(handler),
            is_consumer=graph.is_in_channel_pruning_fn(handler),
        )


def _int64(numbers: list[int]) -> Tensor:
    return torch.from_numpy(np.array(numbers, dtype=np.int64))  # several times faster than torch.tensor


def group_consumers(group: Any) -> list[Member]:
    """Find the consumers of a group's channels: the convolutions and linear layers that read them.

    Depthwise ones, which pass the channels on, count only where there is no other: what an expansion holds is
    read by its projection.

    Args:
        group: a ``torch_pruning`` group, full or partial.

    Returns:
        In Torch-Pruning's order; empty where the channels are the model's outputs.

    Raises:
        TwoAxisError: Torch-Pruning maps channels to inputs that a layer does not have, as it can behind a split.

    Example:
        >>> import torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))
        >>> [member.module is net[2] for member in group_consumers(group)]
        [True]
    """
    consuming = [m for m in members(group) if m.is_consumer and isinstance(m.module, (_ConvNd, nn.Linear))]
    for member in consuming:
        if bool((member.channels >= in_channels_of(member.module)).any()):
            raise TwoAxisError(
                f"group of {root_name(group)}: expected inputs of {member.module}, got number "
                f"{int(member.channels.max())} from Torch-Pruning, which takes the parts of a split in the order in "
                "which it meets them; put the layer into ignored_layers"
            )
    return [m for m in consuming if not m.is_producer] or consuming


def root_layer(group: Any) -> nn.Module:
    """Give the layer that a group is rooted at."""
    layer: nn.Module = group[0].dep.target.module
    return layer


def root_name(group: Any) -> str:
    """Name a group's root layer for messages, as Torch-Pruning names it."""
    return str(group[0].dep.target.name)


def roots_at_outputs(group: Any) -> bool:
    """Whether a group's root channels are outputs of its root layer."""
    return bool(group._DG.is_out_channel_pruning_fn(group[0].dep.handler))


def behind_in_graph(group: Any, layer: nn.Module) -> list[nn.Module]:
    """List the modules and operations that read a layer's output directly."""
    return [node.module for node in group._DG.module2node[layer].outputs]


def model_of(group: Any) -> nn.Module:
    """Give the model a group belongs to, unwrapped."""
    return unwrap(group._DG.model)


def module_names(group: Any) -> dict[nn.Module, str]:
    """Name the modules of a group's model, unwrapped, as ``named_modules()`` does; look only modules up in it."""
    graph = group._DG
    model = unwrap(graph.model)
    if model is graph.model:  # as a rule; a pass over all modules for every group takes long
        names: dict[nn.Module, str] = graph._module2name
        return names
    return {module: name for name, module in model.named_modules()}
