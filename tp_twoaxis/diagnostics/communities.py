"""Communities in the graphs of a layer's channels: of pairs that overlap, and of pairs with target excess.

Paper: section 2.4, appendices A and K.1. An edge weighs ``R_kj`` in the overlap graph and the clipped pair excess
``max(0, M_kj - max(M_k, M_j))`` in the excess graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tp_twoaxis.diagnostics.axis_coordinates import relative_depths
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.scores import local, target
from tp_twoaxis.statistics.layer_statistics import LayerStatistics
from tp_twoaxis.statistics.store import CalibrationStatistics

TOP_SHARE = 0.1  # of the positive edges (appendix A)
# the search takes seconds for 512 channels and grows faster than their square; of wider layers so many are drawn
MOST_CHANNELS = 512
# graphs of few channels differ most by chance, and cost least: five shuffles of 64 channels, one of 512
SHUFFLED_CHANNELS = 320
COLUMNS = {
    "layer": "name in the model",
    "depth": "0 first, 1 last convolution",
    "channels": "in the graphs: those that vary, at most 512 of them",
    "overlap_edges": "edges of the overlap graph",
    "overlap_communities": "communities of two channels or more",
    "overlap_modularity": "Newman's modularity of the overlap graph",
    "overlap_chance": "the same, of weights dealt to pairs at random",
    "excess_edges": "edges of the excess graph",
    "excess_communities": "communities of two channels or more",
    "excess_modularity": "Newman's modularity of the excess graph",
    "excess_chance": "the same, of weights dealt to pairs at random",
    "gap": "overlap_modularity - excess_modularity",
}


@dataclass(frozen=True)
class Communities:
    """Communities of a weighted graph of C channels.

    Attributes:
        edges: how many the graph has.
        members: channels of each community of two or more, largest first.
        modularity: Newman's, in [-0.5, 1]; NaN for a graph without edges.
    """

    edges: int
    members: tuple[tuple[int, ...], ...]
    modularity: float


def overlap_graph(layer: LayerStatistics, channels: Tensor) -> Tensor:
    """Weigh pairs of channels by their overlap ``R_kj``.

    Args:
        layer: statistics.
        channels: [V] int64, which channels; varying ones.

    Returns:
        [V, V] nats, not negative, diagonal 0.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> layer = calibrate(net, [torch.randn(64, 8)], target=None, progress=False)["1"]
        >>> overlap_graph(layer, torch.tensor([0, 2])).diagonal().tolist()
        [0.0, 0.0]
    """
    return local.pair_overlap(layer.correlation[channels][:, channels])


def excess_graph(layer: LayerStatistics, channels: Tensor) -> Tensor:
    """Weigh pairs of channels by their target excess.

    Args:
        layer: statistics.
        channels: [V] int64, which channels; varying ones.

    Returns:
        [V, V] nats, not negative, diagonal 0.

    Raises:
        TwoAxisError: the statistics hold no target.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> stats = calibrate(net, [(torch.randn(64, 8), torch.randint(4, (64,)))], progress=False)
        >>> bool((excess_graph(stats["1"], torch.arange(4)) >= 0).all())
        True
    """
    return target.pair_excess(layer.target_correlation()[channels], layer.pooled_correlation[channels][:, channels])


def strongest_edges(weights: Tensor, share: float = TOP_SHARE) -> Tensor:
    """Find the edges of the largest positive weights.

    Args:
        weights: [C, C] symmetric; the diagonal does not count.
        share: of the positive edges, in (0, 1]; rounded, and at least one. Of equal weights the first is taken.

    Returns:
        [E, 2] int64, k < j, heaviest first; E = 0 where no weight is positive.

    Raises:
        TwoAxisError: the share is out of range.

    Example:
        >>> strongest_edges(torch.tensor([[0.0, 3.0, 1.0], [3.0, 0.0, 2.0], [1.0, 2.0, 0.0]]), share=0.7).tolist()
        [[0, 1], [1, 2]]
    """
    if not 0.0 < share <= 1.0:
        raise TwoAxisError(f"share: expected a number above 0 and up to 1, got {share}")
    pairs = torch.triu_indices(len(weights), len(weights), offset=1)
    values = weights[pairs[0], pairs[1]]
    positive = int((values > 0).sum())
    count = max(1, round(share * positive)) if positive else 0
    return pairs[:, values.argsort(descending=True, stable=True)[:count]].T


def find_communities(weights: Tensor, share: float = TOP_SHARE) -> Communities:
    """Find communities among the strongest edges by greedy modularity (Clauset, Newman & Moore 2004; NetworkX's).

    Args:
        weights: [C, C] symmetric; the diagonal does not count.
        share: of the positive edges that make the graph.

    Returns:
        :class:`Communities`; both the search and the modularity are weighted.

    Raises:
        TwoAxisError: the share is out of range, or NetworkX is missing.

    Example:
        >>> two_pairs = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
        >>> find_communities(two_pairs, share=1.0)
        Communities(edges=2, members=((0, 1), (2, 3)), modularity=0.5)
    """
    edges = strongest_edges(weights, share)
    if not len(edges):
        return Communities(0, (), math.nan)
    networkx = _networkx()
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(weights)))
    values = weights[edges[:, 0], edges[:, 1]].tolist()
    graph.add_weighted_edges_from((k, j, weight) for (k, j), weight in zip(edges.tolist(), values, strict=True))
    found = networkx.community.greedy_modularity_communities(graph, weight="weight")
    members = sorted(
        (tuple(sorted(group)) for group in found if len(group) > 1), key=lambda group: (-len(group), group)
    )
    return Communities(len(edges), tuple(members), float(networkx.community.modularity(graph, found, weight="weight")))


def chance_modularity(weights: Tensor, *, share: float = TOP_SHARE, shuffles: int = 1, seed: int = 0) -> float:
    """Mean modularity of graphs whose weights are dealt to the pairs of channels at random; ours.

    Greedy communities of a sparse graph are modular by chance alone. A graph above that has groups; one below it has
    hubs, channels that are in many of its edges.

    Returns:
        In [-0.5, 1]; NaN where no weight is positive.

    Example:
        >>> round(chance_modularity(torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)), share=1.0), 1) < 0.5
        True
    """
    pairs = torch.triu_indices(len(weights), len(weights), offset=1)
    values = weights[pairs[0], pairs[1]]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(shuffles):
        shuffled = torch.zeros_like(weights)
        shuffled[pairs[0], pairs[1]] = values[torch.randperm(len(values), generator=generator)]
        found.append(find_communities(shuffled + shuffled.T, share).modularity)
    return sum(found) / len(found)


def modularity_gap(layer: LayerStatistics, *, seed: int = 0) -> float:
    """Modularity of a layer's overlap graph less that of its excess graph; NaN where either has no edges.

    Args:
        layer: statistics with a target.
        seed: of the channels that are drawn from wide layers.

    Raises:
        TwoAxisError: no target, or NetworkX is missing.
    """
    channels = _drawn_channels(layer, seed)
    overlap, excess = (find_communities(graph(layer, channels)).modularity for graph in (overlap_graph, excess_graph))
    return overlap - excess


def community_table(stats: CalibrationStatistics, layers: list[str], *, seed: int = 0) -> pd.DataFrame:
    """Compare the two graphs of each layer.

    Args:
        stats: of a calibration with a target.
        layers: in the model's order.
        seed: of the shuffles behind the chance levels, and of the channels that are drawn from wide layers.

    Returns:
        A row a layer with the columns :data:`COLUMNS`; a graph without edges has NaN for its modularity.

    Raises:
        TwoAxisError: no such layer, no target, or NetworkX is missing.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 6))
        >>> stats = calibrate(net, [(torch.randn(64, 8), torch.randint(6, (64,)))], progress=False)
        >>> community_table(stats, ["1"])[["layer", "channels", "overlap_edges"]].values.tolist()
        [['1', 6, 2]]
    """
    depths = relative_depths(layers)
    rows: list[dict[str, Any]] = []
    for name in layers:
        layer = stats[name]
        channels = _drawn_channels(layer, seed)
        row: dict[str, Any] = {"layer": name, "depth": depths[name], "channels": len(channels)}
        shuffles = max(1, SHUFFLED_CHANNELS // max(1, len(channels)))
        for kind, graph in (("overlap", overlap_graph), ("excess", excess_graph)):
            weights = graph(layer, channels)
            found = find_communities(weights)
            row[f"{kind}_edges"], row[f"{kind}_communities"] = found.edges, len(found.members)
            row[f"{kind}_modularity"] = found.modularity
            row[f"{kind}_chance"] = chance_modularity(weights, shuffles=shuffles, seed=seed)
        row["gap"] = row["overlap_modularity"] - row["excess_modularity"]
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _drawn_channels(layer: LayerStatistics, seed: int) -> Tensor:
    varying = (layer.variance > 0).nonzero().ravel()
    drawn = torch.randperm(len(varying), generator=torch.Generator().manual_seed(seed))[:MOST_CHANNELS]
    return varying[drawn.sort().values]


def _networkx() -> Any:
    try:
        import networkx
    except ImportError as error:
        raise TwoAxisError(
            "communities: expected NetworkX, it is not installed; pip install 'tp-twoaxis[evidence]' or networkx, or "
            "leave this section out"
        ) from error
    return networkx
