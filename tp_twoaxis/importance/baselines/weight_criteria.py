"""Criteria of others that need weights alone."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.dependency.groups import Member, behind_in_graph, members, root_name, root_size
from tp_twoaxis.errors import TwoAxisError, listing
from tp_twoaxis.importance.base import GroupImportance, Part
from tp_twoaxis.runtime.layers import channel_weight


class RandomImportance(tp.importance.Importance):  # type: ignore[misc]
    """Uniform scores in [0, 1) from a generator of its own; Torch-Pruning's class draws from the global one.

    Scores depend on the seed and on the group alone, not on which groups were ranked before.

    Args:
        seed: equal seeds give equal scores.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))
        >>> torch.equal(RandomImportance(seed=1)(group), RandomImportance(seed=1)(group))
        True
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, group: Any) -> Tensor:
        """Draw one number a root channel; [len(group[0].idxs)] float32 on the CPU."""
        # the numbers of the channels are part of the name: a layer that is narrower in a later step is drawn anew
        name = f"{self.seed} {root_name(group)} {list(map(int, group[0].idxs))}"
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
        return torch.rand(root_size(group), generator=torch.Generator().manual_seed(key))


class FPGMImportance(GroupImportance):
    """Filter pruning via geometric median (He et al. 2019): summed Euclidean distance to the layer's filters.

    Torch-Pruning's class of this name takes distances between squared weights; this one takes them between the
    weights, over the layers that write the channels.

    Args:
        group_reduction: over the layers that write a channel: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: Torch-Pruning's names.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))
        >>> FPGMImportance()(group).shape
        torch.Size([8])
    """

    def _parts(self, group: Any) -> list[Part]:
        parts = []
        for member in _producers(group):
            weight = channel_weight(member.module).double()
            distance = torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
            parts.append((distance[member.channels], member.roots))
        return parts


class NetworkSlimmingImportance(GroupImportance):
    """Network Slimming (Liu et al. 2017): ``|gamma|``, the scale of the BatchNorms that the channel passes.

    A group has several where it has several producers, or where several layers normalise one stream. Torch-Pruning's
    ``BNScaleImportance`` takes the same numbers but returns None for a group without any, which then stays whole.

    Args:
        group_reduction: over the BatchNorms: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: Torch-Pruning's names.

    Raises:
        TwoAxisError: on a call: no BatchNorm with a scale is in the group.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 4, 1))
        >>> with torch.no_grad(): _ = net[1].weight.copy_(torch.tensor([-1.0, 3.0]))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, [0, 1])
        >>> NetworkSlimmingImportance(normalizer=None)(group).tolist()
        [1.0, 3.0]
    """

    def _parts(self, group: Any) -> list[Part]:
        norms = [m for m in members(group) if isinstance(m.module, _BatchNorm) and m.module.affine]
        if not norms:
            kinds = (type(m.module).__name__ for m in members(group))
            raise TwoAxisError(
                f"group of {root_name(group)}: expected a BatchNorm with a scale among its layers "
                f"({listing(kind for kind in kinds if not kind.startswith('_'))}), got none; put the layer into "
                "ignored_layers, or take 'bn-scale', which leaves such groups whole"
            )
        return [(m.module.weight.detach()[m.channels].double().abs(), m.roots) for m in norms]  # type: ignore[operator]


class BNFoldedNormImportance(GroupImportance):
    """L2 norm of a channel's weights once its BatchNorm is folded in: ``|gamma| / sqrt(var + eps) |w_k|``.

    Each producer is folded with the BatchNorm that reads its output directly; a producer without one counts with
    its plain norm, which is what folding leaves it with.

    Args:
        group_reduction: over the layers that write a channel: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: Torch-Pruning's names.

    Raises:
        TwoAxisError: on a call: no layer with weights writes the channels, or a BatchNorm keeps no running variance.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))
        >>> BNFoldedNormImportance()(group).shape
        torch.Size([8])
    """

    def _parts(self, group: Any) -> list[Part]:
        parts = []
        for member in _producers(group):
            norm = channel_weight(member.module).double().norm(dim=1)
            parts.append((norm[member.channels] * _fold(member, group), member.roots))
        return parts


def _producers(group: Any) -> list[Member]:
    found = [m for m in members(group) if m.is_producer and isinstance(m.module, (_ConvNd, nn.Linear))]
    if not found:
        raise TwoAxisError(f"group of {root_name(group)}: no convolution or linear layer writes its channels")
    return found


def _fold(producer: Member, group: Any) -> Tensor:
    """Factor on each of the producer's channels; ones without a BatchNorm directly behind it."""
    norm = next((module for module in behind_in_graph(group, producer.module) if isinstance(module, _BatchNorm)), None)
    if norm is None:
        return torch.ones(len(producer.channels), dtype=torch.float64, device=next(producer.module.parameters()).device)
    if norm.running_var is None:
        raise TwoAxisError(
            f"group of {root_name(group)}: its BatchNorm keeps no running variance to fold; "
            "build it with track_running_stats=True or take another criterion"
        )
    factor = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.affine:
        factor = factor * norm.weight.detach().double().abs()
    return factor[producer.channels]
