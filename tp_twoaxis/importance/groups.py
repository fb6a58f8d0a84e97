"""Torch-Pruning's groups, read: who writes the channels, who reads them, and which root channel each one is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.borrow import unwrap
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.reader_inputs import num_inputs


@dataclass(frozen=True)
class Member:
    """One layer's part in a group.

    Attributes:
        module: the layer.
        channels: [n] int64, channels of the layer.
        roots: [n] int64, position of the matching root channel in the group, 0 <= root < size;
            a root channel may occur several times (fused qkv) or not at all (concatenation).
        writes: whether the layer's outputs are removed.
        reads: whether its inputs are removed; both at once for depthwise convolutions and attention.
    """

    module: nn.Module
    channels: Tensor
    roots: Tensor
    writes: bool
    reads: bool


def root_size(group: Any) -> int:
    """Count the root channels of a group: the length of the importance it needs."""
    return len(group[0].idxs)


def members(group: Any) -> Iterator[Member]:
    """Read a group's layers in the host's order; bare parameters and items without root channels are left out.

    Args:
        group: a ``torch_pruning`` group, full or partial.

    Example:
        >>> import torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))
        >>> [(type(m.module).__name__, m.writes, m.reads) for m in members(group)]
        [('Conv2d', True, False), ('BatchNorm2d', True, True), ('Conv2d', False, True)]
    """
    graph = group._DG
    place = {int(channel): position for position, channel in enumerate(group[0].idxs)}
    for item in group:
        module, handler = item.dep.target.module, item.dep.handler
        if not isinstance(module, nn.Module):
            continue
        roots = getattr(item, "root_idxs", None)
        # grouped-query attention maps to no root channel (None); nothing can be attributed there
        if roots is None or any(root is None for root in roots):
            continue
        yield Member(
            module,
            torch.tensor([int(i) for i in item.idxs], dtype=torch.int64),
            torch.tensor([place[int(root)] for root in roots], dtype=torch.int64),
            writes=graph.is_out_channel_pruning_fn(handler),
            reads=graph.is_in_channel_pruning_fn(handler),
        )


def readers(group: Any) -> list[Member]:
    """Find the convolutions and linear layers that read a group's channels.

    Depthwise ones, which pass the channels on, count only where there is no other: what an expansion holds is
    read by its projection.

    Args:
        group: a ``torch_pruning`` group, full or partial.

    Returns:
        In the host's order; empty where the channels are the model's outputs.

    Raises:
        TwoAxisError: the host maps channels to inputs that a layer does not have, as it can behind a split.

    Example:
        >>> import torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))
        >>> [member.module is net[2] for member in readers(group)]
        [True]
    """
    reading = [m for m in members(group) if m.reads and isinstance(m.module, (_ConvNd, nn.Linear))]
    for member in reading:
        if bool((member.channels >= num_inputs(member.module)).any()):
            raise TwoAxisError(
                f"group of {group[0].dep.target.name}: expected inputs of {member.module}, got number "
                f"{int(member.channels.max())} from Torch-Pruning, which takes the parts of a split in the order in "
                "which it meets them; put the layer into ignored_layers"
            )
    return [m for m in reading if not m.writes] or reading


def model_of(group: Any) -> nn.Module:
    """Give the model a group belongs to, unwrapped."""
    return unwrap(group._DG.model)


def reduce_members(parts: list[tuple[Tensor, Tensor]], size: int, reduction: str) -> Tensor:
    """Reduce the scores of several layers to one number a root channel.

    Args:
        parts: for each layer its scores [n] and their root positions [n].
        size: root channels.
        reduction: ``mean``, ``sum`` or ``max`` over everything that a root channel stands for, or
            ``first``: the first layer alone, averaged where a root channel repeats in it.

    Returns:
        [size] float64.

    Raises:
        TwoAxisError: a root channel got no score, or the reduction is unknown.

    Example:
        >>> reduce_members([(torch.tensor([1.0, 2.0]), torch.tensor([0, 1])),
        ...                 (torch.tensor([3.0, 6.0]), torch.tensor([1, 0]))], 2, "mean").tolist()
        [3.5, 2.5]
    """
    if reduction not in ("mean", "sum", "max", "first"):
        raise TwoAxisError(f"group_reduction: expected 'mean', 'sum', 'max' or 'first', got {reduction!r}")
    chosen = parts[:1] if reduction == "first" else parts
    values = torch.cat([scores.double() for scores, _ in chosen])
    roots = torch.cat([positions for _, positions in chosen])
    count = torch.zeros(size, dtype=torch.float64).index_add_(0, roots, torch.ones_like(values))
    if bool((count == 0).any()):
        missing = int((count == 0).sum())
        raise TwoAxisError(
            f"{missing} of {size} root channels of the group have no calibrated producer; calibrate with all layers"
        )
    if reduction == "max":
        return torch.full((size,), -torch.inf, dtype=torch.float64).scatter_reduce(0, roots, values, "amax")
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, roots, values)
    return total if reduction == "sum" else total / count


def merge_repeats(scores: Tensor, roots: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Merge the scores that one layer gives the same root channel, as behind a flattening layer or in fused qkv.

    Args:
        scores: [n].
        roots: [n] root positions, some perhaps repeated.
        reduction: ``mean``, ``sum`` or ``max``.

    Returns:
        Scores [m] float64 and their root positions [m], each once and ascending.

    Example:
        >>> merge_repeats(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 2, 0]), "mean")
        (tensor([5., 2.], dtype=torch.float64), tensor([0, 2]))
    """
    present, place = torch.unique(roots, return_inverse=True)
    return reduce_members([(scores, place)], len(present), reduction), present
