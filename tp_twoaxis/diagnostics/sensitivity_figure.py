"""Sensitivity drawn, a panel for each group while they are few, else a row of colours for each; and its files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from tp_twoaxis.diagnostics.cell_figures import shown_name
from tp_twoaxis.diagnostics.group_sensitivity import SensitivityReport
from tp_twoaxis.diagnostics.plots import write_figure
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance import DistortionCurve
from tp_twoaxis.importance.distortion_curves import interpolated
from tp_twoaxis.runtime.serialization import write_bytes

DPI = 120
MOST_PANELS = 24
# logarithms of less say nothing
LEAST = 1e-6
MEASURED, FLAT, PRICE_LINE = "#1f4e79", "#8a8a8a", "#d55e00"
DISTORTION = "distortion of the repaired logits (share of their variance)"
REMOVED = "share of the group's channels removed"


def sensitivity_figure(report: SensitivityReport) -> Figure:
    """Draw the curves of all groups.

    Args:
        report: of :func:`~tp_twoaxis.diagnostics.group_sensitivity.sensitivity`.

    Returns:
        A figure. Up to 24 groups have a panel each with common axes: points with their standard errors, the price as a
        dashed line, grey where the group is flat. More have a row each, with the distortion as a colour, and bars for
        the MACs that leave at the price.

    Example:
        >>> from tp_twoaxis.importance import DistortionCurves
        >>> curve = DistortionCurve("conv1", 8, (0, 4, 7), (0.0, 0.1, 0.5), (0.0, 0.01, 0.1), (0.0, 0.2, 0.35), 32)
        >>> sensitivity_figure(SensitivityReport(DistortionCurves([curve]))).axes[0].get_title(loc="left")
        'conv1'
    """
    return _panels(report) if len(report.curves) <= MOST_PANELS else _rows(report)


def _panels(report: SensitivityReport) -> Figure:
    count = len(report.curves)
    columns = min(count, 3 if count <= 9 else 4)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(2.5 * columns + 0.6, 4.5), max(2.0 * rows + 0.8, 3.6)), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel().tolist()
    summary = report.summary()
    for panel in panels[count:]:
        panel.remove()
    for panel, (name, curve), flat in zip(panels, report.curves.items(), summary.flat, strict=False):
        _draw_curve(panel, name, curve, report.price, flat=bool(flat))
        # sharing hides the numbers of a panel below which there is none
        panel.tick_params(labelbottom=panels.index(panel) + columns >= count)
    values = [value for curve in report.curves.values() for value in curve.distortion[1:]]
    low, high = min([report.price, *values]), max([report.price, *values])
    panels[0].set_ylim(max(low, LEAST) / 2, 2 * max(high, LEAST))
    panels[0].set_xlim(0.0, 1.0)
    panels[0].set_xticks([0.0, 0.5, 1.0], ["0", "0.5", "1"])
    figure.supxlabel(f"{REMOVED}; dashed: {report.price:g}", size=9)
    figure.supylabel("distortion of the repaired logits\n(share of their variance)", size=9)
    return figure


def _draw_curve(panel: Any, name: str, curve: DistortionCurve, price: float, *, flat: bool) -> None:
    share = np.asarray(curve.removed[1:]) / curve.size
    distortion = np.maximum(curve.distortion[1:], LEAST)
    errors = np.asarray(curve.standard_error[1:])
    panel.set_yscale("log")
    panel.axhline(price, color=PRICE_LINE, linewidth=0.8, linestyle="--")
    panel.errorbar(
        share,
        distortion,
        # a logarithm has no place for what reaches below nothing
        yerr=[np.minimum(errors, distortion - LEAST / 2), errors],
        color=FLAT if flat else MEASURED,
        marker="o",
        markersize=3,
        linewidth=1.2,
        elinewidth=0.8,
    )
    panel.set_title(shown_name(name, 24), loc="left", size=8, fontweight="bold", pad=16, parse_math=False)
    about = f"{curve.size} channels, {curve.macs_saved[-1]:.1%} of MACs" + ", flat" * flat
    panel.text(0.0, 1.02, about, transform=panel.transAxes, size=6.5, va="bottom", color="0.25")
    panel.tick_params(labelsize=7)
    panel.grid(True, color="0.92", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _rows(report: SensitivityReport) -> Figure:
    count, summary = len(report.curves), report.summary()
    figure = Figure(figsize=(7.5, 0.15 * count + 1.6), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 1], sharey=True)
    shares = np.linspace(0.0, 1.0, 41)
    middles = (shares[1:] + shares[:-1]) / 2
    heights = np.stack(
        [
            np.interp(middles * curve.size, np.arange(curve.removed[-1] + 1), interpolated(*_points(curve)))
            for curve in report.curves.values()
        ]
    )
    top = max(float(heights.max()), 10 * LEAST)
    norm = LogNorm(max(top / 1e5, LEAST), top, clip=True)
    mesh = left.pcolormesh(shares, np.arange(count + 1) - 0.5, heights, norm=norm, cmap="viridis")
    labels = [shown_name(name, 34) + " (flat)" * flat for name, flat in zip(summary.group, summary.flat, strict=True)]
    left.set_yticks(range(count), labels, fontsize=6.5, parse_math=False)
    left.set_xlabel(REMOVED, size=8)
    right.barh(range(count), 100 * summary.macs_freed, color=MEASURED, height=0.7)
    right.set_xlabel(f"MACs that leave\nat {report.price:g} (%)", size=8)
    right.spines[["top", "right"]].set_visible(False)
    for axes in (left, right):
        axes.tick_params(labelsize=7, axis="x", top=True, labeltop=True)  # tall figures are read from above
        axes.tick_params(axis="y", length=0)
    left.set_ylim(count - 0.5, -0.5)
    fraction = 0.3 / figure.get_figheight()
    bar = figure.colorbar(mesh, ax=[left, right], location="top", aspect=40, fraction=fraction, pad=fraction)
    bar.set_label(DISTORTION, size=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _points(curve: DistortionCurve) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return curve.removed, curve.distortion


def write_sensitivity(report: SensitivityReport, folder: str | Path) -> list[Path]:
    """Write a report to a folder.

    Args:
        report: of :func:`~tp_twoaxis.diagnostics.group_sensitivity.sensitivity`.
        folder: made if it does not exist, its parents are not; files of equal names are replaced.

    Returns:
        The files: ``groups.csv`` (a row a group), ``points.csv`` (a row a measured point), ``curves.json`` (for
        :meth:`DistortionCurves.load <tp_twoaxis.importance.DistortionCurves.load>`) and ``sensitivity.png``.

    Raises:
        TwoAxisError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise TwoAxisError(f"{folder}: could not be made a folder ({error}); choose another") from error
    tables = {"groups.csv": report.summary(), "points.csv": report.table()}
    for name, table in tables.items():
        write_bytes(folder / name, table.to_csv(index=False, lineterminator="\n").encode())
    report.curves.save(folder / "curves.json")
    figure = write_figure(sensitivity_figure(report), folder / "sensitivity.png")
    return [*(folder / name for name in tables), folder / "curves.json", figure]
