"""Carry a plan out through the host, and say in dense numbering what left."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.pruning.attention import without
from tp_twoaxis.pruning.graph import PrunableGroup, group_key
from tp_twoaxis.pruning.plan import PruningPlan
from tp_twoaxis.pruning.report import GroupReport
from tp_twoaxis.statistics.layers import CHANNEL_LAYERS


def _mask(group: PrunableGroup, plan: PruningPlan) -> npt.NDArray[np.bool_]:
    return plan.removed.get(group_key(group), np.zeros(len(group.channels), dtype=bool))


def remove(graph: Any, groups: list[PrunableGroup], plan: PruningPlan) -> None:
    """Remove through the host; groups that share a root layer shift each other's channel numbers.

    Raises:
        TwoAxisError: the host failed; the model may be half pruned and is the caller's to restore.
    """
    gone: dict[tuple[nn.Module, bool], list[int]] = {}
    for group in groups:
        mask = _mask(group, plan)
        if not mask.any():
            continue
        root, handler = group.group[0].dep.target.module, group.group[0].dep.handler
        earlier = np.array(gone.get((root, graph.is_out_channel_pruning_fn(handler)), []), dtype=np.int64)
        leaving = [group.channels[i] for i in np.flatnonzero(mask)]
        try:
            take_out(graph, group, [channel - int((earlier < channel).sum()) for channel in leaving])
        except Exception as error:
            raise TwoAxisError(
                f"Torch-Pruning could not remove channels of {group.name} ({type(error).__name__}: {error}); put its "
                "layers into ignored_layers; the model is as it was"
            ) from error
        for part in group.parts:
            lost = part.channels[torch.from_numpy(mask)[part.roots]].tolist()
            gone.setdefault((part.module, part.writes), []).extend(lost)


def take_out(graph: Any, group: PrunableGroup, channels: list[int]) -> None:
    """Remove channels of a group's root layer, as numbered now, from all its layers; of attention, equal heads stay."""
    root, handler = group.group[0].dep.target.module, group.group[0].dep.handler
    leaving = graph.get_pruning_group(root, handler, channels)
    if group.attention is not None:
        without(leaving, group.attention.spared).prune()
        group.attention.keep(group.attention.width - len(channels))
    else:
        leaving.prune()


def refresh_widths(network: nn.Module) -> None:
    """Tell torchvision's vision transformer its new width: its forward reshapes to it."""
    for module in network.modules():
        projection = getattr(module, "conv_proj", None)
        if isinstance(projection, nn.Conv2d) and isinstance(getattr(module, "hidden_dim", None), int):
            module.hidden_dim = projection.out_channels  # type: ignore[assignment]


def removed_channels(groups: list[PrunableGroup], plan: PruningPlan, network: nn.Module) -> dict[str, list[int]]:
    """List the output channels that each layer loses, in dense numbering."""
    names = {module: name for name, module in network.named_modules()}
    lost: dict[str, set[int]] = {}
    for group in groups:
        mask = torch.from_numpy(_mask(group, plan))
        for part in group.parts:
            if part.writes and isinstance(part.module, CHANNEL_LAYERS):
                lost.setdefault(names[part.module], set()).update(part.channels[mask[part.roots]].tolist())
    return {name: sorted(channels) for name, channels in lost.items() if channels}


def group_report(group: PrunableGroup, plan: PruningPlan, network: nn.Module) -> GroupReport:
    """Say what a group keeps; to be asked before removal."""
    names = {module: name for name, module in network.named_modules()}
    mask = _mask(group, plan)
    layers = [
        f"{names[part.module]} ({'writes' if part.writes else 'reads'})"
        for part in group.parts
        if isinstance(part.module, CHANNEL_LAYERS) and part.module in names
    ]
    kept = [channel for channel, leaves in zip(group.channels, mask, strict=True) if not leaves]
    removed = [channel for channel, leaves in zip(group.channels, mask, strict=True) if leaves]
    return GroupReport(group_key(group), layers, kept, removed)
