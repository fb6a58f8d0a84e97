"""Stability drawn: the agreement of each layer's ranks, and the intervals of the layer that needs most images."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from tp_twoaxis.dependency.flops import ExampleInputs
from tp_twoaxis.dependency.graph import build_graph, prunable_groups
from tp_twoaxis.diagnostics.cell_figures import plain, shown_name
from tp_twoaxis.diagnostics.reliability import CalibrationSize
from tp_twoaxis.diagnostics.stability import LayerStability, StabilityReport
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.layers import channel_layers

DPI = 170
WIDTH = 4.5  # inches: as wide as a phone shows without scrolling
ENOUGH, SHORT = "#2a7f62", "#d62728"


def stability_figure(
    stability: StabilityReport, size: CalibrationSize, prunable: Collection[str] | None = None
) -> Figure:
    """Draw both reports about the same layers.

    Args:
        stability: of :func:`~tp_twoaxis.diagnostics.score_stability`.
        size: of :func:`~tp_twoaxis.diagnostics.calibration_is_enough`, with the same score.
        prunable: layers that can lose channels, see :func:`prunable_layers`; None takes all for such.

    Returns:
        A figure. Above: each layer's reliability, green where it reaches the target (dashed) and red where not, and
        how many of its 30 % lowest channels stay so (open circles). Below: every channel's score with its interval,
        ascending, in the layer with the lowest reliability among those that can lose channels.

    Example:
        >>> from tp_twoaxis.diagnostics import LayerReliability
        >>> layer = LayerStability("conv1", [1.0, 2.0, 3.0], [0.9, 1.9, 2.9], [1.1, 2.1, 3.1], 1.0, 1.0)
        >>> size = CalibrationSize("capture", 64, 0.95, [LayerReliability("conv1", 3, 0.9, 0.95, 61, True)])
        >>> len(stability_figure(StabilityReport("capture", 0.95, 200, 8, 64, [layer]), size).axes)
        2
    """
    names = [layer.name for layer in size.layers]
    whole = set() if prunable is None else set(names) - set(prunable)
    high = 0.2 * len(names) + 1.3
    figure = Figure(figsize=(WIDTH, high + 3.0), dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[high, 2.8])
    _draw_agreement(above, stability, size)
    labels = [shown_name(name, 30) + " (never pruned)" * (name in whole) for name in names]
    above.set_yticks(range(len(names)), labels, fontsize=7, parse_math=False)
    candidates = [layer for layer in size.layers if layer.name not in whole] or size.layers
    judged = [layer for layer in candidates if layer.reliability is not None] or candidates
    weakest = min(judged, key=lambda layer: layer.reliability or 0.0)
    _draw_intervals(below, stability.layers[names.index(weakest.name)], stability)
    for axes in (above, below):
        plain(axes)
    return figure


def prunable_layers(model: nn.Module, example_inputs: ExampleInputs) -> set[str]:
    """Name the layers whose outputs pruning may remove: not those that compute the model's outputs.

    Args:
        model: left as it was.
        example_inputs: of its forward.

    Returns:
        Names; of all layers where Torch-Pruning cannot follow the model.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prunable_layers(net, torch.randn(1, 4))
        {'0'}
    """
    try:
        groups, _ = prunable_groups(build_graph(model, example_inputs), model, [])
    except TwoAxisError:
        return set(channel_layers(model))
    names = {module: name for name, module in model.named_modules()}
    return {names[part.module] for group in groups for part in group.parts if part.is_producer and part.module in names}


def _draw_agreement(axes: Any, stability: StabilityReport, size: CalibrationSize) -> None:
    judged = [(row, layer) for row, layer in enumerate(size.layers) if layer.reliability is not None]
    axes.barh(
        [row for row, _ in judged],
        [layer.reliability for _, layer in judged],
        color=[ENOUGH if layer.enough else SHORT for _, layer in judged],
        height=0.7,
        label="reliability of the ranks",
    )
    known = [(row, layer.overlap) for row, layer in enumerate(stability.layers) if layer.overlap is not None]
    axes.plot(
        [overlap for _, overlap in known],
        [row for row, _ in known],
        "o",
        color="black",
        markerfacecolor="white",
        markersize=4,
        label="lowest 30 % that stay",
    )
    axes.axvline(size.target, color="0.4", linewidth=0.8, linestyle="--")
    axes.set_ylim(len(size.layers) - 0.5, -0.5)
    axes.set_xlim(0.0, 1.02)
    axes.set_xlabel(f"agreement; dashed: target {size.target:g}", size=9)
    axes.set_title(f"{size.score}, {size.images} images", loc="left", size=11, fontweight="bold", pad=22)
    axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.99), ncols=2, fontsize=8, frameon=False, columnspacing=1.2)


def _draw_intervals(axes: Any, layer: LayerStability, stability: StabilityReport) -> None:
    order = sorted(range(len(layer.scores)), key=lambda channel: layer.scores[channel])
    axes.vlines(
        range(len(order)), [layer.lower[k] for k in order], [layer.upper[k] for k in order], color="0.5", linewidth=1.2
    )
    axes.plot(range(len(order)), [layer.scores[k] for k in order], "o", color="black", markersize=2.5)
    axes.set_xlabel("channels, ascending", size=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylabel(stability.score, size=9)
    axes.set_title(shown_name(layer.name, 26), loc="left", size=10, fontweight="bold", parse_math=False)
    axes.set_title(f"{stability.level:.0%} intervals", loc="right", size=9)
