"""Torch-Pruning's dependency graph, and what a plan needs of it: prunable groups, their constraints, their costs."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.dependency.attention import (
    Attention,
    AttentionUnit,
    attention_owners,
    enclosing_attention,
    read_attention,
)
from tp_twoaxis.dependency.bounded_graph import BoundedGraph, ListingLimitError, SharedChannelsError
from tp_twoaxis.dependency.cost import CostModel, Side, Term
from tp_twoaxis.dependency.flops import ExampleInputs, MacsCount, call, inside, running_layers
from tp_twoaxis.dependency.groups import Member, members, root_layer, roots_at_outputs
from tp_twoaxis.dependency.recurrent import RECURRENT_LAYERS
from tp_twoaxis.errors import TwoAxisError, listing, reason
from tp_twoaxis.runtime.layers import CHANNEL_LAYERS, channel_layers, in_channels_of, out_channels_of
from tp_twoaxis.runtime.model_state import preserve_modes


@dataclass(frozen=True)
class PrunableGroup:
    """Coupled channels that can leave together.

    Attributes:
        name: the root layer's name, or the attention module's.
        group: Torch-Pruning's group over all channels of the root layer.
        channels: [size] the root layer's channels that belong to this group (all, as a rule).
        parts: the layers that take part, restricted to these channels.
        blocks: see :class:`~tp_twoaxis.pruning.portions.ScoredGroup`.
        run: see there.
        aligned: see there.
        attention: where the channels are those of an attention module's heads.
    """

    name: str
    group: Any
    channels: list[int]
    parts: list[Member]
    blocks: int = 1
    run: int = 1
    aligned: bool = True
    attention: Attention | None = None

    @property
    def scored(self) -> Any:
        """Torch-Pruning's group as an importance sees it; its root channels are those of :attr:`group`."""
        return self.group if self.attention is None else self.attention.scored

    @property
    def own(self) -> Any:
        """:attr:`scored` without root channels that belong to another group."""
        if self.attention is not None or len(self.channels) == len(self.group[0].idxs):
            return self.scored
        root = self.group[0].dep
        return self.group._DG.get_pruning_group(root.target.module, root.handler, list(self.channels))


def build_graph(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Trace a model with Torch-Pruning.

    Raises:
        TwoAxisError: it cannot be traced; the message holds Torch-Pruning's reason and, where one can be found,
            the layer.
    """
    with running_layers(model) as running:
        try:
            with torch.enable_grad(), tracing_allowed(model):
                # verbose would warn of every parameter without a module
                return BoundedGraph().build_dependency(model, example_inputs, forward_fn=call, verbose=False)
        except Exception as error:
            # outside a forward pass it is Torch-Pruning's own reading that failed
            where = inside(running or _layer_in_question(error, model), model)
            raise TwoAxisError(
                f"Torch-Pruning could not trace {type(model).__name__}{where}: "
                f"{reason(error)}; check example_inputs, and that the forward returns tensors (in "
                "tuples, lists or dicts), or prune a part of the model that it can follow"
            ) from error


def _layer_in_question(error: Exception, model: nn.Module) -> list[str]:
    """Find the layer at which Torch-Pruning failed, or the one before the operation at which it did."""
    names = {module: name for name, module in model.named_modules() if name}
    found: list[str] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "build_dependency":  # it runs through all layers before it traces
            continue
        for value in frame.f_locals.values():
            while isinstance(value, tp.dependency.Node) and value.module not in names and value.inputs:
                value = value.inputs[0]
            module = value.module if isinstance(value, tp.dependency.Node) else value
            if isinstance(module, nn.Module) and module in names:
                found.append(names[module])
    return found[-1:]


@contextmanager
def tracing_allowed(model: nn.Module) -> Iterator[None]:
    """Let Torch-Pruning trace: it needs gradients on parameters, and switches the model to eval mode itself."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.is_floating_point())
        with preserve_modes(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def prunable_groups(
    graph: Any, model: nn.Module, ignored_layers: Iterable[nn.Module], attention: AttentionUnit = "heads"
) -> tuple[list[PrunableGroup], list[str]]:
    """List the groups that may be pruned.

    Left out are groups with an ignored layer, and groups without consumers (they are the model's outputs). Attention
    that is built from linear layers loses whole heads or, with ``"head-dims"``, the same number of channels of every
    head; nothing where its heads are not understood. Channels of a layer that Torch-Pruning's own listing passes by,
    because another group covers only part of the layer, come as a group of their own. Where several of a layer's
    channels are one channel of another (a map made of a vector, the two halves of a gated unit), the group is rooted
    at the other.

    Returns:
        The groups, and notes on what stays whole although a user would expect it to be pruned.
    """
    listing_of_groups = _Listing(graph, model, ignored_layers, attention)
    with graph.unchanged():
        for root in [m for m in graph.module2node if isinstance(m, (_ConvNd, nn.Linear))]:
            listing_of_groups.add(root)
        for layer in channel_layers(model).values():
            listing_of_groups.add_rest(layer)
    return listing_of_groups.found, listing_of_groups.notes


class _Listing:
    """Groups found so far, and what they cover."""

    def __init__(
        self, graph: Any, model: nn.Module, ignored_layers: Iterable[nn.Module], attention: AttentionUnit
    ) -> None:
        self.graph, self.attention = graph, attention
        self.ignored = {module for layer in ignored_layers for module in layer.modules()}
        self.names = {module: name for name, module in model.named_modules()}
        self.owners = attention_owners(model)
        self.found: list[PrunableGroup] = []
        self._covered: dict[nn.Module, set[int]] = {}
        self._listed: set[nn.Module] = set()
        self._heads_stay: dict[str, None] = {}
        self._whole: list[str] = []

    @property
    def notes(self) -> list[str]:
        """What stays whole, and why."""
        heads = self._heads_stay
        return [f"attention keeps its heads and their width ({listing(heads, 3)})"] * bool(heads) + self._whole

    def add(self, layer: nn.Module) -> None:
        """Take the group of all channels that a layer writes, unless a group before holds them."""
        if layer in self.ignored or layer in self._listed:
            return
        pruner = self.graph.get_pruner_of_module(layer)
        group = self._list(layer, pruner.prune_out_channels, list(range(pruner.get_out_channels(layer))))
        if group is None:
            return
        self._remember(group)
        if group[0].dep.target.module is not layer:
            self._take_rerooted(layer, group, [item.dep for item in group])
        elif group.shared:
            shared = set(group.shared)
            edges = [item.dep for item in group if (item.dep.target, item.dep.handler) in shared]
            self._take_rerooted(layer, group, edges)
        else:
            self._take(group)

    def add_rest(self, layer: nn.Module) -> None:
        """Take the channels that a layer writes and no group holds, where some group holds others of the layer."""
        if layer not in self._covered or layer in self.ignored or layer not in self.graph.module2node:
            return
        pruner = self.graph.get_pruner_of_module(layer)
        everything = list(range(pruner.get_out_channels(layer)))
        missing = sorted(set(everything) - self._covered[layer])
        group = self._list(layer, pruner.prune_out_channels, everything) if missing else None
        if group is not None and not group.shared and group[0].dep.target.module is layer:
            self._take(group, missing)

    def _remember(self, group: Any) -> None:
        """Note the layers whose outputs a group holds: they need no listing of their own."""
        self._listed.update(
            item.dep.target.module for item in group if self.graph.is_out_channel_pruning_fn(item.dep.handler)
        )

    def _list(self, module: nn.Module, pruning_fn: Any, channels: list[int]) -> Any:
        """List a group, from where several channels become one if need be; where it fails all it met stays whole."""
        name = self.names.get(module, str(module))
        try:
            return self.graph.get_pruning_group(module, pruning_fn, channels)
        except SharedChannelsError as shared:
            if len(shared.channels) < len(channels):
                return self._list(shared.node.module, shared.handler, shared.channels)
            self._whole.append(f"{name}: stays whole, because {shared}")
        except ListingLimitError as error:
            self._listed.update(error.layers)
            self._whole.append(f"{name} and the layers coupled with it stay whole: {error}")
        except Exception as error:  # Torch-Pruning's rules for an operation do not hold here
            self._whole.append(
                f"{name}: stays whole, because Torch-Pruning could not list what is coupled with it ({reason(error)})"
            )
        return None

    def _take_rerooted(self, layer: nn.Module, group: Any, edges: list[Any]) -> None:
        """Take a group by the side of a layer where its channels are fewest: each stands for several of ``layer``."""
        graph, sizes = self.graph, {id(item.dep): len(set(item.idxs)) for item in group}
        sides = [edge for edge in edges if isinstance(edge.target.module, (_ConvNd, nn.Linear, *RECURRENT_LAYERS))]
        for edge in sorted(sides, key=lambda edge: sizes[id(edge)]):
            module, pruner = edge.target.module, graph.get_pruner_of_module(edge.target.module)
            at_outputs = edge.handler == pruner.prune_out_channels
            width = (pruner.get_out_channels if at_outputs else pruner.get_in_channels)(module)
            if sizes[id(edge)] != width or width == 1:  # one channel cannot leave
                continue
            rerooted = self._list(module, edge.handler, list(range(width)))
            if rerooted is None or rerooted.shared or rerooted[0].dep.target.module is not module:
                continue
            if any(item.dep.target.module is layer for item in rerooted):
                self._remember(rerooted)
                self._take(rerooted)
                return
        coupled = dict.fromkeys(self.names.get(edge.target.module) for edge in edges if edge.target.module is not layer)
        others = [name for name in coupled if name] or ["an operation behind it"]
        self._whole.append(
            f"{self.names[layer]}: stays whole, because several of its channels are one channel of {listing(others, 3)}"
        )

    def _take(self, group: Any, channels: list[int] | None = None) -> None:
        """Keep a group, or some of its root channels, if it may be pruned."""
        parts = list(members(group))
        if channels is not None:
            parts = [_restricted(part, channels) for part in parts]
        producers = [part for part in parts if part.is_producer and isinstance(part.module, CHANNEL_LAYERS)]
        fresh = all(self._covered.get(part.module, set()).isdisjoint(part.channels.tolist()) for part in producers)
        for part in producers:
            self._covered.setdefault(part.module, set()).update(part.channels.tolist())
        consumers = [part for part in parts if part.is_consumer and not part.is_producer]
        if not fresh or not consumers or any(part.module in self.ignored for part in parts if part.is_producer):
            return
        root, at_outputs = root_layer(group), roots_at_outputs(group)
        name = self.names[root] if at_outputs else f"{self.names[root]} (inputs)"
        if (owner := enclosing_attention(parts, self.owners)) is not None:
            self._take_attention(owner, parts)
            return
        if why := self._cannot_leave(parts):
            self._whole.append(f"{name}: stays whole, because {why}")
            return
        size = len(group[0].idxs) if channels is None else len(channels)
        blocks = blocks_of_parts(parts)
        self.found.append(
            PrunableGroup(
                name,
                group,
                list(group[0].idxs) if channels is None else channels,
                parts,
                blocks if size % blocks == 0 else size,
                aligned=any(_grouped(part) for part in parts),
            )
        )

    def _take_attention(self, owner: nn.Module, parts: list[Member]) -> None:
        heads = read_attention(self.graph, owner, parts, self.owners, self.attention)
        if heads is None:
            self._heads_stay[self.names[owner]] = None
            return
        blocks, run = (1, heads.head_width) if self.attention == "heads" else (heads.heads, 1)
        places = list(range(heads.width))
        name = self.names[owner]
        self.found.append(PrunableGroup(name, heads.group, places, heads.parts, blocks, run, False, heads))

    def _cannot_leave(self, parts: list[Member]) -> str | None:
        """Explain why a group's channels cannot leave one of its layers."""
        if overfull := [self.names.get(part.module, str(part.module)) for part in parts if _overfull(part)]:
            return f"Torch-Pruning counts more channels than there are in {listing(overfull)}"
        hidden = [part.module for part in parts if part.is_producer and isinstance(part.module, RECURRENT_LAYERS)]
        if hidden:
            return f"hidden channels of {listing(self.names[layer] for layer in hidden)} feed themselves back"
        several = [
            self.names[part.module]
            for part in parts
            if isinstance(part.module, nn.LayerNorm) and len(part.module.normalized_shape) > 1
        ]
        if several:
            return f"{listing(several)} has a weight for every position and channel"
        return None


def cost_model(groups: list[PrunableGroup], model: nn.Module, count: MacsCount) -> CostModel:
    """Express the network's MACs through what each group keeps; see :class:`CostModel`."""
    sides: dict[tuple[nn.Module, bool], Side] = {}
    names = {module: name for name, module in model.named_modules()}
    layers = {module: name for name, module in channel_layers(model).items() if count.by_module.get(name)}
    for group in groups:
        for part in group.parts:
            if part.module not in layers:
                continue
            side = sides.setdefault((part.module, part.is_producer), Side(_width(part)))
            lost = np.bincount(part.roots.numpy(), minlength=len(group.channels)).astype(np.float64)
            key = group_key(group)
            side.lost[key] = side.lost.get(key, 0.0) + lost
    terms = []
    for layer, name in layers.items():
        macs = float(count.by_module[name])
        own = tuple(side for (module, _), side in sides.items() if module is layer)
        if isinstance(layer, nn.MultiheadAttention):
            square = _projection_macs(macs, layer.embed_dim)
            terms += [Term(square, own * 2), Term(macs - square, own)]
        else:
            terms.append(Term(macs, own))
    for group in groups:
        if group.attention is not None:
            # its two products run in the module itself, not in one of its layers
            owner, width = group.attention.module, group.attention.width
            projections = sum(count.by_module[layers[layer]] for layer in owner.modules() if layer in layers)
            products = count.by_module[names[owner]] - projections
            terms.append(Term(float(products), (Side(width, {group_key(group): np.ones(width)}),)))
    terms.append(Term(count.total - sum(term.macs for term in terms), ()))
    return CostModel(terms)


def group_key(group: PrunableGroup) -> str:
    """Name a group uniquely: two groups can share a root layer."""
    return group.name if len(group.channels) == len(group.group[0].idxs) else f"{group.name}[{group.channels[0]}:]"


def _restricted(part: Member, channels: list[int]) -> Member:
    """Keep what belongs to some of a full group's root channels, and number these anew."""
    place = {channel: position for position, channel in enumerate(channels)}
    inside = torch.tensor([root in place for root in part.roots.tolist()], dtype=torch.bool)
    roots = torch.tensor([place[root] for root in part.roots[inside].tolist()], dtype=torch.int64)
    return replace(part, channels=part.channels[inside], roots=roots)


def _overfull(part: Member) -> bool:
    """Whether a part holds channels that its layer does not have, as Torch-Pruning's reading of some reshapes gives."""
    if isinstance(part.module, CHANNEL_LAYERS):
        width = _width(part)
    elif isinstance(part.module, RECURRENT_LAYERS):
        width = int(part.module.input_size)
    elif isinstance(part.module, nn.PReLU) and part.module.num_parameters == 1:
        width = 0  # one slope serves any number of channels
    else:  # a norm has a weight for each channel
        width = next((len(parameter) for parameter in part.module.parameters(recurse=False)), 0)
    return bool(width) and bool((part.channels >= width).any())


def _width(part: Member) -> int:
    """Width of the side of a layer that a part holds channels of."""
    return out_channels_of(part.module) if part.is_producer else in_channels_of(part.module)


def _projection_macs(macs: float, width: int) -> float:
    """Split self-attention's MACs ``4 E^2 L + 2 E L^2`` over L tokens: the part quadratic in the width E."""
    tokens = (math.sqrt(16.0 * width**4 + 8.0 * width * macs) - 4.0 * width**2) / (4.0 * width)
    return 4.0 * width**2 * tokens


def blocks_of_parts(parts: list[Member]) -> int:
    """Equally long blocks that must stay so: grouped convolutions (not depthwise), GroupNorm, heads.

    The heads are those of ``nn.MultiheadAttention``, which cuts its width anew into as many: were a head to lose
    more channels than another, all heads behind it would be made of channels that were not trained together.
    """
    counts = [1]
    for part in parts:
        module = part.module
        if isinstance(module, _ConvNd) and _grouped(part):
            counts.append(module.groups)
        elif isinstance(module, nn.GroupNorm):
            counts.append(module.num_groups)
        elif isinstance(module, nn.MultiheadAttention):
            counts.append(module.num_heads)
    return math.lcm(*counts)


def _grouped(part: Member) -> bool:
    """Whether a part's channels are those of a grouped, but not depthwise, convolution."""
    return isinstance(part.module, _ConvNd) and part.module.groups > 1 and not (part.is_producer and part.is_consumer)
