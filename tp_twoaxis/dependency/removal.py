"""Remove channels through Torch-Pruning, and describe what each group and layer loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tp_twoaxis.dependency.attention import without
from tp_twoaxis.dependency.graph import PrunableGroup, group_key
from tp_twoaxis.dependency.groups import module_names, root_layer, roots_at_outputs
from tp_twoaxis.errors import TwoAxisError, reason
from tp_twoaxis.runtime.layers import CHANNEL_LAYERS

Masks = Mapping[str, npt.NDArray[np.bool_]]
"""Group key -> [size] bool, channels that leave; groups that are missing stay whole."""


@dataclass(frozen=True)
class GroupReport:
    """What a removal leaves of one group of coupled channels.

    Attributes:
        name: the root layer.
        layers: all layers of the group with their part, ``"layer1.0.conv1 (producer)"``.
        kept: root channels that stay, by their indices in the root layer.
        removed: root channels that left.
    """

    name: str
    layers: list[str]
    kept: list[int]
    removed: list[int]


def _mask(group: PrunableGroup, removed: Masks) -> npt.NDArray[np.bool_]:
    return removed.get(group_key(group), np.zeros(len(group.channels), dtype=bool))


def remove(graph: Any, groups: list[PrunableGroup], removed: Masks) -> None:
    """Remove channels from every layer of their groups; groups that share a root layer shift each other's indices.

    Args:
        graph: the model's, of :func:`~tp_twoaxis.dependency.graph.build_graph`.
        groups: of it.
        removed: which of their channels.

    Raises:
        TwoAxisError: Torch-Pruning failed; the model may be half pruned and is the caller's to restore.
    """
    gone: dict[tuple[nn.Module, bool], list[int]] = {}  # (layer, whether of its outputs) -> channels that left it
    for group in groups:
        mask = _mask(group, removed)
        if not mask.any():
            continue
        side = root_layer(group.group), roots_at_outputs(group.group)
        before = np.array(gone.get(side, []), dtype=np.int64)
        leaving = [group.channels[i] for i in np.flatnonzero(mask)]
        try:
            prune_group(graph, group, [channel - int((before < channel).sum()) for channel in leaving])
        except Exception as error:
            raise TwoAxisError(
                f"Torch-Pruning could not remove channels of {group.name} ({reason(error)}); put its "
                "layers into ignored_layers; the model is as it was"
            ) from error
        for part in group.parts:
            lost = part.channels[torch.from_numpy(mask)[part.roots]].tolist()
            gone.setdefault((part.module, part.is_producer), []).extend(lost)


def prune_group(graph: Any, group: PrunableGroup, channels: list[int]) -> None:
    """Remove channels, by their present indices in the root layer, from all layers of a group; heads stay equal."""
    root, handler = group.group[0].dep.target.module, group.group[0].dep.handler
    leaving = graph.get_pruning_group(root, handler, channels)
    if group.attention is not None:
        without(leaving, group.attention.spared).prune()
        group.attention.keep(group.attention.width - len(channels))
    else:
        leaving.prune()


def refresh_widths(network: nn.Module) -> None:
    """Write torchvision's vision transformer its new width, which its forward reshapes to."""
    for module in network.modules():
        projection = getattr(module, "conv_proj", None)
        if isinstance(projection, nn.Conv2d) and isinstance(getattr(module, "hidden_dim", None), int):
            module.hidden_dim = projection.out_channels  # type: ignore[assignment]


def removed_channels(groups: list[PrunableGroup], removed: Masks, network: nn.Module) -> dict[str, list[int]]:
    """List the output channels that each layer is about to lose, by their present indices."""
    names = {module: name for name, module in network.named_modules()}
    lost: dict[str, set[int]] = {}
    for group in groups:
        mask = torch.from_numpy(_mask(group, removed))
        for part in group.parts:
            if part.is_producer and isinstance(part.module, CHANNEL_LAYERS):
                lost.setdefault(names[part.module], set()).update(part.channels[mask[part.roots]].tolist())
    return {name: sorted(channels) for name, channels in lost.items() if channels}


def group_report(group: PrunableGroup, removed: Masks) -> GroupReport:
    """Describe what a removal leaves of a group; call it before the removal."""
    names = module_names(group.group)
    mask = _mask(group, removed)
    layers = [
        f"{names[part.module]} ({'producer' if part.is_producer else 'consumer'})"
        for part in group.parts
        if isinstance(part.module, CHANNEL_LAYERS) and part.module in names
    ]
    kept = [channel for channel, leaves in zip(group.channels, mask, strict=True) if not leaves]
    leaving = [channel for channel, leaves in zip(group.channels, mask, strict=True) if leaves]
    return GroupReport(group_key(group), layers, kept, leaving)
