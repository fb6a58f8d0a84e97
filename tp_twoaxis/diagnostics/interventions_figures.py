"""Figures of removed channels: what their damage goes with, and what peers give back of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tp_twoaxis.diagnostics.cell_figures import COLOURS as PALETTE
from tp_twoaxis.diagnostics.cell_figures import plain
from tp_twoaxis.diagnostics.lesion_damage import SCORES
from tp_twoaxis.diagnostics.peer_recovery import DAMAGES, MATCHED

DPI = 120
WIDTH = 5.4
SHOWN_SHARES = (-1.0, 1.3)  # ratios of small numbers go far beyond
COLOURS = PALETTE[:3]
PAPER = "#bbbbbb"
EXPLANATION, TASK = "peers' explanation $E_8$", "task information $M$"
LABELS = {
    "norm": "weight norm",
    "capture": "capture $I$",
    "overlap": "overlap $R$",
    "hull_size": "hull size $|H|$",
    "compact_support": "compact support $K$",
    "compact_local": "$z K - z I$",
    "task_mi": TASK,
    "peer_explanation": EXPLANATION,
}
# what the paper's table 16 and text give
PAPER_PAIRS = {"overlap": 0.553, "hull_size": 0.474}
PAPER_MATCHED = {
    "peer_explanation": ((0.077, 0.183), (0.152, 0.282), (0.167, 0.347)),
    "capture": ((-0.060, 0.038), (-0.057, 0.068), (-0.084, 0.084)),
    "task_mi": ((-0.013, 0.088), (-0.064, 0.057), (-0.131, 0.035)),
}
PAPER_WINS = (0.537, 0.665)


def correlations_figure(correlations: pd.DataFrame) -> Figure:
    """Draw the rank correlations of scores and damage; a point a cell.

    Args:
        correlations: from :func:`~tp_twoaxis.diagnostics.lesion_damage.damage_correlations`.

    Example:
        >>> table = pd.DataFrame({"depth": [0.0, 1.0], **dict.fromkeys(SCORES, 0.5)})
        >>> len(correlations_figure(table).axes)
        2
    """
    figure, axes = _figure(3.6)
    beside = np.linspace(-0.2, 0.2, len(correlations)) if len(correlations) > 1 else 0.0  # so that points stay apart
    for place, score in enumerate(SCORES):
        values = correlations[score]
        points = axes.scatter(
            values,
            np.full(len(values), place) + beside,
            c=correlations.depth,
            cmap="viridis",
            vmin=0.0,
            vmax=1.0,
            s=36,
            zorder=3,
        )
        axes.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color="black", linewidth=2, zorder=2)
    _rows(axes, [LABELS[score] for score in SCORES])
    axes.axvline(0.0, color="0.5", linewidth=0.8)
    axes.set_xlim(-1.05, 1.05)
    axes.set_xlabel("rank correlation with the damage of removal")
    bar = figure.colorbar(points, ax=axes)
    bar.set_label("depth: 0 first, 1 last convolution")
    return figure


def pairs_figure(pairs: pd.DataFrame, matched: pd.DataFrame) -> Figure:
    r"""Draw how often the more replaceable of two channels costs less, or is given back more.

    Args:
        pairs: from :func:`~tp_twoaxis.diagnostics.lesion_damage.pooled_pairs`.
        matched: from :func:`~tp_twoaxis.diagnostics.peer_recovery.matched_recovery_table`.

    Example:
        >>> pairs = pd.DataFrame({"property": ["overlap"], "pairs": 9, "win_rate": 0.6, "lower": 0.3, "upper": 0.8})
        >>> matched = pd.DataFrame({"rule": ["largest 52%"], "bins": 15, "win_rate": 0.6, "win_rate_lower": 0.4,
        ...                         "win_rate_upper": 0.8})
        >>> [label.get_text() for label in pairs_figure(pairs, matched).axes[0].get_yticklabels()][0]
        'overlap $R$\n(9 pairs)'
    """
    figure, axes = _figure(3.2)
    labels = []
    for place, row in enumerate(pairs.itertuples()):
        labels.append(f"{LABELS[row.property]}\n({row.pairs} pairs)")
        _interval(axes, place, row.win_rate, row.lower, row.upper, COLOURS[0])
        if row.property in PAPER_PAIRS:
            axes.plot(PAPER_PAIRS[row.property], place, "D", color="0.45", markerfacecolor="none", markersize=7)
    first = matched[matched.rule.str.startswith("largest")].iloc[0]
    labels.append(f"{EXPLANATION}\n({first.bins} bins of $M$)")
    axes.barh(len(pairs), PAPER_WINS[1] - PAPER_WINS[0], left=PAPER_WINS[0], height=0.5, color=PAPER, zorder=1)
    _interval(axes, len(pairs), first.win_rate, first.win_rate_lower, first.win_rate_upper, COLOURS[1])
    _rows(axes, labels)
    axes.axvline(0.5, color="0.5", linewidth=0.8)
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("share won; 0.5: chance; grey: the paper")
    return figure


def recovery_figure(channels: pd.DataFrame) -> Figure:
    """Draw what peers give back against what they explain; a point a channel.

    Args:
        channels: from :func:`~tp_twoaxis.diagnostics.lesion_probe.lesion_probe`.

    Example:
        >>> table = pd.DataFrame({"constant": False, "depth": [0.0, 1.0], "damage": 0.1, "peer_damage": [0.02, 0.09],
        ...                       "peer_explanation": [0.9, 0.2]})
        >>> recovery_figure(table).axes[0].get_title(loc="left")
        '2 channels'
    """
    shown = channels[~channels.constant & (channels.damage > DAMAGES[0])]
    share = 1.0 - shown.peer_damage / shown.damage
    lowest, highest = SHOWN_SHARES
    figure, axes = _figure(4.2)
    colour = {"cmap": "viridis", "vmin": 0.0, "vmax": 1.0, "s": 26, "edgecolors": "black", "linewidths": 0.3}
    for mark, part in (("o", share.between(lowest, highest)), ("v", share < lowest), ("^", share > highest)):
        points = axes.scatter(
            shown.peer_explanation[part],
            share[part].clip(lowest, highest),
            c=shown.depth[part],
            marker=mark,
            clip_on=False,
            zorder=3,
            **colour,
        )
    beyond = int((~share.between(lowest, highest)).sum())
    axes.set_title(
        f"{len(shown)} channels" + (f", {beyond} beyond the edges (triangles)" if beyond else ""), loc="left"
    )
    for level in (0.0, 1.0):
        axes.axhline(level, color="0.5", linewidth=0.8, zorder=1)
    axes.set_xlim(0.0, 1.0)
    axes.set_ylim(lowest, highest)
    axes.set_xlabel(f"{EXPLANATION} (share of variance)")
    axes.set_ylabel("share of the damage given back")
    bar = figure.colorbar(points, ax=axes)
    bar.set_label("depth: 0 first, 1 last convolution")
    return figure


def matched_figure(matched: pd.DataFrame) -> Figure:
    """Draw what the recovered share goes with in bins of task information, beside the paper's intervals.

    Args:
        matched: from :func:`~tp_twoaxis.diagnostics.peer_recovery.matched_recovery_table`.

    Example:
        >>> matched = pd.DataFrame({"rule": ["largest 52%", "largest 39%", "largest 23%"], "channels": [9, 7, 4],
        ...                         **{f"{name}{end}": 0.1 for name in MATCHED for end in ("", "_lower", "_upper")}})
        >>> len(matched_figure(matched).axes[0].get_yticks())
        3
    """
    shown = matched[matched.rule.str.startswith("largest")]
    figure, axes = _figure(3.8)
    for place, name in enumerate(MATCHED):
        for step, (row, colour) in enumerate(zip(shown.to_dict("records"), COLOURS, strict=True)):
            y = place + 0.26 * (step - 1)
            left, right = PAPER_MATCHED[name][step]
            axes.barh(y, right - left, left=left, height=0.2, color=PAPER, zorder=1)
            label = f"{row['rule']} of damages ({row['channels']} channels)" if place == 0 else None
            _interval(axes, y, row[name], row[f"{name}_lower"], row[f"{name}_upper"], colour, label)
    _rows(axes, [LABELS[name] for name in MATCHED])
    axes.axvline(0.0, color="0.5", linewidth=0.8)
    axes.set_xlabel("correlation with the share given back; grey: the paper")
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    return figure


def regression_figure(summary: pd.DataFrame) -> Figure:
    """Draw how much of the damage growing sets of scores predict.

    Args:
        summary: from :func:`~tp_twoaxis.diagnostics.damage_regression.regression_summary`.

    Example:
        >>> summary = pd.DataFrame({"predictors": ["ln norm", "ln norm + I"], "fitted": [0.1, 0.3],
        ...                         "held_out": [0.0, 0.2], "lower": [-0.1, 0.1], "upper": [0.1, 0.3]})
        >>> [label.get_text() for label in regression_figure(summary).axes[0].get_xticklabels()]
        ['ln norm', '+ I']
    """
    figure, axes = _figure(3.6)
    places = np.arange(len(summary))
    axes.plot(places, summary.fitted, "o--", color=COLOURS[1], markerfacecolor="white", label="where it was fitted")
    error = np.stack([summary.held_out - summary.lower, summary.upper - summary.held_out])
    axes.errorbar(
        places,
        summary.held_out,
        yerr=np.nan_to_num(error),
        fmt="o-",
        color=COLOURS[0],
        capsize=3,
        label="in layers left out",
    )
    names = [text.split(" + ")[-1] for text in summary.predictors]
    axes.set_xticks(places, [name if place == 0 else f"+ {name}" for place, name in enumerate(names)])
    axes.axhline(0.0, color="0.5", linewidth=0.8)
    axes.set_ylabel("share of the damage's variance, $R^2$")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _figure(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    plain(axes)
    return figure, axes


def _rows(axes: Any, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def _interval(
    axes: Any, place: float, value: float, lower: float, upper: float, colour: str, label: str | None = None
) -> None:
    if not math.isnan(lower):
        axes.plot([lower, upper], [place, place], color=colour, linewidth=1.6, zorder=2)
    axes.plot(value, place, "o", color=colour, markersize=6, zorder=3, label=label)
