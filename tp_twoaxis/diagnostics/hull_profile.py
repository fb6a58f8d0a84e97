"""Replaceability hulls by depth: how many peers do a channel's work in early layers, and how many in late ones.

Paper: section 2.4, figures 3B and 3C, appendix K.2. Its text lost epsilon and whether it is a factor or a difference,
so that both are shown at 0.05 and 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from tp_twoaxis.diagnostics.axis_coordinates import relative_depths
from tp_twoaxis.diagnostics.cell_figures import plain
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, Estimate, EvidenceInputs, NotApplicableError, Section
from tp_twoaxis.diagnostics.layer_trends import best_trend
from tp_twoaxis.diagnostics.run_aggregates import RUN, model_bootstrap, share_estimate, with_runs
from tp_twoaxis.scores.hull import REFERENCES, TOLERANCES, Hulls, full_explanation, select_peers
from tp_twoaxis.statistics.store import CalibrationStatistics

EPSILONS = (0.05, 0.1)
# what the claims are judged by: the comparison that appendix A names for profiles, and this package's own epsilon
JUDGED: dict[str, Any] = {"compared_with": "peers", "tolerance": "factor", "epsilon": 0.1}
COLUMNS = {
    "layer": "name in the model",
    "depth": "0 first, 1 last convolution",
    "channels": "that vary",
    "compared_with": "peers: what all peers explain; pool: what the 32 most correlated ones do",
    "tolerance": "how epsilon counts: factor, E(H) >= (1 - epsilon) E; difference, E(H) >= E - epsilon",
    "epsilon": "what may be missing",
    "empty": "share of channels that need no peer, as none or all explain nearly nothing",
    "singleton": "share that one peer replaces",
    "saturated": "share whose hull has 10 peers, the cap, and may lack more",
    "mean_size": "peers a hull",
}
DPI = 120
# what the figure shows of a table: threshold, label, style
LINES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (
        {"compared_with": "peers", "tolerance": tolerance, "epsilon": epsilon},
        f"all peers, {tolerance} {epsilon:g}",
        {"color": colour, "linestyle": style},
    )
    for tolerance, colour in (("factor", "#0072b2"), ("difference", "#d55e00"))
    for epsilon, style in ((0.1, "-"), (0.05, "--"))
]
LINES.append((JUDGED | {"compared_with": "pool"}, "pool of 32, factor 0.1", {"color": "black", "linestyle": ":"}))


def hull_table(stats: CalibrationStatistics, layers: list[str]) -> pd.DataFrame:
    """Summarise each layer's hulls by every threshold that the paper's text allows.

    Peers are selected once a layer, greedily from the 32 most correlated ones
    (:func:`~tp_twoaxis.scores.hull.select_peers`); thresholds only say where to stop.

    Args:
        stats: of a calibration; the local axis is enough.
        layers: in the model's order.

    Returns:
        Eight rows a layer with the columns :data:`COLUMNS`: what is compared with, by how epsilon counts, by epsilon.
        Shares and means are of the channels that vary; NaN where none does.

    Raises:
        TwoAxisError: no such layer.

    Example:
        >>> import torch
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> table = hull_table(calibrate(net, [torch.randn(64, 8)], target=None, progress=False), ["1"])
        >>> len(table), sorted(set(table.tolerance))
        (8, ['difference', 'factor'])
    """
    depths = relative_depths(layers)
    rows: list[dict[str, Any]] = []
    for name in layers:
        layer = stats[name]
        active, correlation = layer.variance > 0, layer.correlation
        selected = select_peers(correlation, active=active)
        # the pool's own solution is in its path, and rounding must not put it above that of all
        whole = full_explanation(correlation, active=active).maximum(selected.pool_explanation)
        for reference in REFERENCES:
            explained = whole if reference == "peers" else selected.pool_explanation
            for tolerance in TOLERANCES:
                for epsilon in EPSILONS:
                    hulls = selected.hulls(explained, epsilon=epsilon, tolerance=tolerance)
                    keys = {"compared_with": reference, "tolerance": tolerance, "epsilon": epsilon}
                    rows.append({"layer": name, "depth": depths[name]} | keys | _summary(hulls, active))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def hull_section(inputs: EvidenceInputs) -> Section:
    """Answer whether hulls grow with depth, from single peers to many.

    Raises:
        NotApplicableError: there is no convolution, or a layer has no more rows than channels.

    Example:
        >>> import torch
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
        >>> images = [(torch.randn(32, 3, 8, 8), torch.randint(2, (32,)))]
        >>> stats = calibrate(net, images, target=None, progress=False)
        >>> [claim.paper for claim in hull_section(EvidenceInputs(net, stats, images)).claims]
        ['28-48 %', '67-78 %', 'rises monotonically']
    """
    layers, stats = inputs.cells(), inputs.statistics
    if short := [name for name in layers if stats[name].num_rows <= stats[name].num_channels]:
        raise NotApplicableError(
            f"hulls: expected more rows than channels, layer {short[0]} has {stats[short[0]].num_rows} for "
            f"{stats[short[0]].num_channels}, so that its peers explain everything; calibrate on more images"
        )
    table = hull_table(stats, layers)
    return Section(
        "hulls",
        "How many peers does it take to replace a channel, and does that grow with depth?",
        {"hulls": table},
        hull_claims(table),
        [
            Drawing(
                "hulls",
                partial(hull_figure, table),
                "Share of channels that one peer replaces, share whose hull reaches the cap of ten peers, and mean "
                "number of peers, by depth. Blue: epsilon is a factor, orange: a difference; solid 0.1, dashed 0.05. "
                "Dotted black: compared with the pool of 32 instead of all peers, epsilon a factor of 0.1.",
            )
        ],
        follows="Where single peers replace channels, pruning duplicates costs little; where hulls are saturated, a "
        "channel's work can only be spread over many, so that a repair has to refit many weights at once.",
        fails="A hull's size depends on epsilon, on how it counts and on what it is compared with, as the lines show; "
        "the paper's text does not say which. Hulls are linear and within one layer. Layers with fewer than eleven "
        "channels cannot be saturated. A large hull is no sign that a channel can be removed.",
    )


def hull_figure(table: pd.DataFrame) -> Figure:
    """Draw hulls by depth.

    Args:
        table: of :func:`hull_table`.

    Example:
        >>> row = {"layer": "a", "depth": 0.0, "singleton": 0.5, "saturated": 0.1, "mean_size": 3.0}
        >>> len(hull_figure(pd.DataFrame([row | JUDGED])).axes)
        3
    """
    figure = Figure(figsize=(6.4, 7.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    labels = (
        "one peer is enough\n(share of channels)",
        "ten peers, the cap\n(share of channels)",
        "peers a hull\n(mean)",
    )
    for axes, column, label in zip(panels, ("singleton", "saturated", "mean_size"), labels, strict=True):
        for threshold, name, style in LINES:
            own = _rows_of(table, threshold)
            axes.plot(own.depth, own[column], marker="o", markersize=3, label=name, **style)
        axes.set_ylabel(label)
        plain(axes)
        axes.set_ylim(bottom=0.0, top=None if column == "mean_size" else 1.02)
    panels[-1].set_xlabel("relative depth (0 first, 1 last convolution)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _summary(hulls: Hulls, active: Tensor) -> dict[str, Any]:
    size = hulls.size[active].double()
    return {
        "channels": len(size),
        "empty": float((size == 0).double().mean()),
        "singleton": float(hulls.singleton[active].double().mean()),
        "saturated": float(hulls.saturated[active].double().mean()),
        "mean_size": float(size.mean()),
    }


def _rows_of(table: pd.DataFrame, threshold: Mapping[str, Any]) -> pd.DataFrame:
    same = [table[column] == value for column, value in threshold.items()]
    return table[np.logical_and.reduce(same)].reset_index(drop=True)


def hull_claims(table: pd.DataFrame) -> list[Claim]:
    """Judge hulls by depth.

    Args:
        table: of :func:`hull_table`; of several networks below each other, with the columns ``network`` and ``seed``,
            intervals are over models where a backbone has three, otherwise over the channels or layers of all.
    """
    judged = with_runs(_rows_of(table, JUDGED))
    runs = [part.sort_values("depth", kind="stable") for _, part in judged.groupby(RUN, sort=False)]
    first, last = (pd.concat([run.iloc[[end]] for run in runs]) for end in (0, -1))

    def share(rows: pd.DataFrame, column: str) -> Estimate:
        models = model_bootstrap(rows, column)
        hits = (rows[column] * rows.channels).fillna(0.0).sum()
        return share_estimate(round(hits), int(rows.channels.sum())) if math.isnan(models.lower) else models

    def named(rows: pd.DataFrame) -> str:
        return ", ".join(dict.fromkeys(rows.layer))

    return [
        Claim(
            "In the first layer many channels have one peer that replaces them",
            "28-48 %",
            share(first, "singleton"),
            above=0.28,
            note=f"{named(first)}; compared with all peers, epsilon a factor of 0.1 (ours). Wilson's interval over "
            "channels, of fewer than three trainings; the bound is the lower end of the paper's range over networks.",
        ),
        Claim(
            "In the last layer most channels need ten peers or more",
            "67-78 %",
            share(last, "saturated"),
            above=0.67,
            note=f"{named(last)}; as above; the bound is the lower end of the paper's range.",
        ),
        Claim(
            "Hulls grow with depth (rank correlation of mean size with depth)",
            "rises monotonically",
            best_trend(judged, "mean_size"),
            above=0.0,
            note="Bootstrap over layers. Deeper layers are wider too, and a layer of few channels has few peers.",
        ),
    ]
