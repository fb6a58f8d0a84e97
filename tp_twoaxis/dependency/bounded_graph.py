"""Torch-Pruning's dependency graph, whose listing of a group ends: it looks things up and does bounded work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch_pruning as tp
from torch import nn

from tp_twoaxis.dependency.recurrent import RECURRENT_PRUNER, opaque_recurrent_layers
from tp_twoaxis.errors import TwoAxisError

WIDEST_ARRIVAL = 2
"""Channels that may arrive over one edge, as a multiple of the model's longest dimension of a parameter. Over edges of
torchvision's and timm's networks come as many as that dimension at most; behind reshapes that are read both ways
they multiply, to thousands of times that, until memory ends."""

LISTING_LIMIT = 1.0
"""Channels that the listing of one group may follow in all, as a multiple of the graph's edges times that dimension,
but no less than a million. Torchvision's and timm's networks need up to 0.5."""


class ListingLimitError(TwoAxisError):
    """Torch-Pruning's listing of a group does not come to an end within bounds.

    Attributes:
        layers: that the listing has met.
    """

    def __init__(self, message: str, layers: list[nn.Module]) -> None:
        super().__init__(message)
        self.layers = layers


class SharedChannelsError(TwoAxisError):
    """Several root channels arrive at one channel of a node, so that a listing by single root channels is void.

    Attributes:
        node: of the graph.
        handler: the function that removes its channels.
        channels: of the node, those that root channels arrive at.
    """

    def __init__(self, node: Any, handler: Callable[..., Any], channels: list[int]) -> None:
        super().__init__(f"several root channels are one channel of {node.name}")
        self.node, self.handler, self.channels = node, handler, channels


class BoundedGraph(tp.DependencyGraph):  # type: ignore[misc]
    """A dependency graph that lists the groups that Torch-Pruning's own lists, with three differences.

    Torch-Pruning compares every edge that it follows with all edges before, and every group begins with the index
    maps of the whole graph. Here edges are looked up in tables, and maps can be kept while nothing is removed.
    Maps of reshapes that are read both ways, as behind windows, bilinear products and gates over channels, multiply
    channels without end: the work is bounded. And recurrent layers are one operation each.
    """

    def __init__(self) -> None:
        super().__init__()
        self._maps_are_fresh = False
        for kind in (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell):
            self.register_customized_layer(kind, RECURRENT_PRUNER)

    def build_dependency(self, *args: Any, **options: Any) -> BoundedGraph:
        """Trace a model; arguments as of Torch-Pruning's method."""
        with _quiet():
            super().build_dependency(*args, **options)
        return self

    def _trace(self, model: nn.Module, *args: Any, **options: Any) -> Any:
        with opaque_recurrent_layers(model):
            return super()._trace(model, *args, **options)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """List groups inside the block without reading the index maps anew: nothing is removed meanwhile."""
        with _quiet():
            tp.dependency.index_mapping.update_index_mapping(self)
        self._maps_are_fresh = True
        try:
            yield
        finally:
            self._maps_are_fresh = False

    def get_pruning_group(
        self, module: nn.Module, pruning_fn: Callable[..., Any], idxs: int | Sequence[int]
    ) -> tp.dependency.Group:
        """List all that must lose channels with some channels of a layer, as Torch-Pruning's method does.

        The group has one attribute more, ``shared``: the graph's nodes, with the function that removes channels there,
        of which one channel belongs to several root channels. Such root channels can only leave together.

        Raises:
            ListingLimitError: the listing does not end within the bounds.
            SharedChannelsError: inside :meth:`unchanged`, several root channels arrive together at one channel, as
                where a map is made of a vector; such a listing would multiply channels.
        """
        if module not in self.module2node:
            raise ValueError(f"{module} is not in the dependency graph")
        if not self._maps_are_fresh:
            with _quiet():
                tp.dependency.index_mapping.update_index_mapping(self)
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1:
            pruning_fn = tp.prune_depthwise_conv_out_channels
        root = self.module2node[module]
        channels = [idxs] if isinstance(idxs, int) else idxs
        first = tp.dependency.Dependency(pruning_fn, pruning_fn, source=root, target=root)
        return self._merged(self._followed(first, [tp._helpers._HybridIndex(c, c) for c in channels]))

    def _followed(self, first: Any, channels: list[Any]) -> list[tuple[Any, list[Any]]]:
        """Follow channels along all edges from a root."""
        found = [(first, channels)]
        waiting, met = [(first, channels)], {(first.target, first.handler, tuple(channels))}
        visited, work = set(), 0
        widest = max(len(channels), *(max(p.shape, default=1) for p in self.model.parameters()))
        edges = sum(len(node.dependencies) for node in self.module2node.values())
        limit = max(1e6, LISTING_LIMIT * widest * edges)
        while waiting:
            edge, channels = waiting.pop()
            visited.add(edge.target)
            for onward in edge.target.dependencies:
                if not onward.is_triggered_by(edge.handler):
                    continue
                arriving = channels
                for mapping in onward.index_mapping:
                    if mapping is None:
                        continue
                    spread = 1 if getattr(mapping, "reverse", False) else getattr(mapping, "_stride", 1)
                    work += len(arriving) * spread
                    if len(arriving) * spread > WIDEST_ARRIVAL * widest or work > limit:
                        self._give_up(first, [edge for edge, _ in found])
                    arriving = mapping(arriving)
                work += len(arriving)
                if self._maps_are_fresh and len(places := {channel.idx for channel in arriving}) < len(arriving):
                    raise SharedChannelsError(onward.target, onward.handler, sorted(places))
                key = (onward.target, onward.handler, tuple(arriving))
                if arriving and not (onward.target in visited and key in met):
                    met.add(key)
                    found.append((onward, arriving))
                    waiting.append((onward, arriving))
        return found

    def _give_up(self, first: Any, edges: list[Any]) -> NoReturn:
        layers = dict.fromkeys(edge.target.module for edge in edges if edge.target.module in self._module2name)
        raise ListingLimitError(
            "Torch-Pruning follows channels without end through reshapes and products behind "
            f"{self._module2name[first.target.module]}",
            [layer for layer in layers if isinstance(layer, nn.Module)],
        )

    def _merged(self, found: list[tuple[Any, list[Any]]]) -> tp.dependency.Group:
        """Join what arrives at one side of a node over several edges; a channel keeps the root that came first."""
        ignored = {id(parameter) for parameter in self.ignored_params}
        places: dict[Any, list[Any]] = {}
        edges: dict[Any, Any] = {}
        for edge, channels in found:
            if id(edge.target.module) in ignored:
                continue
            key = (edge.target, edge.handler)
            edges.setdefault(key, edge)
            places.setdefault(key, []).append(channels)
        group = tp.dependency.Group()
        group._DG = self
        group.shared = []
        for key, edge in edges.items():
            arrivals = places[key]
            together = arrivals[0]
            if len(arrivals) > 1:
                once: dict[int, Any] = {}
                for channel in (channel for channels in arrivals for channel in channels):
                    once.setdefault(channel.idx, channel)
                together = list(once.values())
            owners = {(channel.idx, channel.root_idx) for channels in arrivals for channel in channels}
            if len(owners) > len({idx for idx, _ in owners}):
                group.shared.append(key)
            item = tp._helpers.GroupItem(edge, [channel.idx for channel in together])
            item.root_idxs = [channel.root_idx for channel in together]
            group._group.append(item)
        return group


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Torch-Pruning's warnings about its own reading from users, who can do nothing about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
