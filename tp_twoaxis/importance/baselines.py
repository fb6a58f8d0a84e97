"""Criteria of others that the host's own classes do not compute as published."""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance.groups import members, reduce_members, root_size
from tp_twoaxis.importance.normalize import Normalizer, normalize
from tp_twoaxis.statistics.layers import channel_weight


class FPGMImportance(tp.importance.Importance):  # type: ignore[misc]
    """Filter pruning via geometric median (He et al. 2019): summed Euclidean distance to the layer's filters.

    The host's class of this name takes distances between squared weights; this one takes them between the
    weights, over the layers that write the channels.

    Args:
        group_reduction: over the layers that write a channel: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: the host's names.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))
        >>> FPGMImportance()(group).shape
        torch.Size([8])
    """

    def __init__(self, *, group_reduction: str = "mean", normalizer: Normalizer = "mean") -> None:
        self.group_reduction = group_reduction
        self.normalizer = normalizer

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor:
        """Rank a group's root channels; [len(group[0].idxs)] float32 on the CPU."""
        parts = []
        for member in members(group):
            if member.writes and isinstance(member.module, (_ConvNd, nn.Linear)):
                weight = channel_weight(member.module).double().cpu()
                distance = torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
                parts.append((distance[member.channels], member.roots))
        if not parts:
            raise TwoAxisError(
                f"group of {group[0].dep.target.name}: no convolution or linear layer writes its channels"
            )
        reduced = reduce_members(parts, root_size(group), self.group_reduction)
        return normalize(reduced, self.normalizer).float()
