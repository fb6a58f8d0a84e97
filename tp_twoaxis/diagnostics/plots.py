"""Scatter plots of a layer's channels: what they capture locally against what they say about the task."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from tp_twoaxis.diagnostics.cell_figures import plain, shown_name
from tp_twoaxis.diagnostics.html_page import png_bytes
from tp_twoaxis.errors import TwoAxisError, listing
from tp_twoaxis.runtime.serialization import write_bytes

CAPTURE = "local capture $I_k$ (nats)"
TASK = "task information $M_k$ (nats)"
HULL = "hull explanation $E_k$ (share of variance)"
OVERVIEW = "overview.png"
DPI = 120
LEAST_RANGE = 0.02  # of colours: less is no difference
LAYER_SIZE, LAYER_DPI = (4.5, 4.2), 170  # as wide as a phone shows without scrolling
CONSTANT_COLOUR = "#d62728"
MARK_COLOUR = "#d55e00"  # vermilion stands out of viridis for every kind of colour vision; shapes differ too


def plot_layer(
    table: pd.DataFrame,
    *,
    marked: Sequence[int] = (),
    peers: Sequence[int] = (),
    removed: Sequence[int] = (),
) -> Figure:
    """Draw one layer.

    Args:
        table: the rows of one layer from :func:`~tp_twoaxis.diagnostics.channel_table.channel_table`.
        marked: channels to mark with a ring and a bold number.
        peers: channels to mark with a square and a number, those that can replace the marked one.
        removed: channels to mark with a thin ring alone.

    Returns:
        A figure: x capture, y task information, colour hull explanation (0: nobody replaces the channel, 1: a few
        peers do), between round numbers that the layer's channels lie between. Constant channels are crosses, dashed
        lines the medians. Channels at the edges are numbered where none is marked.

    Raises:
        TwoAxisError: the table is empty or has no target axis, or a marked channel is not in it.

    Example:
        >>> table = pd.DataFrame({"layer": "conv1", "channel": [0, 1], "variance": [1.0, 2.0],
        ...                       "capture": [0.3, 0.5], "task_mi": [0.01, 0.2], "hull_explanation": [0.1, 0.9]})
        >>> plot_layer(table).axes[0].get_title(loc="left")
        'conv1'
    """
    _check(table)
    figure = Figure(figsize=LAYER_SIZE, dpi=LAYER_DPI, layout="constrained")
    axes = figure.add_subplot()
    points = _scatter(axes, table, colour_range(table), size=34)
    constant = int((table.variance == 0).sum())
    name = shown_name(str(table.layer.iloc[0]), 36)
    axes.set_title(name, loc="left", size=11, fontweight="bold", pad=18, parse_math=False)
    about = f"{len(table)} channels" + (f", {constant} constant (x)" if constant else "") + ", dashed: medians"
    axes.text(0.0, 1.02, about, transform=axes.transAxes, size=9, va="bottom", color="0.25")
    axes.set_xlabel(CAPTURE)
    axes.set_ylabel(TASK)
    bar = figure.colorbar(points, ax=axes, aspect=30)
    bar.set_label(HULL)
    if marked or peers or removed:
        _mark(figure, axes, table, marked, peers, removed)
    else:
        _number_extremes(figure, axes, table)
    # medians cut the plane in four: top left holds what a local score alone would remove
    axes.axvline(table.capture.median(), color="0.6", linewidth=0.8, linestyle="--", zorder=1)
    axes.axhline(table.task_mi.median(), color="0.6", linewidth=0.8, linestyle="--", zorder=1)
    return figure


def plot_overview(table: pd.DataFrame) -> Figure:
    """Draw all layers as small multiples with one colour scale; each has its own axes' ranges.

    Args:
        table: from :func:`~tp_twoaxis.diagnostics.channel_table.channel_table`.

    Raises:
        TwoAxisError: the table is empty or has no target axis.

    Example:
        >>> table = pd.DataFrame({"layer": ["a", "b"], "channel": 0, "variance": 1.0, "capture": [0.3, 0.5],
        ...                       "task_mi": [0.01, 0.2], "hull_explanation": [0.1, 0.9]})
        >>> len(plot_overview(table).axes)
        3
    """
    _check(table)
    layers = [(str(name), part) for name, part in table.groupby("layer", sort=False)]
    columns = min(len(layers), 4 if len(layers) <= 24 else 6)
    rows = math.ceil(len(layers) / columns)
    size = (max(2.5 * columns + 1.2, 5.0), 2.1 * rows + 1.0)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for panel in panels[len(layers) :]:
        panel.remove()
    used = panels[: len(layers)]
    between = colour_range(table)
    for panel, (name, part) in zip(used, layers, strict=True):
        points = _scatter(panel, part, between, size=11)
        panel.set_title(f"{shown_name(name, 26)} ({len(part)})", size=8, parse_math=False)
        panel.tick_params(labelsize=7)
        panel.locator_params(nbins=4)
    figure.supxlabel(CAPTURE, size=10)
    figure.supylabel(TASK, size=10)
    bar = figure.colorbar(points, ax=used, shrink=min(1.0, 4.0 / size[1]), aspect=30)
    bar.set_label(HULL)
    return figure


def write_plots(table: pd.DataFrame, folder: str | Path) -> list[Path]:
    """Write ``overview.png`` and a PNG for each layer, ``01_layer1.0.conv1.png``, numbered in the model's order.

    Args:
        table: from :func:`~tp_twoaxis.diagnostics.channel_table.channel_table`.
        folder: made if it does not exist, its parents are not; files of equal names are replaced.

    Returns:
        The files, the overview first.

    Raises:
        TwoAxisError: the table is empty or has no target axis, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> table = pd.DataFrame({"layer": ["a", "b"], "channel": 0, "variance": 1.0, "capture": [0.3, 0.5],
        ...                       "task_mi": [0.01, 0.2], "hull_explanation": [0.1, 0.9]})
        >>> [path.name for path in write_plots(table, tempfile.mkdtemp())]
        ['overview.png', '01_a.png', '02_b.png']
    """
    folder = Path(folder)
    overview = plot_overview(table)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise TwoAxisError(f"{folder}: could not be made a folder ({error}); choose another") from error
    paths = [write_figure(overview, folder / OVERVIEW)]
    parts = [(str(name), part) for name, part in table.groupby("layer", sort=False)]
    digits = max(2, len(str(len(parts))))
    for number, (name, part) in enumerate(parts, start=1):
        # a model's own names may hold anything but dots
        safe = re.sub(r"[^\w.-]", "_", name) or "model"
        paths.append(write_figure(plot_layer(part), folder / f"{number:0{digits}}_{safe}.png"))
    return paths


def _check(table: pd.DataFrame) -> None:
    if len(table) == 0:
        raise TwoAxisError("plot: expected at least one channel, got an empty table; calibrate with some layers")
    if bool(table.task_mi.isna().any()):
        raise TwoAxisError(
            "plot: expected both axes, the statistics hold no target; calibrate with a target such as margin"
        )


def colour_range(table: pd.DataFrame) -> tuple[float, float]:
    """Round numbers between which the hull explanations of a table's channels lie: colours that tell them apart.

    Example:
        >>> colour_range(pd.DataFrame({"variance": [1.0, 2.0, 0.0], "hull_explanation": [0.83, 0.91, 0.0]}))
        (0.82, 0.92)
    """
    known = table.hull_explanation[table.variance > 0].dropna()
    if known.empty:
        return 0.0, 1.0
    middle, half = (known.max() + known.min()) / 2, max(known.max() - known.min(), LEAST_RANGE) / 2
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(middle - half, middle + half)
    return max(round(float(ticks[0]), 6), 0.0), min(round(float(ticks[-1]), 6), 1.0)


def _scatter(axes: Any, table: pd.DataFrame, between: tuple[float, float], *, size: float) -> Any:
    varying, constant = table[table.variance > 0], table[table.variance == 0]
    points = axes.scatter(
        varying.capture,
        varying.task_mi,
        c=varying.hull_explanation,
        s=size,
        cmap="viridis",
        vmin=between[0],
        vmax=between[1],
        edgecolors="black",
        linewidths=0.3,
        zorder=2,
    )
    if len(constant):
        axes.scatter(constant.capture, constant.task_mi, marker="x", s=size, color=CONSTANT_COLOUR, zorder=2)
    plain(axes)
    return points


def _number_extremes(figure: Figure, axes: Any, table: pd.DataFrame, count: int = 3) -> None:
    """Number the channels with the largest and smallest values of either axis."""
    count = min(count, len(table))
    rows = {row for name in ("capture", "task_mi") for row in table[name].nlargest(count).index}
    rows |= set(table["capture"].nsmallest(1).index)
    taken = _points(figure, axes, table)
    for row in sorted(rows):
        _number(axes, table.loc[row], int(table.channel[row]), taken, size=8, colour="0.25", away=4)


def _points(figure: Figure, axes: Any, table: pd.DataFrame) -> list[Bbox]:
    """Lay the figure out and say where on the page its points lie."""
    axes.margins(0.09)  # room for rings and numbers at the edges
    figure.draw_without_rendering()
    radius = 3 * figure.dpi / 72
    return [
        Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius)
        for x, y in axes.transData.transform(table[["capture", "task_mi"]])
    ]


def _mark(
    figure: Figure, axes: Any, table: pd.DataFrame, marked: Sequence[int], peers: Sequence[int], removed: Sequence[int]
) -> None:
    """Ring the marked channels, box their peers, number both, ring removed ones, and explain the marks below."""
    rows = table.set_index("channel")
    if absent := [channel for channel in (*marked, *peers, *removed) if channel not in rows.index]:
        raise TwoAxisError(f"plot: expected channels of the table to mark, got {listing(map(str, absent))}")
    one = len(marked) == 1
    kinds = (
        (marked, f"channel{'' if one else 's'} {listing(map(str, marked))}", "o", 190, 2.2, MARK_COLOUR),
        (peers, f"{'its' if one else 'their'} peers", "s", 70, 1.4, "black"),
        (removed, "removed", "o", 100, 1.2, MARK_COLOUR),
    )
    for channels, label, marker, size, width, colour in kinds:
        if not channels:
            continue
        shown = rows.loc[list(channels)]
        axes.scatter(
            shown.capture,
            shown.task_mi,
            s=size,
            marker=marker,
            facecolors="none",
            edgecolors=colour,
            linewidths=width,
            zorder=3,
            label=label,
        )
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    taken = _points(figure, axes, table)
    for channel in marked:
        _number(axes, rows.loc[channel], channel, taken, size=11, colour=MARK_COLOUR, fontweight="bold")
    for channel in peers:
        _number(axes, rows.loc[channel], channel, taken, size=8, colour="black")


def _number(
    axes: Any,
    row: pd.Series,
    channel: int,
    taken: list[Bbox],
    *,
    size: float,
    colour: str,
    away: float = 9,
    **font: str,
) -> None:
    """Write a channel's number beside its point, where it covers least of what is ``taken``, and take that place."""
    pixel = axes.figure.dpi / 72
    width, height = 0.65 * size * len(str(channel)), size
    x, y = axes.transData.transform((row.capture, row.task_mi)) / pixel
    spots: list[tuple[float, int, float, float, Bbox]] = []
    for right, up in itertools.product((away, -away - width, -width / 2), (4, -4 - height, -height / 2)):
        if up == -height / 2 and right == -width / 2:
            continue  # on the point itself
        box = Bbox.from_bounds(*(pixel * n for n in (x + right, y + up, width, height)))
        inside = Bbox.intersection(axes.bbox, box)
        covered = sum(b.width * b.height for other in taken if (b := Bbox.intersection(other, box)) is not None)
        outside = box.width * box.height - (0.0 if inside is None else inside.width * inside.height)
        spots.append((covered + 10 * outside, len(spots), right, up, box))
    _, _, right, up, box = min(spots, key=lambda spot: spot[:2])
    taken.append(box)
    text = axes.annotate(
        str(channel),
        (row.capture, row.task_mi),
        xytext=(right, up),
        textcoords="offset points",
        size=size,
        color=colour,
        zorder=4,
        **font,
    )
    # a white edge keeps numbers legible on top of points
    text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def write_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all; returns the path."""
    write_bytes(path, png_bytes(figure))
    return path
