"""Attention written out of linear layers: which channels make up a head, and what else holds their number."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import nn

from tp_twoaxis.dependency.groups import Member, members

# where such modules keep the number of their heads, and the channels of all heads together
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads", "num_kv_heads", "num_key_value_heads")
WIDTHS = ("attn_dim", "all_head_size", "inner_dim", "kv_dim")
# the channels of one head, and their inverse root, by which the products of queries and keys are multiplied
HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "dim_head", "d_k")
SCALES = ("scale", "scaling", "softmax_scale")

AttentionUnit = Literal["heads", "head-dims"]


@dataclass(frozen=True)
class Attention:
    """An attention module whose heads can leave or be made narrower: their channels in query, key, value, projection.

    Attributes:
        module: it holds the number of heads.
        heads: how many.
        width: channels of all heads together, head by head, as the projection reads them.
        group: Torch-Pruning's group, rooted at the projection's inputs.
        parts: the layers that lose channels.
        value: the group without query and key: what a head hands on is its values.
        query: channels of a layer that are queries.
        spared: norms inside a head (of queries, of keys); Torch-Pruning counts them in, they keep their width.
        unit: what leaves: whole heads, or the same number of channels of every head.
    """

    module: nn.Module
    heads: int
    width: int
    group: Any
    parts: list[Member]
    value: Any
    query: Member
    spared: frozenset[nn.Module]
    unit: AttentionUnit = "heads"

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    @property
    def scored(self) -> Any:
        """What an importance should see: how a head mixes values does not show its worth, but that of its channels."""
        return self.value if self.unit == "heads" else self.group

    def keep(self, width: int) -> None:
        """Write how many heads are left, and how wide they are, where the module's forward looks for it.

        Products of queries and keys go on being divided by the root of the heads' width as it is now, as fused kernels
        do anyway. They have fewer terms than before, so that keeps their spread; to keep the old divisor, exact where
        what leaves was zero, was worse without repair and with ``ridge`` (``benchmarks/attention_units.py``).

        Args:
            width: channels of all heads together that are left in its layers.
        """
        heads, head_width = self.heads, self.head_width
        if self.unit == "heads":
            heads = width // head_width
        else:
            head_width = width // heads
        for names, old, new in (
            (HEAD_COUNTS, self.heads, heads),
            (WIDTHS, self.width, width),
            (HEAD_WIDTHS, self.head_width, head_width),
        ):
            for name in names:
                if getattr(self.module, name, None) == old:
                    setattr(self.module, name, new)
        if self.unit == "head-dims":
            for name in SCALES:
                scale = getattr(self.module, name, None)
                if isinstance(scale, float) and math.isclose(scale, self.head_width**-0.5):
                    setattr(self.module, name, head_width**-0.5)


def attention_owners(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, int]]:
    """Map linear children of hand-written attention modules to their owner and their place in it."""
    owners: dict[nn.Module, tuple[nn.Module, int]] = {}
    for module in model.modules():
        if _head_count(module) is not None and not isinstance(module, nn.MultiheadAttention):
            for index, child in enumerate(module.children()):
                if isinstance(child, nn.Linear):
                    owners[child] = (module, index)
    return owners


def enclosing_attention(parts: list[Member], owners: dict[nn.Module, tuple[nn.Module, int]]) -> nn.Module | None:
    """Find the attention module between whose own layers channels run: query to key, or value to projection."""
    producers = [owners[part.module] for part in parts if part.is_producer and part.module in owners]
    consumers = [
        owners[part.module] for part in parts if part.is_consumer and not part.is_producer and part.module in owners
    ]
    for i, (owner, place) in enumerate(producers):
        if any(owner is other for other, _ in producers[i + 1 :]):
            return owner
        if any(owner is other and place < later for other, later in consumers):
            return owner
    return None


def read_attention(
    graph: Any,
    owner: nn.Module,
    parts: list[Member],
    owners: dict[nn.Module, tuple[nn.Module, int]],
    unit: AttentionUnit = "heads",
) -> Attention | None:
    """Read an attention module's heads, or give None where their channels cannot leave.

    Expected is a query, a key and a value of one width for each of at least two heads, in this order, from one
    linear layer or several, and one linear layer that reads them. Heads that share keys (grouped queries), and
    parameters beside these layers whose shape may hold the number of heads (position biases, temperatures),
    are more than is known here. A norm inside a head allows whole heads to leave, but not some of its channels.
    """
    heads = _head_count(owner) or 1
    consumers = [part.module for part in parts if part.is_consumer and not part.is_producer]
    if heads < 2 or len(consumers) != 1 or not isinstance(consumers[0], nn.Linear) or consumers[0].in_features % heads:
        return None
    projection, width = consumers[0], consumers[0].in_features
    group = graph.get_pruning_group(projection, tp.prune_linear_in_channels, list(range(width)))
    taking: list[Member] = []
    spared: set[nn.Module] = set()
    for part in members(group):
        size = next((p.shape[-1] for p in part.module.parameters()), None)
        if size is None:  # an operation between the layers
            continue
        if part.module is projection:
            taking.append(part)
        elif isinstance(part.module, nn.Linear):
            times = torch.bincount(part.roots, minlength=width)
            if (
                part.module not in owners
                or len(part.channels) != part.module.out_features
                or len(set(times.tolist())) > 1
            ):
                return None
            taking.append(part)
        elif size == width:
            taking.append(part)
        elif size == width // heads:
            spared.add(part.module)
        else:
            return None
    has_parameters = any(isinstance(item.dep.target.module, nn.Parameter) for item in group)
    known = {p for module in [*(part.module for part in taking), *spared] for p in module.parameters()}
    producers = [part for part in taking if part.module in owners and part.is_producer]
    query, value = (_one_of_three(place, producers, owners, width) for place in (0, 2))
    if has_parameters or query is None or value is None or not known.issuperset(owner.parameters()):
        return None
    if unit == "head-dims" and (spared or width == heads):
        return None
    return Attention(owner, heads, width, group, taking, _cut_down(group, value), query, frozenset(spared), unit)


def without(group: Any, spared: frozenset[nn.Module]) -> Any:
    """Take layers out of a Torch-Pruning group, so that they keep their channels."""
    group.items[:] = [item for item in group.items if item.dep.target.module not in spared]
    return group


def _head_count(module: nn.Module) -> int | None:
    counts = (getattr(module, name, None) for name in HEAD_COUNTS)
    return next((count for count in counts if isinstance(count, int)), None)


def _one_of_three(
    place: int, producers: list[Member], owners: dict[nn.Module, tuple[nn.Module, int]], width: int
) -> Member | None:
    """Find query (0), key (1) or value (2) among the layers of an attention module, which define them in this order."""
    earlier = 0
    for part in sorted(producers, key=lambda part: owners[part.module][1]):
        per_root = len(part.channels) // width
        if earlier + per_root > place:
            order = part.channels.argsort()
            third = order[(place - earlier) * width : (place - earlier + 1) * width]
            if len(set(part.roots[third].tolist())) < width:
                return None
            return replace(part, channels=part.channels[third], roots=part.roots[third])
        earlier += per_root
    return None


def _cut_down(group: Any, producer: Member) -> Any:
    """Leave a group its root and one layer's channels."""

    def items() -> Iterator[Any]:
        yield group[0]
        for item in group:
            if item.dep.target.module is producer.module:
                part = type(item)(dep=item.dep, idxs=producer.channels.tolist())
                part.root_idxs = producer.roots.tolist()
                yield part

    small = copy.copy(group)
    small._group = list(items())
    return small
