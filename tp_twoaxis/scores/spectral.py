"""Scores that rank channels inside spectral clusters of their layer, so that every cluster keeps its leader longest.

A cluster's quantiles do not show how much a layer is worth, and they tie across clusters. So the layer's own
values (capture, or task information) are assigned in their order, and ties go by them: the clusters decide which
channels leave, the values how many. All of this is ours.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from tp_twoaxis.errors import check_name
from tp_twoaxis.scores import local, target
from tp_twoaxis.scores.cluster import cluster_quantiles, spectral_clusters
from tp_twoaxis.scores.composite import pid_no_red
from tp_twoaxis.scores.quantiles import assign_by_rank
from tp_twoaxis.statistics.layer_statistics import LayerStatistics

Affinity = Literal["R", "S", "RS"]
AFFINITIES = get_args(Affinity)


def spectral_rs(layer: LayerStatistics, affinity: Affinity = "R") -> Tensor:
    """Capture, assigned by its rank inside spectral clusters of the pairs' overlap, of their excess, or of both.

    58.7 / 61.7 % with R (protocol: :mod:`~tp_twoaxis.scores.composite`). A ResNet-50 takes 9 s of one core, ``hull``
    2.3 s.

    Args:
        layer: statistics; with a target for S and RS.
        affinity: ``"R"``, the pair overlap R_kj; ``"S"``, the pair's target excess; ``"RS"``, the sum of both, each
            over its mean, since overlap is larger by orders of magnitude (ours).

    Raises:
        TwoAxisError: there is no such affinity, or no target for it.
    """
    check_name("affinity", affinity, AFFINITIES)
    active = layer.variance > 0
    clusters = spectral_clusters(_pair_affinity(layer, active, affinity))
    capture = local.input_capture(layer.variance)
    ranked = assign_by_rank(capture[active], cluster_quantiles(capture[active], clusters))
    return torch.zeros_like(capture).masked_scatter(active, ranked)


def _pair_affinity(layer: LayerStatistics, active: Tensor, affinity: Affinity) -> Tensor:
    total = layer.variance.new_zeros(int(active.sum()), int(active.sum()))
    if "R" in affinity:
        total = local.pair_overlap(layer.correlation[active][:, active])
    if "S" in affinity:
        correlation, pooled = layer.target_correlation()[active], layer.pooled_correlation[active][:, active]
        excess = target.pair_excess(correlation, pooled)
        total = excess if affinity == "S" else _over_mean(total) + _over_mean(excess)
    return total


def _over_mean(pairs: Tensor) -> Tensor:
    mean = pairs.mean()
    return pairs / mean if bool(mean > 0) else pairs


def spectral_pid_rs(layer: LayerStatistics) -> Tensor:
    """Task information, assigned by the target composite's rank inside spectral clusters of the pair atoms.

    The composite is ``z(M_k) + z(X_k)``; the affinity of a pair is its shared and its synergistic information,
    ``min(M_k, M_j) + max(0, M_kj - max(M_k, M_j))``. A ResNet-50 takes 13 s of one core.
    """
    active = layer.variance > 0
    correlation, pooled = layer.target_correlation()[active], layer.pooled_correlation[active][:, active]
    information = target.task_information(correlation)
    shared = torch.minimum(information[:, None], information)
    clusters = spectral_clusters(shared + target.pair_excess(correlation, pooled))
    ranked = assign_by_rank(information, cluster_quantiles(pid_no_red(layer)[active], clusters))
    return torch.zeros_like(layer.variance).masked_scatter(active, ranked)
