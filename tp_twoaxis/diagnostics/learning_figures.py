"""What changes with training, drawn: means over layers or, of several trainings, over seeds, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from tp_twoaxis.diagnostics.channel_quantities import WORDS
from tp_twoaxis.diagnostics.plots import DPI

# colours that differ for every kind of colour vision (Okabe and Ito 2008)
COLOURS = {"I": "#0072b2", "R": "#009e73", "M": "#d55e00", "X": "#cc79a7"}
COSINES = {
    "capture_information": ("slopes of capture and task information", "#0072b2", "o-"),
    "descent_capture": ("descent of the loss and capture", "#009e73", "s--"),
    "descent_information": ("descent of the loss and task information", "#d55e00", "^:"),
}


def mean_by_epoch(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean and its standard error by epoch.

    Args:
        table: of one network, with ``epoch``, the column and, of several trainings, ``seed``.
        column: what to average; NaN is left out.

    Returns:
        Index epoch; ``mean`` and ``sem``. With two seeds or more layers are averaged first, and the error is over
        seeds; else it is over layers. NaN where there is one number alone.

    Example:
        >>> table = pd.DataFrame({"epoch": [0, 0, 5, 5], "rho": [0.2, 0.4, 0.1, 0.1]})
        >>> mean_by_epoch(table, "rho").round(3).values.tolist()
        [[0.3, 0.1], [0.1, 0.0]]
    """
    if "seed" in table and table.seed.nunique() > 1:
        table = table.groupby(["epoch", "seed"])[column].mean().reset_index()
    return table.groupby("epoch")[column].agg(["mean", "sem"])


def draw_learning(trajectory: pd.DataFrame, velocity: pd.DataFrame, persistence: pd.DataFrame) -> Figure:
    """Draw coupling, persistence and velocities of :mod:`~tp_twoaxis.diagnostics.learning`, one below the other."""
    figure = Figure(figsize=(5.2, 9.0), dpi=DPI, layout="constrained")
    coupling, settling, speed = figure.subplots(3, 1)
    _line(coupling, mean_by_epoch(trajectory, "rho"), color="0.2", marker="o")
    coupling.set_title("Coupling of the axes", loc="left", fontsize="medium")
    coupling.set_ylabel("rank correlation of input\ncapture and task information")
    for symbol, part in persistence.groupby("quantity", sort=False):
        _line(settling, mean_by_epoch(part, "rho"), color=COLOURS[symbol], marker="o", label=WORDS[symbol])
    settling.set_title("How much of the last order is there", loc="left", fontsize="medium")
    settling.set_ylabel("rank correlation\nwith the last epoch")
    settling.legend(loc="upper center", bbox_to_anchor=(0.5, -0.26), ncols=3, frameon=False, fontsize="small")
    for axes in (coupling, settling):
        _epochs(axes, trajectory.epoch)
    _velocities(speed, velocity)
    return figure


def _velocities(axes: Any, velocity: pd.DataFrame) -> None:
    labels = []
    for place, (_, part) in enumerate(velocity.groupby("window", sort=False)):
        labels.append(f"epochs {part.start.min()} to {part.end.max()}")
        spread = [place + 0.12 * (i / max(len(part) - 1, 1) - 0.5) for i in range(len(part))]
        axes.plot(spread, part.rho, "o", color=COLOURS["I"], alpha=0.7, markersize=5)
        axes.hlines(part.rho.mean(), place - 0.2, place + 0.2, color="0.2")
    axes.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_title("Do channels move along both axes? (line: mean)", loc="left", fontsize="medium")
    axes.set_ylabel("rank correlation of changes in\ncapture and task information")


def draw_measures(trajectory: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Draw columns of a trajectory by epoch, a panel each."""
    figure = Figure(figsize=(5.2, 2.6 * len(names) + 0.4), dpi=DPI, layout="constrained")
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        _line(axes, mean_by_epoch(trajectory, name), color="0.2", marker="o")
        _epochs(axes, trajectory.epoch, zero=False)
        words = MEASURE_WORDS.get(name, name.replace("_", " "))
        axes.set_ylabel(words)
    return figure


MEASURE_WORDS = {
    "hull_size": "mean hull size (peers)",
    "saturated": "saturated hulls\n(share of channels)",
    "triplets": "excess of triplets\nover that of pairs",
    "modularity_gap": "modularity of overlap\nless that of excess",
}


def draw_gradients(table: pd.DataFrame) -> Figure:
    """Draw cosines of :mod:`~tp_twoaxis.diagnostics.axis_gradients` by depth."""
    figure = Figure(figsize=(5.2, 4.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    ordered = table.sort_values("depth")
    axes.fill_between(ordered.depth, -ordered.chance, ordered.chance, color="0.9", label="unrelated directions")
    for name, (words, colour, style) in COSINES.items():
        axes.plot(ordered.depth, ordered[name], style, color=colour, label=words, markersize=4, linewidth=1.2)
    axes.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    axes.set_xlabel("depth (0 first, 1 last convolution)")
    axes.set_ylabel("mean cosine in weight space")
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def draw_gradients_by_epoch(table: pd.DataFrame) -> Figure:
    """Draw the same by epoch."""
    figure = Figure(figsize=(5.2, 4.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for name, (words, colour, style) in COSINES.items():
        _line(axes, mean_by_epoch(table, name), color=colour, marker=style[0], linestyle=style[1:], label=words)
    _epochs(axes, table.epoch)
    axes.set_ylabel("mean cosine in weight space")
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def _line(axes: Any, means: pd.DataFrame, **style: Any) -> None:
    axes.plot(means.index, means["mean"], markersize=4, linewidth=1.2, **style)
    error = means["sem"].fillna(0.0)
    axes.fill_between(
        means.index, means["mean"] - error, means["mean"] + error, color=style["color"], alpha=0.15, linewidth=0
    )


def _epochs(axes: Any, epochs: pd.Series[int], *, zero: bool = True) -> None:
    """An axis of epochs that shows early ones apart: square roots, with a tick at each snapshot that has room."""
    axes.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
    last = max(epochs.max(), 1)
    ticks: list[int] = []
    for epoch in sorted(set(epochs), reverse=True):
        if not ticks or math.sqrt(ticks[-1] / last) - math.sqrt(epoch / last) > 0.06:
            ticks.append(epoch)
    axes.set_xticks(ticks, [str(epoch) for epoch in ticks])
    axes.set_xlabel("epoch (square-root axis)")
    if zero:
        axes.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
