"""Accuracy over MACs, drawn with matplotlib."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tp_twoaxis.diagnostics.cell_figures import plain, shown_name

MARKERS = "osD^vPX<>*ph8d"
DPI = 170
# inches; one panel is as wide as a phone shows without scrolling
PANEL, LEGEND_LINE = 3.4, 0.17
MOST_TICKS = 8


def shown_network(name: str) -> str:
    """Write a network's name for people.

    Example:
        >>> shown_network("resnet20_conv_shortcut")
        'resnet20 conv shortcut'
    """
    return name.replace("_", " ")


def curves_figure(summary: pd.DataFrame, network: str) -> Figure:
    """Draw one network: a panel for each treatment, a line for each criterion, mean and standard deviation.

    A line is broken where fewer seeds were measured than elsewhere on the network; the mean of those is a hollow
    marker. The legend has the criterion of highest mean accuracy first, those with broken lines last.

    Args:
        summary: of :func:`~tp_twoaxis.benchmark.tables.summary_table`.
        network: which of its networks.

    Example:
        >>> summary = pd.DataFrame({"network": "net", "criterion": ["l1", "l1"], "treatment": "bn", "seeds": 1,
        ...     "keep": [0.5, 0.7], "achieved": [0.5, 0.7], "accuracy": [0.6, 0.8], "std": float("nan"), "dense": 0.9})
        >>> figure = curves_figure(summary, "net")
        >>> [axes.get_title() for axes in figure.axes]
        ['bn']
    """
    mine = summary[summary.network == network]
    treatments, criteria = list(mine.treatment.unique()), list(mine.criterion.unique())
    shares = sorted(mine.keep.unique())
    columns = 1 if len(treatments) < 3 else 2
    rows = -(-len(treatments) // columns)
    blocks = min(2 * columns, len(criteria))  # columns of the legend
    high = PANEL * rows + LEGEND_LINE * -(-len(criteria) // blocks) + 0.7
    figure = Figure(figsize=(4.5 * columns, high), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel().tolist()
    for panel in panels[len(treatments) :]:
        panel.remove()
    for panel in panels[max(0, len(treatments) - columns) : len(treatments)]:
        panel.tick_params(labelbottom=True)  # shared axes number the last row alone, also where it has a gap
        panel.set_xlabel("MACs kept (%)", size=9)
    for panel in panels[: len(treatments) : columns]:
        panel.set_ylabel("accuracy (%), dashed: dense", size=9)
    colours = mpl.colormaps["tab20" if len(criteria) > 10 else "tab10"]
    lines = {}
    for panel, treatment in zip(panels, treatments, strict=False):
        for number, criterion in enumerate(criteria):
            own = mine[(mine.treatment == treatment) & (mine.criterion == criterion)]
            if own.empty:
                continue
            own = own.set_index("keep").reindex(shares)  # not a number where nothing was measured, which breaks a line
            whole, some = own.seeds == mine.seeds.max(), own[own.seeds < mine.seeds.max()]
            marker, colour = MARKERS[number % len(MARKERS)], colours(number % colours.N)
            panel.plot(100 * some.achieved, 100 * some.accuracy, marker, color=colour, mfc="white", markersize=4)
            lines[criterion] = panel.errorbar(
                (100 * own.achieved).where(whole),
                (100 * own.accuracy).where(whole),
                yerr=100 * own["std"].fillna(0.0),
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
            )
        panel.axhline(100 * mine.dense.mean(), color="0.5", linewidth=0.8, linestyle="--")
        panel.set_title(str(treatment), size=10)
        panel.yaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        if len(shares) <= MOST_TICKS:
            panel.set_xticks([100 * share for share in shares], [f"{100 * share:.3g}" for share in shares])
        plain(panel)
    figure.suptitle(shown_name(shown_network(network), 60), size=11, fontweight="bold", parse_math=False)
    whole_means = mine[mine.seeds == mine.seeds.max()].groupby("criterion").accuracy.agg(["size", "mean"])
    places = whole_means.reindex(criteria).fillna(0.0)
    best_first = sorted(lines, key=lambda criterion: tuple(-places.loc[criterion]))
    handles = [lines[criterion] for criterion in best_first]
    figure.legend(handles, best_first, loc="outside lower center", ncols=blocks, fontsize=8, frameon=False)
    return figure
