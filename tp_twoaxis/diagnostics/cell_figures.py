"""Drawings of numbers that cells have: a dot a cell, against depth or side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator

DPI = 120
WIDTH = 6.0
DEPTH = "relative depth (0 first convolution, 1 last)"
# Okabe & Ito (2008): told apart with every kind of colour vision; markers differ too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "os^Dv*"
BAND = "#e8e8e8"


def panels(rows: int, height: float) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels below each other, as wide as a phone can show.

    Example:
        >>> figure, axes = panels(2, 2.4)
        >>> len(axes), figure.get_size_inches().tolist()
        (2, [6.0, 4.8])
    """
    figure = Figure(figsize=(WIDTH, rows * height), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(rows, 1, squeeze=False)[:, 0])
    for panel in axes:
        plain(panel)
    return figure, axes


def plain(axes: Axes) -> None:
    """Give axes a light grid and no frame above and to the right."""
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def against_depth(axes: Axes, cells: pd.DataFrame, columns: Mapping[str, str], *, mean: bool = True) -> None:
    """Draw columns against depth, each with its own marker and a dashed line at its mean.

    Args:
        axes: where.
        cells: with a column ``depth``.
        columns: column -> its name in the legend, which lies above the axes.
        mean: draw the lines.

    Example:
        >>> figure, (axes,) = panels(1, 2.4)
        >>> against_depth(axes, pd.DataFrame({"depth": [0.0, 1.0], "rho": [0.1, 0.3]}), {"rho": "correlation"})
        >>> [text.get_text() for text in axes.get_legend().get_texts()]
        ['correlation (mean 0.20)']
    """
    for number, (column, label) in enumerate(columns.items()):
        colour = COLOURS[number % len(COLOURS)]
        average = float(cells[column].mean())
        shown = f"{label} (mean {average:.2f})" if mean and not math.isnan(average) else label
        axes.plot(cells.depth, cells[column], MARKERS[number % len(MARKERS)], color=colour, markersize=4.5, label=shown)
        if mean and not math.isnan(average):
            axes.axhline(average, color=colour, linewidth=1.0, linestyle="--")
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel(DEPTH)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, fontsize=8, frameon=False)


def strips(axes: Axes, rows: Mapping[str, Sequence[float]], *, label: str) -> None:
    """Draw a row of dots for each quantity, a dot a cell, with a bar at the mean and its number at the right.

    Args:
        axes: where.
        rows: name of the row -> a number for each cell; NaN is left out.
        label: of the horizontal axis, which has a line at 0.

    Example:
        >>> figure, (axes,) = panels(1, 2.4)
        >>> strips(axes, {"norm and capture": [0.1, 0.5]}, label="rank correlation")
        >>> [text.get_text() for text in axes.get_yticklabels()]
        ['norm and capture']
    """
    generator = np.random.default_rng(0)  # of the dots' heights, which mean nothing
    for row, values in enumerate(rows.values()):
        known = np.asarray([value for value in values if not math.isnan(value)] or [math.nan])
        heights = row + generator.uniform(-0.22, 0.22, len(known))
        dots = axes.plot(known, heights, "o", color=COLOURS[0], alpha=0.45, markersize=4, markeredgewidth=0)
        bars = axes.plot([known.mean()] * 2, [row - 0.34, row + 0.34], color=COLOURS[1], linewidth=2.2)
        axes.annotate(_number(known.mean()), (1.01, row), xycoords=("axes fraction", "data"), va="center", size=9)
        if not row:
            dots[0].set_label("a layer")
            bars[0].set_label("mean")
    axes.axvline(0.0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(label, size=9)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, fontsize=8, frameon=False)


def matrix(axes: Axes, values: Any, names: Sequence[str]) -> None:
    """Draw a square of correlations with their numbers.

    Args:
        axes: where; its grid goes.
        values: [n, n] in [-1, 1].
        names: of rows and columns.

    Example:
        >>> figure, (axes,) = panels(1, 3.0)
        >>> matrix(axes, np.eye(2), ["margin", "loss"])
        >>> [text.get_text() for text in axes.texts]
        ['1.00', '0.00', '0.00', '1.00']
    """
    axes.imshow(values, cmap="RdBu_r", vmin=-1.0, vmax=1.0, aspect="auto")
    for row, column in np.ndindex(*np.shape(values)):
        number = float(values[row][column])
        dark = abs(number) > 0.6
        axes.text(column, row, _number(number), ha="center", va="center", size=9, color="white" if dark else "black")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.grid(False)


def shown_name(name: str, limit: int) -> str:
    r"""Write a name so that it can be drawn: its end where it is long, and escapes for letters that the font lacks.

    Example:
        >>> shown_name("schicht.größe", 20), shown_name("層1", 20), shown_name("features.stage3.block12.conv", 16)
        ('schicht.größe', '\\u5c641', '…e3.block12.conv')
    """
    font = get_font(findfont("DejaVu Sans"))
    letters = [c if font.get_char_index(ord(c)) else c.encode("ascii", "backslashreplace").decode() for c in name]
    text = "".join(letters)
    return text if len(text) <= limit else "…" + text[1 - limit :]


def _number(value: float) -> str:
    """Two decimals, zero without a sign, nothing for NaN."""
    return "" if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"
