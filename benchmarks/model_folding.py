"""Model Folding (Wang et al., ICLR 2025), written from the paper: channels with similar weights become one.

The channels of a group are clustered by k-means on all weights that make them, BatchNorm's scales and shifts included.
A cluster becomes one channel, the mean of its members; layers that read it add up what they had for each of them. Every
group keeps the same share of its channels. It looks at no image; BatchNorm is re-estimated afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from tp_twoaxis.dependency.flops import count_macs
from tp_twoaxis.dependency.graph import PrunableGroup, build_graph, group_key, prunable_groups
from tp_twoaxis.dependency.removal import remove

STARTS = 10  # of k-means


def nearest(reached: Callable[[float], float], target: float, low: float, high: float, rounds: int) -> float:
    """Find where a function that does not fall comes nearest to a target, by bisection."""
    tried: dict[float, float] = {}
    for _ in range(rounds):
        middle = (low + high) / 2
        value = reached(middle)
        tried[middle] = abs(value - target)
        low, high = (middle, high) if value < target else (low, middle)
    return min(tried, key=tried.__getitem__)


def weights_of(group: PrunableGroup) -> Tensor:
    """Arrange all weights that make a group's channels, [channels, weights] float64."""
    columns = []
    for part in group.parts:
        for values in part.module.parameters(recurse=False) if part.is_producer else ():
            rows = values.detach()[part.channels].double()
            rows = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
            columns.append(rows.new_zeros(len(group.channels), rows.shape[1]).index_add_(0, part.roots, rows))
    return torch.cat(columns, 1)


def merge(group: PrunableGroup, labels: Tensor) -> Tensor:
    """Make the members of each cluster equal, and let the layers behind read the first of them in the place of all.

    Args:
        group: its layers are changed in place.
        labels: [channels] int64, their clusters.

    Returns:
        [channels] bool, those that are not the first of their cluster and can leave.
    """
    first = torch.zeros(len(labels), dtype=torch.bool)
    first[[int((labels == label).nonzero()[0]) for label in labels.unique()]] = True
    together = labels[:, None] == labels
    with torch.no_grad():
        for part in group.parts:
            members = together[part.roots][:, part.roots].float()
            means = members / members.sum(1, keepdim=True)
            for values in (*part.module.parameters(recurse=False), *part.module.buffers(recurse=False)):
                if part.is_producer and values.ndim:
                    values[part.channels] = torch.einsum("ij,j...->i...", means, values[part.channels])
                elif not part.is_producer and values.ndim > 1:
                    values[:, part.channels] = torch.einsum("ij,oj...->oi...", members, values[:, part.channels])
    return ~first


def fold_channels(dense: nn.Module, example: Tensor, share: float, seed: int) -> nn.Module:
    """Fold every group of a copy to a share of its channels, in (0, 1]."""
    network = copy.deepcopy(dense)
    graph = build_graph(network, example)
    groups, _ = prunable_groups(graph, network, [])
    removed = {}
    for group in groups:
        clusters = max(1, round(share * len(group.channels)))
        labels = KMeans(clusters, n_init=STARTS, random_state=seed).fit_predict(weights_of(group).numpy())
        removed[group_key(group)] = merge(group, torch.from_numpy(labels).long()).numpy()
    remove(graph, groups, removed)
    return network


def fold(dense: nn.Module, example: Tensor, share: float, seed: int) -> nn.Module:
    """Fold a copy to a share of its MACs, with the same share of channels in every group."""
    target = share * count_macs(dense, example).total

    def reached(width: float) -> float:
        return count_macs(fold_channels(dense, example, width, seed), example).total

    return fold_channels(dense, example, nearest(reached, target, 0.0, 1.0, rounds=9), seed)
