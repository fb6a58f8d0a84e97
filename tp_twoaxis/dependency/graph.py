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
from tp_twoaxis.dependency.cost import CostModel, Side, Term
from tp_twoaxis.dependency.flops import ExampleInputs, MacsCount, inside, running_layers
from tp_twoaxis.dependency.groups import Member, members, root_layer
from tp_twoaxis.errors import TwoAxisError, listing
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
        blocks: see :class:`~tp_twoaxis.pruning.plan.ScoredGroup`.
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
                return tp.DependencyGraph().build_dependency(model, example_inputs=example_inputs, verbose=False)
        except Exception as error:
            # outside a forward pass it is Torch-Pruning's own reading that failed
            where = inside(running or _layer_in_question(error, model), model)
            raise TwoAxisError(
                f"Torch-Pruning could not trace {type(model).__name__}{where}: "
                f"{type(error).__name__}: {error}; check example_inputs, and that the forward returns tensors (in "
                "tuples, lists or dicts), or prune a part of the model that it can follow"
            ) from error


def _layer_in_question(error: Exception, model: nn.Module) -> list[str]:
    """Find the layer at which Torch-Pruning failed, or the one before the operation at which it did."""
    names = {module: name for name, module in model.named_modules() if name}
    found: list[str] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
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
    because another group covers only part of the layer, come as a group of their own.

    Returns:
        The groups, and notes on what stays whole although a user would expect it to be pruned.
    """
    ignored = {module for layer in ignored_layers for module in layer.modules()}
    names = {module: name for name, module in model.named_modules()}
    owners = attention_owners(model)
    covered: dict[nn.Module, set[int]] = {}
    found: list[PrunableGroup] = []
    kept_whole: dict[str, None] = {}
    miscounted: list[str] = []

    def take(group: Any, channels: list[int] | None = None) -> None:
        parts = list(members(group))
        if channels is not None:
            parts = [_restricted(part, channels) for part in parts]
        producers = [
            part
            for part in parts
            if part.is_producer and isinstance(part.module, (_ConvNd, nn.Linear, nn.MultiheadAttention))
        ]
        fresh = all(covered.get(part.module, set()).isdisjoint(part.channels.tolist()) for part in producers)
        for part in producers:
            covered.setdefault(part.module, set()).update(part.channels.tolist())
        consumers = [part for part in parts if part.is_consumer and not part.is_producer]
        if not fresh or not consumers or any(part.module in ignored for part in parts if part.is_producer):
            return
        name = names[root_layer(group)]
        if (owner := enclosing_attention(parts, owners)) is not None:
            heads = read_attention(graph, owner, parts, owners, attention)
            if heads is None:
                kept_whole[names[owner]] = None
                return
            places = list(range(heads.width))
            blocks, run = (1, heads.head_width) if attention == "heads" else (heads.heads, 1)
            found.append(PrunableGroup(names[owner], heads.group, places, heads.parts, blocks, run, False, heads))
            return
        if overfull := [names[part.module] for part in parts if _overfull(part)]:
            miscounted.append(
                f"{name}: stays whole, because Torch-Pruning counts more channels than there are in {listing(overfull)}"
            )
            return
        size = len(group[0].idxs) if channels is None else len(channels)
        found.append(
            PrunableGroup(
                name,
                group,
                list(group[0].idxs) if channels is None else channels,
                parts,
                _blocks(parts) if size % _blocks(parts) == 0 else size,
                aligned=any(_grouped(part) for part in parts),
            )
        )

    for group in graph.get_all_groups(ignored_layers=list(ignored)):
        take(group)
    for layer in channel_layers(model).values():
        if layer in covered and layer not in ignored and layer in graph.module2node:
            pruner = graph.get_pruner_of_module(layer)
            missing = sorted(set(range(pruner.get_out_channels(layer))) - covered[layer])
            if missing:
                everything = list(range(pruner.get_out_channels(layer)))
                take(graph.get_pruning_group(layer, pruner.prune_out_channels, everything), missing)
    notes = [f"attention keeps its heads and their width ({listing(kept_whole, 3)})"] if kept_whole else []
    return found, notes + miscounted


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


def _blocks(parts: list[Member]) -> int:
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
