"""Scatter plots of a layer's channels: what they capture locally against what they say about the task."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.files import write_bytes

CAPTURE = "local capture $I_k$ (nats)"
TASK = "task information $M_k$ (nats)"
HULL = "hull explanation $E_k$ (share of variance)"
OVERVIEW = "overview.png"
DPI = 120
CONSTANT_COLOUR = "#d62728"


def plot_layer(table: pd.DataFrame) -> Figure:
    """Draw one layer.

    Args:
        table: the rows of one layer from :func:`~tp_twoaxis.channel_table.channel_table`.

    Returns:
        A figure: x capture, y task information, colour hull explanation from 0 (nobody replaces the channel)
        to 1 (a few peers do). Constant channels are crosses, dashed lines the medians. Channels at the edges
        are numbered.

    Raises:
        TwoAxisError: the table is empty or has no target axis.

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
    _number_extremes(axes, table)
    # medians cut the plane in four: top left holds what a local score alone would remove
    axes.axvline(table.capture.median(), color="0.6", linewidth=0.8, linestyle="--", zorder=1)
    axes.axhline(table.task_mi.median(), color="0.6", linewidth=0.8, linestyle="--", zorder=1)
    return figure


def plot_overview(table: pd.DataFrame) -> Figure:
    """Draw all layers as small multiples with one colour scale; each has its own axes' ranges.

    Args:
        table: from :func:`~tp_twoaxis.channel_table.channel_table`.

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
        table: from :func:`~tp_twoaxis.channel_table.channel_table`.
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
    paths = [_write(overview, folder / OVERVIEW)]
    parts = [(str(name), part) for name, part in table.groupby("layer", sort=False)]
    digits = max(2, len(str(len(parts))))
    for number, (name, part) in enumerate(parts, start=1):
        # a model's own names may hold anything but dots
        safe = re.sub(r"[^\w.-]", "_", name) or "model"
        paths.append(_write(plot_layer(part), folder / f"{number:0{digits}}_{safe}.png"))
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
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
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


def _write(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
    return path
