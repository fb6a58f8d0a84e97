"""Which inputs and outputs a removal takes from each layer, as masks over the layer's present channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tp_twoaxis.dependency.graph import PrunableGroup, group_key
from tp_twoaxis.runtime.layers import CHANNEL_LAYERS, MIXING_NORMS, channel_layers, in_channels_of, out_channels_of


@dataclass(frozen=True)
class PrunedChannels:
    """Channels that one layer loses.

    Attributes:
        inputs: [C_in] bool, channels that it no longer reads.
        outputs: [C_out] bool, channels that it no longer writes.
        batch_norm: the BatchNorm with running statistics that alone reads its outputs, or None.
        norms: layers between its inputs and what writes them that normalise over channels and lose some, so
            that the channels that stay change too: LayerNorm, GroupNorm and their like.
    """

    inputs: Tensor
    outputs: Tensor
    batch_norm: str | None = None
    norms: tuple[str, ...] = ()


def pruned_channels(
    groups: list[PrunableGroup], removed: Mapping[str, npt.NDArray[np.bool_]], model: nn.Module
) -> dict[str, PrunedChannels]:
    """Find the channels that every convolution, linear and attention layer is about to lose.

    Args:
        groups: of the dense model.
        removed: group key -> [size] bool; groups that are missing stay whole.
        model: the dense model.

    Returns:
        Layer name -> what it loses, for all layers in the model's order, also those that lose nothing.

    Example:
        >>> from tp_twoaxis.dependency.graph import build_graph, prunable_groups
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> groups, _ = prunable_groups(build_graph(net, torch.zeros(1, 3, 4, 4)), net, [])
        >>> masks = pruned_channels(groups, {"0": np.array([True, False, False, True])}, net)
        >>> masks["2"].inputs.tolist(), masks["0"].outputs.tolist(), masks["0"].batch_norm
        ([True, False, False, True], [True, False, False, True], '1')
    """
    layers = channel_layers(model)
    lost_inputs: dict[nn.Module, Tensor] = {}
    lost_outputs: dict[nn.Module, Tensor] = {}
    mixing: set[nn.Module] = set()
    for group in groups:
        leaving = removed.get(group_key(group))
        if leaving is None or not leaving.any():
            continue
        mask = torch.from_numpy(leaving)
        for part in group.parts:
            channels = part.channels[mask[part.roots]]
            if isinstance(part.module, MIXING_NORMS) and len(channels):
                mixing.add(part.module)
            if isinstance(part.module, CHANNEL_LAYERS):
                if part.is_consumer:
                    lost_inputs.setdefault(part.module, _none(in_channels_of(part.module)))[channels] = True
                if part.is_producer:
                    lost_outputs.setdefault(part.module, _none(out_channels_of(part.module)))[channels] = True
    names = {module: name for name, module in model.named_modules()}
    nodes = groups[0].group._DG.module2node if groups else {}
    masks = {}
    for name, layer in layers.items():
        node = nodes.get(layer)
        masks[name] = PrunedChannels(
            lost_inputs.get(layer, _none(in_channels_of(layer))),
            lost_outputs.get(layer, _none(out_channels_of(layer))),
            None if node is None else _sole_batch_norm(node, names),
            () if node is None else tuple(names[norm] for norm in _norms_before(node) if norm in mixing),
        )
    return masks


def _none(width: int) -> Tensor:
    return torch.zeros(width, dtype=torch.bool)


def _sole_batch_norm(node: Any, names: dict[nn.Module, str]) -> str | None:
    consumers = {consumer.module for consumer in node.outputs}
    sole = consumers.pop() if len(consumers) == 1 else None
    return names.get(sole) if isinstance(sole, _BatchNorm) and sole.track_running_stats else None


def _norms_before(node: Any) -> list[nn.Module]:
    """Walk back to the layers that write a layer's inputs; give the mixing norms on the way."""
    found, seen, waiting = [], set(), list(node.inputs)
    while waiting:
        current = waiting.pop()
        if id(current) in seen or isinstance(current.module, CHANNEL_LAYERS):
            continue
        seen.add(id(current))
        if isinstance(current.module, MIXING_NORMS):
            found.append(current.module)
        else:
            waiting += current.inputs
    return found
