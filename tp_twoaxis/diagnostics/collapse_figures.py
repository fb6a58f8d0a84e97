"""Target redundancy drawn: ranks against each other, rank correlations, parts of information and triplets by depth."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from tp_twoaxis.diagnostics.cell_figures import COLOURS, DEPTH, MARKERS, against_depth, panels

PARTS = {"shared": "shared", "unique": "unique to the channel", "synergy": "synergy"}


def redundancy_figure(channels: pd.DataFrame) -> Figure:
    """Draw target redundancy against task information and against peer overlap, by rank inside a layer.

    Args:
        channels: of :func:`~tp_twoaxis.diagnostics.collapse.redundancy_table`, of one network.

    Example:
        >>> table = pd.DataFrame({"layer": "conv1", "task_mi": [0.1, 0.2], "overlap": [0.3, 0.1],
        ...                       "target_redundancy": [0.1, 0.1]})
        >>> len(redundancy_figure(table).axes)
        2
    """
    ranks = channels.groupby("layer")[["task_mi", "overlap", "target_redundancy"]].rank(pct=True)
    figure, axes = panels(2, 2.8)
    for panel, (column, label) in zip(
        axes, {"task_mi": "task information", "overlap": "peer overlap"}.items(), strict=True
    ):
        panel.plot(
            ranks[column], ranks.target_redundancy, "o", color=COLOURS[0], alpha=0.45, markersize=3, markeredgewidth=0
        )
        panel.set_xlabel(f"{label}, rank in its layer (1 highest)")
        panel.set_ylabel("target redundancy, rank")
    return figure


def correlations_figure(broja: pd.DataFrame, ksg: pd.DataFrame) -> Figure:
    """Draw rank correlations of what is estimated without a distribution with both axes.

    Args:
        broja: of :func:`~tp_twoaxis.diagnostics.broja.broja_layers`.
        ksg: of :func:`~tp_twoaxis.diagnostics.ksg.ksg_table`, of the same layers.

    Example:
        >>> broja = pd.DataFrame({"layer": ["a"], "depth": [0.0], "rho_shared_task": [0.8], "rho_shared_overlap": [0.1],
        ...                       "rho_irrecoverable_capture": [0.0]})
        >>> len(correlations_figure(broja, pd.DataFrame({"layer": ["a"], "rho": [0.5]})).axes)
        2
    """
    figure, (upper, lower) = panels(2, 3.2)
    against_depth(upper, broja, {"rho_shared_task": "with task information", "rho_shared_overlap": "with peer overlap"})
    upper.set_ylabel("rank correlation of\nshared information")
    cells = broja.merge(ksg[["layer", "rho"]], on="layer")
    against_depth(lower, cells, {"rho_irrecoverable_capture": "irrecoverable, capture", "rho": "neighbours, Gaussian"})
    lower.set_ylabel("rank correlation")
    for axes in (upper, lower):
        axes.axhline(0.0, color="0.5", linewidth=0.8)
    return figure


def parts_figure(layers: pd.DataFrame) -> Figure:
    """Draw the parts of a channel's and its peer's information by depth, and how shared compares with synergy.

    Args:
        layers: of :func:`~tp_twoaxis.diagnostics.broja.broja_layers`.

    Example:
        >>> parts = {name: [0.1, 0.2] for name in ("shared", "unique", "synergy")}
        >>> shuffled = {f"shuffled_{name}": [0.01, 0.01] for name in parts}
        >>> ratios = {"shared_over_synergy": [1.0, 1.0], "corrected_ratio": [1.0, 1.0]}
        >>> len(parts_figure(pd.DataFrame({"depth": [0.0, 1.0], **parts, **shuffled, **ratios})).axes)
        2
    """
    figure, (upper, lower) = panels(2, 3.2)
    for number, (column, label) in enumerate(PARTS.items()):
        marker, colour = MARKERS[number], COLOURS[number]
        upper.plot(layers.depth, layers[column], f"{marker}-", color=colour, markersize=4.5, linewidth=0.8, label=label)
        shuffled = layers[f"shuffled_{column}"]
        upper.plot(layers.depth, shuffled, f"{marker}:", color=colour, markersize=4.5, markerfacecolor="white")
    upper.plot([], [], ":", color="0.3", label="open: target shuffled")
    upper.set_yscale("symlog", linthresh=1e-3)
    upper.set_xlabel(DEPTH)
    upper.set_ylabel("mean of a layer (nats)")
    upper.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, fontsize=8, frameon=False)
    ratios = {"shared_over_synergy": "as estimated", "corrected_ratio": "less the shuffled"}
    against_depth(lower, layers, ratios, mean=False)
    lower.set_yscale("log")
    lower.set_ylabel("shared over synergy")
    return figure


def triplets_figure(triplets: pd.DataFrame) -> Figure:
    """Draw the excesses of triplets and of pairs by depth, and the one over the other.

    Args:
        triplets: of :func:`~tp_twoaxis.diagnostics.triplets.triplet_table`.

    Example:
        >>> excesses = {"pair_excess": [0.1, 0.2], "triplet_excess": [0.1, 0.1], "chance": [0.001, 0.001]}
        >>> len(triplets_figure(pd.DataFrame({"depth": [0.0, 1.0], "ratio": [0.4, 0.6], **excesses})).axes)
        2
    """
    figure, (upper, lower) = panels(2, 2.8)
    against_depth(upper, triplets, {"ratio": "a layer"})
    upper.set_ylabel("triplet excess\nover pair excess")
    upper.set_ylim(bottom=0.0)
    excesses = {"pair_excess": "pairs", "triplet_excess": "triplets"}
    against_depth(lower, triplets, excesses, mean=False)
    lower.plot(triplets.depth, triplets.chance, color="0.3", linestyle=":", label="a channel that knows nothing")
    lower.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, fontsize=8, frameon=False)
    lower.set_yscale("log")
    lower.set_ylabel("mean excess (nats)")
    return figure
