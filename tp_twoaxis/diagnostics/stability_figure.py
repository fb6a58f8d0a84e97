"""Stability drawn: the agreement of each layer's ranks, and the intervals of the layer that needs most images."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from tp_twoaxis.diagnostics.cell_figures import plain
from tp_twoaxis.diagnostics.reliability import CalibrationSize
from tp_twoaxis.diagnostics.stability import LayerStability, StabilityReport

DPI = 120
ENOUGH, SHORT = "#2a7f62", "#d62728"


def stability_figure(stability: StabilityReport, size: CalibrationSize) -> Figure:
    """Draw both reports about the same layers.

    Args:
        stability: of :func:`~tp_twoaxis.diagnostics.score_stability`.
        size: of :func:`~tp_twoaxis.diagnostics.calibration_is_enough`, with the same score.

    Returns:
        A figure. Left: each layer's reliability, green where it reaches the target (dashed) and red where not, and
        how many of its 30 % lowest channels stay so (open circles). Right: every channel's score with its interval,
        ascending, in the layer with the lowest reliability.

    Example:
        >>> from tp_twoaxis.diagnostics import LayerReliability
        >>> layer = LayerStability("conv1", [1.0, 2.0, 3.0], [0.9, 1.9, 2.9], [1.1, 2.1, 3.1], 1.0, 1.0)
        >>> size = CalibrationSize("capture", 64, 0.95, [LayerReliability("conv1", 3, 0.9, 0.95, 61, True)])
        >>> len(stability_figure(StabilityReport("capture", 0.95, 200, 8, 64, [layer]), size).axes)
        2
    """
    count = len(size.layers)
    figure = Figure(figsize=(10.5, max(3.6, 0.22 * count + 1.4)), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = range(count)
    judged = [(row, layer) for row, layer in zip(rows, size.layers, strict=True) if layer.reliability is not None]
    left.barh(
        [row for row, _ in judged],
        [layer.reliability for _, layer in judged],
        color=[ENOUGH if layer.enough else SHORT for _, layer in judged],
        height=0.7,
        label="reliability of the ranks",
    )
    known = [
        (row, layer.overlap) for row, layer in zip(rows, stability.layers, strict=True) if layer.overlap is not None
    ]
    left.plot(
        [overlap for _, overlap in known],
        [row for row, _ in known],
        "o",
        color="black",
        markerfacecolor="white",
        markersize=4,
        label="lowest 30 % that stay",
    )
    left.axvline(size.target, color="0.4", linewidth=0.8, linestyle="--")
    left.set_yticks(list(rows), [layer.name for layer in size.layers], fontsize=7)
    left.invert_yaxis()
    left.set_xlim(0.0, 1.02)
    left.set_xlabel(f"agreement; dashed: target {size.target:g}")
    left.set_title(f"{size.score}, {size.images} images", loc="left", fontweight="bold")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=7, frameon=False)
    weakest = min(judged, key=lambda item: item[1].reliability or 0.0)[0] if judged else 0
    _draw_intervals(right, stability.layers[weakest], stability)
    for axes in (left, right):
        plain(axes)
    return figure


def _draw_intervals(axes: Any, layer: LayerStability, stability: StabilityReport) -> None:
    order = sorted(range(len(layer.scores)), key=lambda channel: layer.scores[channel])
    axes.vlines(
        range(len(order)), [layer.lower[k] for k in order], [layer.upper[k] for k in order], color="0.5", linewidth=1.2
    )
    axes.plot(range(len(order)), [layer.scores[k] for k in order], "o", color="black", markersize=2.5)
    axes.set_xlabel("channels, ascending")
    axes.set_ylabel(stability.score)
    axes.set_title(layer.name, loc="left", fontweight="bold")
    axes.set_title(f"{stability.level:.0%} intervals", loc="right", size=9)
