"""The report's figures as inline SVG that takes its colours from the page, light or dark."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from tp_twoaxis.demo.methods import LOCAL, MAGNITUDE, METHODS
from tp_twoaxis.demo.result import Group, Measurement, Summary, method_of

if TYPE_CHECKING:
    from tp_twoaxis.demo.run import Demo

# colours that stand for the page's own; to_svg() puts the page's in their place
INK, GRID = "#010203", "#c8c9ca"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tp-twoaxis",
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
}
DODGE = 0.0045  # share of MACs between neighbouring methods


def curves(demo: Demo, rows: list[Summary]) -> Figure:
    """Draw accuracy over kept MACs, one line a method, one dot a network."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 5.0), layout="constrained")
        axes = figure.add_subplot()
        dense = 100 * demo.dense_accuracy
        axes.axhline(dense, color=INK, linestyle=(0, (5, 4)), linewidth=1, label=f"dense, {dense:.1f} %")
        for place, method in enumerate(METHODS):
            own = [row for row in rows if row.method == method.name]
            shift = (place - (len(METHODS) - 1) / 2) * DODGE
            x = [100 * (row.target + shift) for row in own]
            y = [100 * row.accuracy for row in own]
            errors = [100 * row.standard_error for row in own]
            axes.plot([100, *x], [dense, *y], color=method.light, linewidth=1.4, alpha=0.55)
            axes.errorbar(
                x, y, errors, color=method.light, marker=method.marker, markersize=6.5, linestyle="none",
                elinewidth=1.4, label=method.label,
            )  # fmt: skip
            single = [run for run in demo.runs if run.method == method.name]
            axes.scatter(
                [100 * (run.target + shift) for run in single],
                [100 * run.accuracy for run in single],
                s=7, color=method.light, alpha=0.55, linewidths=0, zorder=1.5,
            )  # fmt: skip
        axes.set_xlabel("MACs kept (% of the dense network)")
        axes.set_ylabel("test accuracy (%)")
        axes.set_xticks([100, *(100 * target for target in demo.settings.targets)])
        figure.legend(loc="outside right upper")
    return figure


def two_axes(demo: Demo) -> Figure:
    """Draw every channel of the first network on both axes, one panel a group."""
    columns = 3
    lines = -(-len(demo.groups) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.75 * lines + 0.5), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel, group in zip(panels, in_order(demo.groups), strict=False):
            x, y = np.array(group.capture), np.array(group.task)
            gone = np.isin(np.arange(len(x)), group.removed)
            kept_dots = panel.scatter(x[~gone], y[~gone], s=34, color=method_of(LOCAL).light, linewidths=0, alpha=0.85)
            gone_dots = panel.scatter(x[gone], y[gone], s=34, color=INK, marker="x", linewidths=1.3)
            panel.set_title(title_of(group), loc="left", fontsize=10.5)
            panel.set_title(f"ρ = {spearmanr(x, y).statistic:+.2f}", loc="right", fontsize=10.5)
            panel.margins(0.09)
            panel.locator_params(nbins=4)
        for panel in panels[len(demo.groups) :]:
            panel.remove()
        figure.supxlabel("local axis: input capture (nats)", fontsize=11)
        figure.supylabel("task axis: information about the margin (nats)", fontsize=11)
        figure.legend(
            [kept_dots, gone_dots], ["kept by local capture", "removed by it"], loc="outside upper right", ncols=2
        )
    return figure


def kept_channels(demo: Demo, target: float) -> Figure:
    """Draw how many channels of each group two plans for the first network keep."""
    seed = demo.dense[0].seed
    plans = [_plan(demo.runs, name, seed, target) for name in (LOCAL, MAGNITUDE)]
    groups = in_order(demo.groups)
    names = [group.name for group in groups]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.5 * len(names) + 1.3), layout="constrained")
        axes = figure.add_subplot()
        height = 0.36
        places = np.arange(len(names))
        sizes = [plans[0].kept[name][1] for name in names]
        axes.barh(places, sizes, 2.25 * height, color=GRID, alpha=0.45, label="dense")
        for plan, offset in zip(plans, (-height / 2, height / 2), strict=True):
            method = method_of(plan.method)
            counts = [plan.kept[name][0] for name in names]
            bars = axes.barh(places + offset, counts, height, color=method.light, label=method.label)
            axes.bar_label(bars, padding=3, fontsize=9.5)
        axes.set_yticks(places, [title_of(group) for group in groups])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("channels kept")
        figure.legend(loc="outside upper right", ncols=3)
    return figure


def to_svg(figure: Figure, description: str) -> str:
    """Turn a figure into an SVG element for a page that defines ``--ink``, ``--grid`` and a colour a method.

    Args:
        figure: drawn with the colours above.
        description: for readers who do not see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        # no date and no creator: equal numbers give equal files
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # ids are equal in all figures but mean different shapes; `xlink:href` and `url()` refer to them
    prefix = re.sub(r"\W+", "-", description[:24]).strip("-").lower()
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for colour, name in [(INK, "ink"), (GRID, "grid"), *((method.light, method.name) for method in METHODS)]:
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)


def in_order(groups: list[Group]) -> list[Group]:
    """Sort groups by stage, each stage's residual stream first: a row of panels is then a stage."""
    return sorted(groups, key=lambda group: (_stage(group.name), not group.stream, group.name))


def title_of(group: Group) -> str:
    """Name a group for people: by its root layer, or by the stage whose stream it is.

    Example:
        >>> [title_of(Group(name, "down" in name, [], [], [])) for name in ("layer2.1.conv1", "layer3.0.downsample.0")]
        ['layer2.1.conv1', 'layer3 stream']
    """
    return f"layer{_stage(group.name)} stream" if group.stream else group.name


def _stage(name: str) -> int:
    # the stem writes the first stage's stream
    return int(name[5]) if name.startswith("layer") else 1


def _plan(runs: list[Measurement], method: str, seed: int, target: float) -> Measurement:
    return next(run for run in runs if (run.method, run.seed, run.target) == (method, seed, target))


def axes_agreement(demo: Demo) -> list[float]:
    """Rank correlation of the two axes in each group."""
    return [float(spearmanr(group.capture, group.task).statistic) for group in demo.groups]
