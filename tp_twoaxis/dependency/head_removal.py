"""Does attention's code run with fewer or narrower heads? Tried by removing some."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.attention import Attention, AttentionUnit
from tp_twoaxis.dependency.flops import ExampleInputs, call
from tp_twoaxis.dependency.graph import build_graph, group_key, prunable_groups
from tp_twoaxis.dependency.groups import root_layer
from tp_twoaxis.dependency.removal import prune_group
from tp_twoaxis.errors import reason
from tp_twoaxis.runtime.model_state import ModelSnapshot, eval_mode, fork_rng


def fixed_heads(
    model: nn.Module,
    example_inputs: ExampleInputs,
    ignored_layers: list[nn.Module],
    attention: AttentionUnit = "heads",
) -> dict[str, str]:
    """Find attention modules whose code holds a width that it does not keep in a known attribute: by trying.

    One head of every module of a class is removed, or one channel of every head, the model runs, and everything is
    put back. Where channels of heads were removed the projections must also write what they write when the dense
    network's queries, keys and values are zero there, at the temperature of the narrower heads: one that no known
    attribute holds, or positions rotated into queries and keys, would show.

    Returns:
        Group key -> what running raised, or that it came out otherwise.

    Example:
        >>> fixed_heads(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(1, 4), [])
        {}
    """
    graph = build_graph(model, example_inputs)  # of its own, because removal leaves its mark on a graph
    listed = prunable_groups(graph, model, ignored_layers, attention)[0]
    groups = [(group, group.attention) for group in listed if group.attention]
    snapshot = ModelSnapshot(model)
    stuck: dict[str, str] = {}
    for kind in dict.fromkeys(type(heads.module) for _, heads in groups):
        alike = [(group, heads) for group, heads in groups if type(heads.module) is kind]
        projections = [root_layer(group.group) for group, _ in alike]
        try:
            with fork_rng(), eval_mode(model):
                if attention == "head-dims":
                    for _, heads in alike:
                        _silence(heads)
                    expected = _written(projections, model, example_inputs)
                    snapshot.restore()
                for group, heads in alike:
                    prune_group(graph, group, _first(heads))
                found = _written(projections, model, example_inputs)
        except Exception as error:
            stuck |= {group_key(group): reason(error) for group, _ in alike}
        else:
            if attention == "head-dims":
                stuck |= {
                    group_key(group): "attention comes out otherwise"
                    for (group, _), before, after in zip(alike, expected, found, strict=True)
                    if not _close(before, after)
                }
        finally:
            snapshot.restore()
    return stuck


def _first(heads: Attention) -> list[int]:
    """Channels of the first head, or the first channel of every head."""
    return list(range(heads.head_width) if heads.unit == "heads" else range(0, heads.width, heads.head_width))


def _silence(heads: Attention) -> None:
    """Let queries, keys and values be zero in the first channel of every head, and products as large as without it."""
    leaving = torch.zeros(heads.width, dtype=torch.bool)
    leaving[_first(heads)] = True
    for part in heads.parts:
        if part.is_producer and isinstance(part.module, nn.Linear):
            for parameter in part.module.parameters(recurse=False):
                silent = parameter.detach().clone()
                silent[part.channels[leaving[part.roots]]] = 0.0
                if part.module is heads.query.module:
                    silent[heads.query.channels] *= (heads.head_width / (heads.head_width - 1)) ** 0.5
                parameter.data = silent


def _written(layers: list[nn.Module], model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    """Run a model and give what some of its layers write."""
    written: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, _: Any, output: Tensor) -> None:
        written[layer] = output.detach()

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        call(model, example_inputs)
    return [written[layer] for layer in layers]


def _close(expected: Tensor, found: Tensor) -> bool:
    tolerance = max(1e-4, 20.0 * torch.finfo(expected.dtype).eps)
    return bool((expected - found).abs().max() <= tolerance * expected.abs().max())
