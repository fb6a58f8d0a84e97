"""Cluster-aware pruning with quantile and gradient weights (the paper's CAP-QGW; its definition here is ours)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance.two_axis import LayerPart, TwoAxisImportance
from tp_twoaxis.scores import local
from tp_twoaxis.scores.cluster import cluster_quantiles, feature_clusters, spectral_clusters
from tp_twoaxis.scores.composite import z_scores
from tp_twoaxis.scores.named_scores import Score
from tp_twoaxis.statistics.layer_statistics import LayerStatistics
from tp_twoaxis.statistics.store import CalibrationStatistics

Clustering = Literal["plane", "overlap"]

# leaders of several clusters tie; what breaks the tie is small beside the steps between quantiles, not beside rounding
TIE = 1e-3


class CapQGWImportance(TwoAxisImportance):
    """Ranks inside clusters of a group's channels, weighted by what the group's outputs mean for the loss.

    1. The group's channels are clustered: on the matrix of pair overlaps (``"overlap"``, spectral), or on their
       standardised capture and overlap (I, R) (``"plane"``). The plane has a cluster of weak channels, whose leader is
       then kept as long as any other's.
    2. Inside each cluster the score becomes a quantile; the cluster's best channel has 1, so every cluster keeps its
       leader longest. Channels of equal quantile go by the score itself.
    3. The quantiles are multiplied by ``(g / mean g)^gamma``, g the mean first-order saliency of the channels that
       write the group, relative to the mean over all calibrated layers.

    Quantities of several producers of one channel are reduced as scores are, by ``group_reduction``; saliencies by
    their mean. There is no further normalisation: the gradient weight decides the allocation.

    Chosen on two CIFAR-10 ResNet-20 (conv shortcuts / option A; protocol: :mod:`~tp_twoaxis.scores.composite`):
    ``"overlap"`` at gamma = 0.25, 0.5, 1 has 52.6 / 60.3, 49.7 / 59.2, 35.4 / 58.9 %, ``"plane"`` at 0.5 has
    30.7 / 49.6 %. Capture alone, with its own allocation, has 58.0 / 65.5 %.

    Args:
        stats: from ``calibrate(gradients=True)``.
        score: the local score that ranks inside clusters, a name or a function.
        clusters: ``"overlap"`` or ``"plane"``.
        gamma: exponent of the gradient weight, at least 0; 0 removes the same share of every group.
        options: of :class:`TwoAxisImportance`.

    Raises:
        TwoAxisError: here, a parameter is out of range; on a call, the statistics hold no gradients, or
            scikit-learn is missing.

    Example:
        >>> import torch_pruning as tp
        >>> from torch import nn
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        >>> loader = [(torch.randn(32, 3, 8, 8), torch.randint(4, (32,)))]
        >>> importance = CapQGWImportance(calibrate(net, loader, gradients=True, progress=False))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> importance(graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))).shape
        torch.Size([8])
    """

    def __init__(
        self,
        stats: CalibrationStatistics,
        score: str | Score = "capture",
        *,
        clusters: Clustering = "overlap",
        gamma: float = 0.25,
        **options: Any,
    ) -> None:
        if clusters not in ("plane", "overlap"):
            raise TwoAxisError(f"clusters: expected 'plane' or 'overlap', got {clusters!r}")
        if not gamma >= 0.0:
            raise TwoAxisError(f"gamma: expected a number of at least 0, got {gamma}")
        if options.get("site", "producer") != "producer":
            raise TwoAxisError("site: CapQGWImportance weighs what layers write, expected 'producer'; leave it out")
        super().__init__(stats, score, **{"normalizer": None, **options})
        self.clusters = clusters
        self.gamma = gamma

    def _root_scores(self, producers: list[LayerPart], size: int) -> Tensor:
        # constant channels overlap with none: among the others they would be clusters with leaders of their own
        varying = ~self._constant(producers, size)
        if not bool(varying.any()):
            return torch.zeros(size, dtype=torch.float64)
        score = super()._root_scores(producers, size)[varying]
        labels = self._clusters(producers, size, varying)
        everywhere = cluster_quantiles(score, torch.zeros_like(labels))
        quantiles = cluster_quantiles(score, labels) * (1.0 - TIE * (1.0 - everywhere))
        return torch.zeros(size, dtype=torch.float64).masked_scatter(varying, quantiles * self._weight(producers))

    def _clusters(self, producers: list[LayerPart], size: int, varying: Tensor) -> Tensor:
        """Cluster the varying channels of a group, [their number] int64."""
        if self.clusters == "plane":
            capture = self._reduced(producers, size, lambda name: local.input_capture(self.stats[name].variance))
            overlap = self._reduced(producers, size, self._overlap)
            return feature_clusters(torch.stack([z_scores(capture[varying]), z_scores(overlap[varying])], dim=1))
        total = torch.zeros(size, size, dtype=torch.float64)
        count = torch.zeros(size, size, dtype=torch.float64)
        for producer in producers:
            overlap = local.pair_overlap(self.stats[producer.name].correlation)
            place = (producer.roots[:, None], producer.roots[None, :])
            total.index_put_(place, overlap[producer.channels][:, producer.channels], accumulate=True)
            count.index_put_(place, torch.ones(()).double(), accumulate=True)
        return spectral_clusters((total / count.clamp_min(1.0))[varying][:, varying])

    def _overlap(self, name: str) -> Tensor:
        layer = self.stats[name]
        return local.peer_overlap(layer.correlation, layer.variance > 0)

    def _weight(self, producers: list[LayerPart]) -> float:
        """``(g / mean g)^gamma`` of a group, over channels that vary."""
        own = torch.cat([_varying_saliency(self.stats[p.name], p.channels) for p in producers]).mean()
        layers = [_varying_saliency(layer) for layer in self.stats.layers.values()]
        mean = torch.stack([saliency.mean() for saliency in layers if len(saliency)]).mean()
        return float((own / mean) ** self.gamma) if mean > 0 else 1.0


def _varying_saliency(layer: LayerStatistics, channels: Tensor | None = None) -> Tensor:
    varying = layer.variance > 0
    chosen = torch.ones_like(varying) if channels is None else torch.zeros_like(varying).index_fill(0, channels, True)
    return layer.saliency[varying & chosen]
