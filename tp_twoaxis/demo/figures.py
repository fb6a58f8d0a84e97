"""The demo's two pictures, legible at the width of a phone, in light and in dark."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# inches: at the width of a phone, letters are as large as the page's small text
SIZE = (4.4, 4.4)
DPI = 200
# seen on white and on black, and apart from each other by every kind of colour vision (Okabe and Ito)
COLOURS = ("#0a9e78", "#d9822b", "#3a8fc9", "#c06a9e")
MARKERS = "os^D"
STYLES = ("-", "--")


def accuracy_figure(summary: pd.DataFrame, dense: float) -> Figure:
    """Draw accuracy over the multiply-adds kept: a colour a criterion, a style of line a repair.

    Args:
        summary: columns ``criterion, repair, achieved, accuracy``; at most four criteria and two repairs.
        dense: accuracy before pruning, in [0, 1].

    Example:
        >>> table = pd.DataFrame({"criterion": ["l2", "l2"], "repair": "bn", "achieved": [0.5, 0.25],
        ...                       "accuracy": [0.9, 0.5]})
        >>> accuracy_figure(table, 0.99).axes[0].get_xlabel()
        'multiply-adds kept, %'
    """
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    criteria, repairs = list(summary.criterion.unique()), list(summary.repair.unique())
    axes.axhline(100 * dense, color="0.5", linewidth=1.5, linestyle=":")
    for (criterion, repair), rows in summary.groupby(["criterion", "repair"], sort=False):
        number = criteria.index(criterion)
        axes.plot(
            100 * rows.achieved,
            100 * rows.accuracy,
            STYLES[repairs.index(repair)],
            color=COLOURS[number],
            marker=MARKERS[number],
            markersize=5,
        )
    axes.set_xlabel("multiply-adds kept, %")
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(top=102)
    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    text = mpl.rcParams["text.color"]
    named = [
        Line2D([], [], color=COLOURS[number], marker=MARKERS[number], markersize=5, label=criterion)
        for number, criterion in enumerate(criteria)
    ]
    styled = [
        Line2D([], [], color=text, linestyle=STYLES[number], label=repair) for number, repair in enumerate(repairs)
    ]
    dotted = Line2D([], [], color="0.5", linewidth=1.5, linestyle=":", label="dense")
    figure.legend(handles=[*named, *styled, dotted], loc="outside lower center", ncols=2)
    return figure


def axes_figure(channels: pd.DataFrame) -> Figure:
    """Draw every channel's rank within its layer on both axes, and whether it is removed.

    Args:
        channels: columns ``layer, capture, task_mi, removed``.

    Example:
        >>> table = pd.DataFrame({"layer": "conv", "capture": [0.1, 0.9], "task_mi": [0.3, 0.2],
        ...                       "removed": [True, False]})
        >>> axes_figure(table).axes[0].get_xlabel()
        'rank in its layer on the local axis (capture)'
    """
    ranks = channels.groupby("layer", sort=False)[["capture", "task_mi"]].rank(pct=True)
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for removed, label, marker, colour in ((False, "kept", "o", COLOURS[0]), (True, "removed", "x", COLOURS[1])):
        shown = ranks[channels.removed == removed]
        axes.scatter(shown.capture, shown.task_mi, s=16, marker=marker, color=colour, label=label, linewidths=1)
    axes.set_xlabel("rank in its layer on the local axis (capture)")
    axes.set_ylabel("rank in its layer on the task axis (task-mi)")
    axes.set_aspect("equal")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
