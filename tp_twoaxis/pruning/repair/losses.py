"""What each layer loses by a plan, in dense numbering; to be asked before removal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.pruning.graph import PrunableGroup, group_key
from tp_twoaxis.pruning.plan import PruningPlan
from tp_twoaxis.statistics.layers import CHANNEL_LAYERS, MIXING_NORMS, channel_layers, num_channels


@dataclass(frozen=True)
class LayerLoss:
    """One layer's losses.

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


def layer_losses(groups: list[PrunableGroup], plan: PruningPlan, model: nn.Module) -> dict[str, LayerLoss]:
    """Read from groups and plan what every convolution, linear and attention layer is going to lose.

    Args:
        groups: of the dense model.
        plan: made for them.
        model: the dense model.

    Returns:
        Layer name -> its losses, for all layers in the model's order, also those that lose nothing.

    Example:
        >>> import numpy as np
        >>> from tp_twoaxis.pruning.graph import build_graph, prunable_groups
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> groups, _ = prunable_groups(build_graph(net, torch.zeros(1, 3, 4, 4)), net, [])
        >>> plan = PruningPlan({"0": np.array([True, False, False, True])}, 0.0, 0.0, 1.0, 0.0)
        >>> losses = layer_losses(groups, plan, net)
        >>> losses["2"].inputs.tolist(), losses["0"].outputs.tolist(), losses["0"].batch_norm
        ([True, False, False, True], [True, False, False, True], '1')
    """
    layers = channel_layers(model)
    lost: dict[tuple[nn.Module, bool], Tensor] = {}
    mixing: set[nn.Module] = set()
    for group in groups:
        removed = plan.removed.get(group_key(group))
        if removed is None or not removed.any():
            continue
        mask = torch.from_numpy(removed)
        for part in group.parts:
            channels = part.channels[mask[part.roots]]
            if isinstance(part.module, MIXING_NORMS) and len(channels):
                mixing.add(part.module)
            if isinstance(part.module, CHANNEL_LAYERS):
                for side, taken in ((False, part.reads), (True, part.writes)):
                    if taken:
                        key = part.module, side
                        lost.setdefault(key, torch.zeros(_width(*key), dtype=torch.bool))[channels] = True
    names = {module: name for name, module in model.named_modules()}
    nodes = groups[0].group._DG.module2node if groups else {}
    losses = {}
    for name, layer in layers.items():
        node = nodes.get(layer)
        losses[name] = LayerLoss(
            lost.get((layer, False), torch.zeros(_width(layer, False), dtype=torch.bool)),
            lost.get((layer, True), torch.zeros(_width(layer, True), dtype=torch.bool)),
            None if node is None else _sole_batch_norm(node, names),
            () if node is None else tuple(names[norm] for norm in _norms_before(node) if norm in mixing),
        )
    return losses


def _width(layer: nn.Module, writes: bool) -> int:
    if writes or isinstance(layer, nn.MultiheadAttention):
        return num_channels(layer)
    return int(layer.in_channels if isinstance(layer, _ConvNd) else layer.in_features)  # type: ignore[arg-type]


def _sole_batch_norm(node: Any, names: dict[nn.Module, str]) -> str | None:
    readers = {reader.module for reader in node.outputs}
    reader = readers.pop() if len(readers) == 1 else None
    return names.get(reader) if isinstance(reader, _BatchNorm) and reader.track_running_stats else None


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
