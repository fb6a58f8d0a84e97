"""Attention written out of linear layers: which channels make up a head, and what else holds their number."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from tp_twoaxis.importance.groups import Member, members

# where such modules keep the number of their heads, and the channels of all heads together
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads", "num_kv_heads", "num_key_value_heads")
WIDTHS = ("attn_dim", "all_head_size", "inner_dim", "kv_dim")


@dataclass(frozen=True)
class Attention:
    """An attention module whose heads can leave: the channels of a head in query, key, value and projection.

    Attributes:
        module: it holds the number of heads.
        heads: how many.
        width: channels of all heads together, head by head, as the projection reads them.
        group: the host's group, rooted at the projection's inputs.
        parts: the layers that lose channels.
        value: the host's group without query and key, for an importance to score: what a head hands on is
            its values, and how it mixes them says nothing of their worth.
        spared: norms inside a head (of queries, of keys); the host counts them in, they keep their width.
    """

    module: nn.Module
    heads: int
    width: int
    group: Any
    parts: list[Member]
    value: Any
    spared: frozenset[nn.Module]

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    def keep(self, heads: int) -> None:
        """Write the number of heads that are left, and their width, where the module's forward looks for it."""
        for names, old, new in (
            (HEAD_COUNTS, self.heads, heads),
            (WIDTHS, self.width, heads * self.head_width),
        ):
            for name in names:
                if getattr(self.module, name, None) == old:
                    setattr(self.module, name, new)


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
    writers = [owners[part.module] for part in parts if part.writes and part.module in owners]
    readers = [owners[part.module] for part in parts if part.reads and not part.writes and part.module in owners]
    for i, (owner, place) in enumerate(writers):
        if any(owner is other for other, _ in writers[i + 1 :]):
            return owner
        if any(owner is other and place < later for other, later in readers):
            return owner
    return None


def read_attention(
    graph: Any, owner: nn.Module, parts: list[Member], owners: dict[nn.Module, tuple[nn.Module, int]]
) -> Attention | None:
    """Read an attention module's heads, or give None where their channels cannot leave.

    Expected is a query, a key and a value of one width for each of at least two heads, in this order, from one
    linear layer or several, and one linear layer that reads them. Heads that share keys (grouped queries), and
    parameters beside these layers whose shape may hold the number of heads (position biases, temperatures),
    are more than is known here.
    """
    heads = _head_count(owner) or 1
    readers = [part.module for part in parts if part.reads and not part.writes]
    if heads < 2 or len(readers) != 1 or not isinstance(readers[0], nn.Linear) or readers[0].in_features % heads:
        return None
    projection, width = readers[0], readers[0].in_features
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
    bare = any(isinstance(item.dep.target.module, nn.Parameter) for item in group)
    known = {p for module in [*(part.module for part in taking), *spared] for p in module.parameters()}
    value = _value_path(group, [part for part in taking if part.module in owners and part.writes], owners, width)
    if bare or value is None or not known.issuperset(owner.parameters()):
        return None
    return Attention(owner, heads, width, group, taking, value, frozenset(spared))


def without(group: Any, spared: frozenset[nn.Module]) -> Any:
    """Take layers out of a host's group, so that they keep their channels."""
    group.items[:] = [item for item in group.items if item.dep.target.module not in spared]
    return group


def _head_count(module: nn.Module) -> int | None:
    counts = (getattr(module, name, None) for name in HEAD_COUNTS)
    return next((count for count in counts if isinstance(count, int)), None)


def _value_path(
    group: Any, writers: list[Member], owners: dict[nn.Module, tuple[nn.Module, int]], width: int
) -> Any | None:
    """Cut a group down to the value and the projection: of query, key and value, defined in this order, the third."""
    earlier = 0
    for part in sorted(writers, key=lambda part: owners[part.module][1]):
        per_root = len(part.channels) // width
        if earlier + per_root >= 3:
            order = part.channels.argsort()
            third = order[(2 - earlier) * width : (3 - earlier) * width]
            if len(set(part.roots[third].tolist())) < width:
                return None
            return _cut_down(group, part.module, part.channels[third].tolist(), part.roots[third].tolist())
        earlier += per_root
    return None


def _cut_down(group: Any, layer: nn.Module, channels: list[int], roots: list[int]) -> Any:
    def items() -> Iterator[Any]:
        yield group[0]
        for item in group:
            if item.dep.target.module is layer:
                part = type(item)(dep=item.dep, idxs=channels)
                part.root_idxs = roots
                yield part

    small = copy.copy(group)
    small._group = list(items())
    return small
