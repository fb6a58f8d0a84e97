"""How axes propagate, drawn: the matrix of source and reader quantities, and its blocks by depth."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from tp_twoaxis.diagnostics.channel_quantities import QUANTITIES, WORDS
from tp_twoaxis.diagnostics.plots import DPI

# colours that differ for every kind of colour vision (Okabe and Ito 2008)
BLOCKS = {
    "local": ("within the local axis", "#0072b2", "o-"),
    "target": ("within the target axis", "#d55e00", "s-"),
    "cross": ("across", "0.4", "x:"),
}


def draw_propagation(routing: pd.DataFrame, contrast: pd.DataFrame) -> Figure:
    """Draw the mean matrix above its blocks by depth.

    Args:
        routing: of :func:`~tp_twoaxis.diagnostics.propagation.routing_table`.
        contrast: of :func:`~tp_twoaxis.diagnostics.propagation.axis_contrast`.
    """
    figure = Figure(figsize=(5.2, 8.0), dpi=DPI, layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1.2, 1.0])
    symbols = [symbol for symbol in QUANTITIES if symbol in set(routing.quantity)]
    mean = routing.groupby(["source_quantity", "quantity"]).rho.mean().unstack().loc[symbols, symbols]
    image = top.imshow(mean, cmap="RdBu_r", vmin=-0.5, vmax=0.5)
    for row, a in enumerate(symbols):
        for column, b in enumerate(symbols):
            value = round(float(mean.loc[a, b]), 2) + 0.0  # no -0.00
            top.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if abs(value) > 0.3 else "k")
    labels = [WORDS[symbol].replace(" ", "\n") for symbol in symbols]
    top.set_xticks(range(len(symbols)), labels)
    top.set_yticks(range(len(symbols)), labels)
    top.set_xlabel("of the channel that reads")
    top.set_ylabel("of its sources, by kernel norms")
    figure.colorbar(image, ax=top, label="rank correlation, mean over layers", extend="both")
    ordered = contrast.sort_values("depth")
    for name, (words, colour, style) in BLOCKS.items():
        bottom.plot(ordered.depth, ordered[name], style, color=colour, label=words, markersize=4, linewidth=1.2)
    bottom.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
    bottom.set_xlabel("depth (0 first, 1 last convolution)")
    bottom.set_ylabel("mean rank correlation")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
