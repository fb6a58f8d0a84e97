"""A table of the device at hand: how long the layers of each group take at several widths, and the cost that makes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.dependency.cost import Array, CostModel, Side, Term
from tp_twoaxis.dependency.flops import ExampleInputs, all_tensors, call
from tp_twoaxis.dependency.graph import PrunableGroup, group_key
from tp_twoaxis.dependency.groups import Member
from tp_twoaxis.dependency.latency import READING, Run, layer_shares, relative_latencies
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.layers import channel_axis, channel_layers, in_channels_of, out_channels_of
from tp_twoaxis.runtime.model_state import eval_mode, fork_rng
from tp_twoaxis.runtime.progress_bar import progress_bar

# rounds of the table: as many as fit into so many seconds, within these bounds
SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 60.0, 3, 9
LayerSide = tuple[nn.Module, bool]
"""A layer, and whether it is its outputs."""
Curves = dict[LayerSide, Array]


@dataclass(frozen=True)
class GroupLatency:
    """How long the layers that write or read a group's channels take at several widths.

    Attributes:
        name: the group's key.
        widths: [k] channels that the group keeps, descending from all of them.
        milliseconds: [k] of all of these layers together for the example inputs, every other group whole.
    """

    name: str
    widths: tuple[int, ...]
    milliseconds: tuple[float, ...]

    def quick_widths(self) -> list[int]:
        """List the widths that are quicker than all wider ones, the widest included.

        Example:
            >>> GroupLatency("conv", (64, 60, 56, 48), (1.0, 1.2, 0.9, 0.7)).quick_widths()
            [64, 56, 48]
        """
        found, least = [], float("inf")
        for width, time in zip(self.widths, self.milliseconds, strict=True):
            if time < least:
                found.append(width)
                least = time
        return found


@dataclass(frozen=True)
class LatencyTable:
    """What :func:`measure_latency_table` found.

    Attributes:
        cost: milliseconds of the network as a function of the channels that leave.
        groups: how long each group's layers take at each of its widths.
    """

    cost: CostModel
    groups: list[GroupLatency]


def measure_latency_table(
    graph: Any,
    groups: list[PrunableGroup],
    network: nn.Module,
    inputs: ExampleInputs,
    widths: Mapping[str, Sequence[int]],
    *,
    progress: bool = False,
) -> LatencyTable:
    """Time the layers of every group at several widths, on the network's device and with its threads.

    How the time of a pass is divided among its layers is read in place. Then every convolution and linear layer runs by
    itself on random inputs of the shape that it has in the network, whole and with fewer channels on either side in
    turn, and the median of the ratios counts. Between measured widths the time is interpolated; a width that is slower
    than a wider one counts as the wider one. Two sides of a layer act as factors, as they do on MACs (ours: a table of
    all pairs of widths would take as many times longer). The rest of a pass, of norms, activations and sums, is shared
    out by the number of values that layers write, and falls with the width of their outputs. All of this is an
    approximation, so a network is timed as a whole when channels have left it.

    Args:
        graph: the network's, of :func:`~tp_twoaxis.dependency.graph.build_graph`.
        groups: of it.
        network: timed as it is.
        inputs: of its forward; the time is of this batch.
        widths: group key -> channels that it may keep; those of groups that are not listed stay whole.
        progress: show a progress bar on stderr.

    Returns:
        The table; its cost counts in milliseconds of the whole network as it runs.
    """
    layers = _run_layers(network, inputs)
    shares, whole = layer_shares(network, inputs, layers, MOST_ROUNDS)
    kept = _kept_channels(groups, layers, widths)
    trials = sum(map(len, kept.values()))
    passes = 2 * sum(shares[layer] * len(own) for (layer, _), own in kept.items())
    rounds = int(np.clip(SECONDS / (whole / 1000 * passes + 2 * READING * trials + 1e-9), FEWEST_ROUNDS, MOST_ROUNDS))
    curves: Curves = {}
    for layer in progress_bar(list(layers), desc="time layers", unit="layer", show=progress):
        sides = {outputs: kept[layer, outputs] for outputs in (True, False) if (layer, outputs) in kept}
        curves |= _time_layer(graph, layer, layers[layer].example, sides, rounds)
    failed = {layer for (layer, _), own in kept.items() if own} - {layer for layer, _ in curves}
    rest = whole * max(1.0 - sum(share for layer, share in shares.items() if layer not in failed), 0.0)
    written = sum(entry.written for entry in layers.values())
    for layer, entry in layers.items():
        entry.own = 0.0 if layer in failed else whole * shares[layer]
        entry.rest = rest * entry.written / max(written, 1)
    measured = _cost_model(groups, layers, curves)
    falling = _cost_model(groups, layers, {side: np.minimum.accumulate(curve) for side, curve in curves.items()})
    times = [
        _group_latency(group, measured, sorted({*widths[group_key(group)], len(group.channels)}, reverse=True))
        for group in groups
        if group_key(group) in widths
    ]
    return LatencyTable(falling, times)


@dataclass
class _RunLayer:
    """What a layer does in a forward pass of the network.

    Attributes:
        example: its input without values, None where it takes anything but one tensor.
        calls: how often it runs.
        written: numbers that it writes.
        own: milliseconds of its runs; 0 where it could not be run by itself.
        rest: its part of the milliseconds of all that is no such layer.
    """

    example: Tensor | None
    calls: int = 0
    written: int = 0
    own: float = 0.0
    rest: float = 0.0


def _run_layers(network: nn.Module, inputs: ExampleInputs) -> dict[nn.Module, _RunLayer]:
    """Follow a forward pass; layers that do not run are left out."""
    found: dict[nn.Module, _RunLayer] = {}

    def note(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        tensor = arguments[0] if len(arguments) == 1 and not keywords and isinstance(arguments[0], Tensor) else None
        example = None if tensor is None else torch.empty_like(tensor, device="meta")
        entry = found.setdefault(layer, _RunLayer(example))
        entry.calls += 1
        entry.written += sum(tensor.numel() for tensor in all_tensors(output))

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in channel_layers(network).values()]
    try:
        with fork_rng(), eval_mode(network):
            call(network, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _kept_channels(
    groups: list[PrunableGroup], layers: Mapping[nn.Module, _RunLayer], widths: Mapping[str, Sequence[int]]
) -> dict[LayerSide, list[int]]:
    """List the widths at which each side of a layer is to be timed, those that groups' widths leave of it."""
    found: dict[LayerSide, set[int]] = {}
    for group in groups:
        for part in group.parts:
            if part.module in layers:
                each = len(part.channels) / len(group.channels)
                leaving = {round(each * (len(group.channels) - width)) for width in widths.get(group_key(group), ())}
                side = part.module, part.is_producer
                found.setdefault(side, set()).update(_width(part) - lost for lost in leaving if lost)
    return {side: sorted(kept - {0}, reverse=True) for side, kept in found.items()}


def _time_layer(
    graph: Any, layer: nn.Module, example: Tensor | None, sides: Mapping[bool, list[int]], rounds: int
) -> Curves:
    """Time a layer with fewer channels on each side, in turn with the whole layer.

    Returns:
        Of each side [width + 1] the time with so many channels less, as a share of the whole layer's; none where the
        layer cannot be run by itself.
    """
    trials = [(outputs, width) for outputs, widths in sides.items() for width in widths]
    if example is None or not trials or not isinstance(layer, (_ConvNd, nn.Linear)):
        return {}
    try:
        with fork_rng():
            whole = _narrowed(graph, layer, example, True, None)
            runs = [_narrowed(graph, layer, example, outputs, width) for outputs, width in trials]
        ratios = relative_latencies(whole, runs, rounds)
    except TwoAxisError:
        raise
    except Exception:  # a subclass may be anybody's: its time is then part of the rest
        return {}
    found = dict(zip(trials, ratios, strict=True))
    curves: Curves = {}
    for outputs, kept in sides.items():
        width = out_channels_of(layer) if outputs else in_channels_of(layer)
        lost = [0, *(width - k for k in kept)]
        curves[layer, outputs] = np.interp(np.arange(width + 1), lost, [1.0, *(found[outputs, k] for k in kept)])
    return curves


def _narrowed(graph: Any, layer: nn.Module, example: Tensor, outputs: bool, width: int | None) -> Run:
    """Make a copy of a layer with fewer outputs or inputs, and an input for it."""
    narrow, read = copy.deepcopy(layer), in_channels_of(layer)
    if width is not None:
        pruner = graph.get_pruner_of_module(layer)
        prune = pruner.prune_out_channels if outputs else pruner.prune_in_channels
        whole = out_channels_of(layer) if outputs else read
        prune(narrow, list(range(width, whole)))
        read = in_channels_of(narrow)  # of a depthwise convolution both sides are one
    parameter = next(layer.parameters())
    like = example.narrow(channel_axis(layer), 0, read)
    values = torch.empty_like(like, device=parameter.device)
    return narrow, values.uniform_() if values.is_floating_point() else values.zero_()


def _cost_model(groups: list[PrunableGroup], layers: Mapping[nn.Module, _RunLayer], curves: Curves) -> CostModel:
    """Express the network's time through what each group keeps."""
    lost: dict[LayerSide, dict[str, Array]] = {}
    widths: dict[LayerSide, int] = {}
    for group in groups:
        for part in group.parts:
            if part.module in layers:
                side, key = (part.module, part.is_producer), group_key(group)
                own = lost.setdefault(side, {})
                counts = np.bincount(part.roots.numpy(), minlength=len(group.channels)).astype(np.float64)
                own[key] = own.get(key, 0.0) + counts
                widths[side] = _width(part)
    timed = {side: Side(widths[side], own, curves[side]) for side, own in lost.items() if side in curves}
    written = {layer: Side(widths[layer, True], own) for (layer, outputs), own in lost.items() if outputs}
    terms = []
    for layer, entry in layers.items():
        sides = tuple(timed[layer, outputs] for outputs in (True, False) if (layer, outputs) in timed)
        terms.append(Term(entry.own, sides))
        terms.append(Term(entry.rest, (written[layer],) if layer in written else ()))
    return CostModel(terms, "latency")


def _group_latency(group: PrunableGroup, cost: CostModel, widths: list[int]) -> GroupLatency:
    """Add up the time of the layers that a group's channels are in, at each width."""
    key, size = group_key(group), len(group.channels)
    own = CostModel([term for term in cost.terms if any(key in side.lost for side in term.sides)])
    times = tuple(own.macs({key: np.arange(size) >= width}) for width in widths)
    return GroupLatency(key, tuple(widths), times)


def _width(part: Member) -> int:
    return out_channels_of(part.module) if part.is_producer else in_channels_of(part.module)
