"""Areas under accuracy retention, criteria of a family together: what local statistics add to a norm, or penalties."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from tp_twoaxis.benchmark.curves import shown_network
from tp_twoaxis.benchmark.families import MAGNITUDES, axis_of
from tp_twoaxis.diagnostics.cell_figures import shown_name
from tp_twoaxis.importance.criterion import parse_expression

DPI = 170
ROW = 0.24  # inches
SHORT = 30  # characters of a name that a figure as wide as a phone has room for
MOST = 110.0  # % of the dense accuracy that a pruned network may show
# from the top; colours that differ for every kind of colour vision, shapes too
FAMILIES = {
    "local": ("local", "#0072b2", "o"),
    "mixed": ("norm or logits, and local", "#009e73", "D"),
    "magnitude": ("magnitude", "#000000", "s"),
    "target": ("target", "#d55e00", "^"),
    "both": ("both axes, hybrids", "#cc79a7", "v"),
    "baseline": ("other baselines", "#777777", "P"),
}


def family_of(criterion: str) -> str:
    """Name the family that a criterion is drawn in.

    Example:
        >>> family_of("composite-local(overlap=1)"), family_of("l2"), family_of("taylor")
        ('local', 'magnitude', 'baseline')
    """
    return "magnitude" if parse_expression(criterion)[0] in MAGNITUDES else axis_of(criterion)


def family_figure(areas: pd.DataFrame, trials: pd.DataFrame, network: str) -> Figure:
    """Draw one network's areas with their intervals over seeds, by family, the best of each family first.

    Args:
        areas: the table of :func:`~tp_twoaxis.benchmark.tables.auc_table`.
        trials: of :func:`~tp_twoaxis.benchmark.tables.trial_table`, which know each method's criterion.
        network: which network.

    Example:
        >>> areas = pd.DataFrame({"network": "net", "method": ["l2", "capture"], "auc": [0.7, 0.8],
        ...                       "low": float("nan"), "high": float("nan")})
        >>> trials = pd.DataFrame({"method": ["l2", "capture"], "criterion": ["l2", "capture"], "treatment": "none"})
        >>> [label.get_text() for label in family_figure(areas, trials, "net").axes[0].get_yticklabels()]
        ['capture', 'l2']
    """
    criteria = dict(zip(trials.method, trials.criterion, strict=True))
    own = areas[areas.network == network]
    treatments = trials[trials.method.isin(own.method)].treatment.unique()
    name = shown_name(shown_network(network), 40)
    if len(treatments) == 1:  # what all have in common stands once
        own = own.assign(label=[str(criteria[method]) for method in own.method])
        name = f"{name}, {treatments[0]}"
    else:
        own = own.assign(label=own.method)
    own = own.assign(family=[family_of(str(criteria[method])) for method in own.method])
    own = own.assign(place=[list(FAMILIES).index(family) for family in own.family])
    own = own.sort_values(["place", "auc"], ascending=[True, False]).reset_index(drop=True)
    figure = Figure(
        figsize=(4.5 if own.label.str.len().max() <= SHORT else 5.6, ROW * len(own) + 1.7),
        dpi=DPI,
        layout="constrained",
    )
    axes = figure.subplots()
    for row, entry in own.iterrows():
        _, colour, marker = FAMILIES[entry.family]
        if not math.isnan(entry.low):
            axes.plot([100 * entry.low, 100 * entry.high], [row, row], color=colour, linewidth=1.2)
        axes.plot(100 * entry.auc, row, color=colour, marker=marker, markersize=5, linestyle="none")
    axes.set_yticks(range(len(own)), [shown_name(label, 42) for label in own.label], fontsize=8, parse_math=False)
    axes.set_ylim(len(own) - 0.5, -0.5)
    axes.set_xlabel("accuracy retained (%),\nmean over common MACs", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, 0.0), min(high, MOST))  # intervals of few seeds reach beyond what can be
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold", parse_math=False)
    axes.grid(True, axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)
        for family, (label, colour, marker) in FAMILIES.items()
        if family in set(own.family)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure
