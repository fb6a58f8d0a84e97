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
from matplotlib.transforms import Bbox

from tp_twoaxis.diagnostics.cell_figures import plain
from tp_twoaxis.diagnostics.html_page import png_bytes
from tp_twoaxis.errors import TwoAxisError, listing
from tp_twoaxis.runtime.serialization import write_bytes

CAPTURE = "local capture $I_k$ (nats)"
TASK = "task information $M_k$ (nats)"
HULL = "hull explanation $E_k$ (share of variance)"
OVERVIEW = "overview.png"
DPI = 120
CONSTANT_COLOUR = "#d62728"
MARK_COLOUR = "#d55e00"  # vermilion stands out of viridis for every kind of colour vision; shapes differ too


def plot_layer(table: pd.DataFrame, *, marked: Sequence[int] = (), peers: Sequence[int] = ()) -> Figure:
    """Draw one layer.

    Args:
        table: the rows of one layer from :func:`~tp_twoaxis.diagnostics.channel_table.channel_table`.
        marked: channels to mark with a ring and a bold number.
        peers: channels to mark with a square and a number, those that can replace the marked one.

    Returns:
        A figure: x capture, y task information, colour hull explanation from 0 (nobody replaces the channel)
        to 1 (a few peers do). Constant channels are crosses, dashed lines the medians. Channels at the edges
        are numbered where none is marked.

    Raises:
        TwoAxisError: the table is empty or has no target axis, or a marked channel is not in it.

    Example:
        >>> table = pd.DataFrame({"layer": "conv1", "channel": [0, 1], "variance": [1.0, 2.0],
        ...                       "capture": [0.3, 0.5], "task_mi": [0.01, 0.2], "hull_explanation": [0.1, 0.9]})
        >>> plot_layer(table).axes[0].get_title(loc="left")
        'conv1'
    """
    _check(table)
    figure = Figure(figsize=(6.4, 4.8), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    points = _scatter(axes, table, size=34)
    constant = int((table.variance == 0).sum())
    axes.set_title(str(table.layer.iloc[0]), loc="left", fontweight="bold")
    axes.set_title(
        f"{len(table)} channels" + (f", {constant} constant (x)" if constant else "") + ", dashed: medians",
        loc="right",
        size=9,
    )
    axes.set_xlabel(CAPTURE)
    axes.set_ylabel(TASK)
    bar = figure.colorbar(points, ax=axes)
    bar.set_label(HULL)
    if marked or peers:
        _mark(figure, axes, table, marked, peers)
    else:
        _number_extremes(axes, table)
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
    for panel, (name, part) in zip(used, layers, strict=True):
        points = _scatter(panel, part, size=11)
        panel.set_title(f"{name} ({len(part)})", size=8)
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


def _scatter(axes: Any, table: pd.DataFrame, *, size: float) -> Any:
    varying, constant = table[table.variance > 0], table[table.variance == 0]
    points = axes.scatter(
        varying.capture,
        varying.task_mi,
        c=varying.hull_explanation,
        s=size,
        cmap="viridis",
        vmin=0.0,
        vmax=1.0,
        edgecolors="black",
        linewidths=0.3,
        zorder=2,
    )
    if len(constant):
        axes.scatter(constant.capture, constant.task_mi, marker="x", s=size, color=CONSTANT_COLOUR, zorder=2)
    plain(axes)
    return points


def _number_extremes(axes: Any, table: pd.DataFrame, count: int = 3) -> None:
    """Number the channels with the largest and smallest values of either axis."""
    count = min(count, len(table))
    rows = {row for name in ("capture", "task_mi") for row in table[name].nlargest(count).index}
    rows |= set(table["capture"].nsmallest(1).index)
    for row in sorted(rows):
        axes.annotate(
            str(table.channel[row]),
            (table.capture[row], table.task_mi[row]),
            xytext=(4, 3),
            textcoords="offset points",
            size=7,
            color="0.3",
        )


def _mark(figure: Figure, axes: Any, table: pd.DataFrame, marked: Sequence[int], peers: Sequence[int]) -> None:
    """Ring the marked channels, box their peers, number both, and explain the marks below."""
    rows = table.set_index("channel")
    if absent := [channel for channel in (*marked, *peers) if channel not in rows.index]:
        raise TwoAxisError(f"plot: expected channels of the table to mark, got {listing(map(str, absent))}")
    one = len(marked) == 1
    what = f"channel{'' if one else 's'} {listing(map(str, marked))}", f"{'its' if one else 'their'} peers"
    shapes = (("o", 190, 2.2, MARK_COLOUR), ("s", 70, 1.4, "black"))
    for channels, label, (marker, size, width, colour) in zip((marked, peers), what, shapes, strict=True):
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
            label=label if channels else None,
        )
    axes.margins(0.09)  # room for rings and numbers at the edges
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.draw_without_rendering()  # the layout decides where points lie on the page
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform(rows[["capture", "task_mi"]])]
    for channel in marked:
        _number(axes, rows.loc[channel], channel, taken, size=11, colour=MARK_COLOUR, fontweight="bold")
    for channel in peers:
        _number(axes, rows.loc[channel], channel, taken, size=8, colour="black")


def _number(
    axes: Any, row: pd.Series, channel: int, taken: list[Bbox], *, size: float, colour: str, **font: str
) -> None:
    """Write a channel's number beside its point, where it covers least of what is ``taken``, and take that place."""
    pixel = axes.figure.dpi / 72
    width, height = 0.65 * size * len(str(channel)), size
    x, y = axes.transData.transform((row.capture, row.task_mi)) / pixel
    spots: list[tuple[float, int, float, float, Bbox]] = []
    for right, up in itertools.product((9, -9 - width, -width / 2), (5, -5 - height, -height / 2)):
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
