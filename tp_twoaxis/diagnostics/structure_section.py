"""Is the local axis more structured than the target axis? Communities of channels, and groups that overlap."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from tp_twoaxis.diagnostics.cell_figures import plain
from tp_twoaxis.diagnostics.channel_groups import NO_GROUP, local_groups
from tp_twoaxis.diagnostics.communities import community_table, overlap_graph
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, Estimate, EvidenceInputs, NotApplicableError, Section
from tp_twoaxis.diagnostics.group_overlap import overlap_table
from tp_twoaxis.diagnostics.layer_trends import best_trend
from tp_twoaxis.diagnostics.run_aggregates import best_estimate, best_share
from tp_twoaxis.scores.named_scores import capture
from tp_twoaxis.statistics.layer_statistics import LayerStatistics

DPI = 120
LOCAL, TARGET = "#0072b2", "#d55e00"
# "early" and "late" are thirds of the layers; ours, the paper says early and no more
EARLY = 1 / 3
SIGNIFICANT = 0.05


def structure_section(inputs: EvidenceInputs) -> Section:
    """Answer whether overlap makes communities of channels and target excess does not.

    Raises:
        NotApplicableError: there is no convolution or no target, or no layer has six channels that vary.

    Example:
        >>> from torch import nn
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
        >>> images = [(torch.randn(32, 3, 8, 8), torch.randint(3, (32,)))]
        >>> section = structure_section(EvidenceInputs(net, calibrate(net, images, progress=False), images))
        >>> list(section.tables), len(section.claims), len(section.drawings)
        (['communities', 'group_overlap'], 7, 3)
    """
    layers, stats = inputs.cells(), inputs.statistics
    if stats.target is None:
        raise NotApplicableError(
            "structure: expected statistics with a task variable, they are of the local axis alone; calibrate with a "
            "target such as margin"
        )
    groups = overlap_table(stats, layers, seed=inputs.seed)
    grouped = groups[groups.groups > 1].layer.tolist()
    if not grouped:
        raise NotApplicableError("structure: expected a convolution with six channels that vary, there is none")
    communities = community_table(stats, layers, seed=inputs.seed)
    tables = {"communities": communities, "group_overlap": groups}
    shown = dict.fromkeys((grouped[0], grouped[len(grouped) // 2], grouped[-1]))
    return Section(
        "structure",
        "Do channels of a layer form groups that share what they carry, and do such groups share the task?",
        tables,
        structure_claims(tables),
        [
            Drawing(
                "modularity",
                partial(modularity_figure, communities),
                "Modularity of the strongest tenth of the pairs by overlap (blue circles) and by target excess "
                "(orange squares), by depth. Dashed: the same weights dealt to pairs at random. A graph below its "
                "dashed line has hubs instead of groups.",
            ),
            Drawing(
                "group-overlap",
                partial(contrast_figure, groups),
                "Pairs within local groups over pairs between them, by depth: mean overlap (blue circles) and mean "
                "target excess (orange squares). Filled where permuted groups differ as much in less than 5 % of the "
                "cases. 1 means that groups make no difference.",
            ),
            Drawing(
                "overlap-matrices",
                partial(matrix_figure, [stats[name] for name in shown], inputs.seed),
                f"Overlap of every pair of channels of {', '.join(shown)}, channels ordered by local group "
                "(orange lines) and inside a group by capture. Darker is more.",
            ),
        ],
        follows="Groups of channels that overlap can lose members and keep their leader, which the spectral scores "
        "use. Pairs of high target excess form no groups, so that clustering on them finds little.",
        fails="A graph of few edges is modular by chance, and the excess graph is less so because few channels are in "
        "many of its edges: where overlap is no more modular than the dashed line, its lead shows these hubs, not "
        "groups. Local groups are made from each channel's mean overlap, so that a group of high ones has high pairs "
        "by construction. Intervals are over the layers of one network.",
    )


def modularity_figure(table: pd.DataFrame) -> Figure:
    """Draw both graphs' modularity by depth.

    Args:
        table: of :func:`~tp_twoaxis.diagnostics.communities.community_table`.

    Example:
        >>> row = {"depth": 0.0, "overlap_modularity": 0.5, "overlap_chance": 0.4,
        ...        "excess_modularity": 0.3, "excess_chance": 0.4}
        >>> modularity_figure(pd.DataFrame([row])).axes[0].get_ylabel()
        'modularity'
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for kind, colour, marker, label in (
        ("overlap", LOCAL, "o", "overlap R"),
        ("excess", TARGET, "s", "target excess"),
    ):
        axes.plot(table.depth, table[f"{kind}_modularity"], color=colour, marker=marker, markersize=4, label=label)
        chance = f"{label}, at random"
        axes.plot(table.depth, table[f"{kind}_chance"], color=colour, linewidth=0.9, linestyle="--", label=chance)
    axes.set_ylabel("modularity")
    _finish(figure, axes)
    return figure


def contrast_figure(table: pd.DataFrame) -> Figure:
    """Draw pairs within over pairs between local groups, by depth.

    Args:
        table: of :func:`~tp_twoaxis.diagnostics.group_overlap.overlap_table`.

    Example:
        >>> row = {"depth": 0.0, "overlap_ratio": 1.2, "overlap_p": 0.01, "excess_ratio": 1.0, "excess_p": 0.5}
        >>> contrast_figure(pd.DataFrame([row])).axes[0].get_ylabel()
        'within over between groups'
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.axhline(1.0, color="0.5", linewidth=0.9)
    for kind, colour, marker, label in (
        ("overlap", LOCAL, "o", "overlap R"),
        ("excess", TARGET, "s", "target excess"),
    ):
        ratio, beyond = table[f"{kind}_ratio"], table[f"{kind}_p"] < SIGNIFICANT
        axes.plot(table.depth, ratio, color=colour, linewidth=1.0, zorder=2)
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 6, "zorder": 3}
        axes.plot(table.depth[beyond], ratio[beyond], label=f"{label}, beyond chance", **style)
        axes.plot(
            table.depth[~beyond], ratio[~beyond], markerfacecolor="white", label=f"{label}, within chance", **style
        )
    axes.set_ylabel("within over between groups")
    _finish(figure, axes)
    return figure


def matrix_figure(layers: list[LayerStatistics], seed: int = 0) -> Figure:
    """Draw the overlap of all pairs of some layers, channels ordered by local group.

    Args:
        layers: with at least six varying channels each.
        seed: of the groups.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 6))
        >>> stats = calibrate(net, [torch.randn(64, 8)], target=None, progress=False)
        >>> len(matrix_figure([stats["1"]]).axes)
        2
    """
    figure = Figure(figsize=(6.4, 3.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    for axes, layer in zip(panels, layers, strict=True):
        groups = local_groups(layer, seed=seed)
        order = torch.from_numpy(np.lexsort((capture(layer).numpy(), groups.numpy())))
        order = order[groups[order] != NO_GROUP]
        matrix = overlap_graph(layer, order).numpy()
        # the few strongest pairs would leave all others alike
        top = float(np.quantile(matrix[~np.eye(len(matrix), dtype=bool)], 0.98))
        image = axes.imshow(matrix, cmap="Blues", vmin=0.0, vmax=top or 1.0, interpolation="nearest")
        for boundary in np.cumsum(np.bincount(groups[order].numpy()))[:-1]:
            axes.axhline(boundary - 0.5, color=TARGET, linewidth=1.2)
            axes.axvline(boundary - 0.5, color=TARGET, linewidth=1.2)
        axes.set_title(layer.name, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"{len(order)} channels", fontsize=8)
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.9, extend="max")
        bar.set_label("overlap (nats)", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.ax.locator_params(nbins=3)
    return figure


def structure_claims(tables: Mapping[str, pd.DataFrame]) -> list[Claim]:
    """Judge the structure of both axes.

    Args:
        tables: ``communities`` and ``group_overlap`` of :func:`structure_section`; of several networks below each
            other, with the columns ``network`` and ``seed``, intervals are over models where a backbone has three,
            otherwise over layers.
    """
    return [*_community_claims(tables["communities"]), *_group_claims(tables["group_overlap"])]


def _community_claims(table: pd.DataFrame) -> list[Claim]:
    known = table.dropna(subset=["gap"])
    known = known.assign(lead=known.overlap_modularity - known.overlap_chance)
    ahead = float((known.gap > 0).mean())
    return [
        Claim(
            "The overlap graph is more modular than the excess graph (mean difference of modularity)",
            "above 0 at every depth",
            best_estimate(known, "gap"),
            above=0.0,
        ),
        Claim(
            "The overlap graph is more modular than its own weights dealt at random (mean difference)",
            "",
            best_estimate(known, "lead"),
            above=0.0,
            note="A check of ours: where it is not, the lead over the excess graph shows no groups.",
        ),
        Claim(
            "It is more modular than the excess graph in every layer (share of layers)",
            "all",
            Estimate(ahead, ahead, ahead),
            above=0.999,
            note="Counted, without an interval: one layer contradicts it.",
        ),
        Claim(
            "The difference of the two graphs shrinks with depth (rank correlation with depth)",
            "shrinks",
            best_trend(known, "gap"),
            below=0.0,
            note="Bootstrap over layers. Deeper layers are wider, and small graphs are more modular by chance.",
        ),
    ]


def _group_claims(table: pd.DataFrame) -> list[Claim]:
    known = table[table.groups > 1]
    known = known.assign(null=known.excess_p > SIGNIFICANT)
    early = known[known.depth <= EARLY]
    return [
        Claim(
            "In early layers channels of one local group overlap more than others (within over between)",
            "1.14-1.25",
            best_estimate(early, "overlap_ratio"),
            above=1.0,
            note="Mean over the first third of the layers (ours).",
        ),
        Claim(
            "That falls with depth (rank correlation with depth)",
            "falls",
            best_trend(known, "overlap_ratio"),
            below=0.0,
            note="Bootstrap over layers.",
        ),
        Claim(
            "Target excess does not tell local groups apart (share of layers with p > 0.05, 200 permutations)",
            "near its null",
            best_share(known, "null"),
            above=0.75,
            note="Wilson's interval; of unrelated groupings 95 % would have p > 0.05. The bound is ours.",
        ),
    ]


def _finish(figure: Figure, axes: Any) -> None:
    axes.set_xlabel("relative depth (0 first, 1 last convolution)")
    plain(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
