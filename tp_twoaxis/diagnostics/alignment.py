"""Whether channels that capture much of the input say much about the task, and fall into the same groups (C1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from tp_twoaxis.diagnostics.axis_coordinates import (
    cell_correlation,
    local_axis,
    relative_depths,
    target_axis,
    task_cells,
)
from tp_twoaxis.diagnostics.cell_figures import BAND, against_depth, panels
from tp_twoaxis.diagnostics.channel_groups import GROUPS, agreement, group_channels, silhouette, standardised
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, EvidenceInputs, Section
from tp_twoaxis.diagnostics.run_aggregates import aggregate_runs, best_estimate, best_share

GROUPS_SHOWN = (2, 3, 4, 5)
WEAK = 0.2
CHANCE = 0.1
MOST_CELLS = 0.9
NOISY = 2.0


def alignment_table(inputs: EvidenceInputs, groups: Iterable[int] = GROUPS_SHOWN) -> pd.DataFrame:
    """Compare both axes in every cell.

    Args:
        inputs: with statistics that hold a task variable.
        groups: numbers of groups k that k-means is asked for.

    Returns:
        A row for each cell and k with the columns

        - ``layer``, ``depth``, ``channels`` (that vary), ``rho`` (Spearman, of capture I and task information M),
        - ``mi_over_chance``: mean M over the 1 / (2 n) nats that channels which have nothing to do with the task show
          on average over n images; ours,
        - ``groups`` (k), ``ari`` (adjusted Rand index of the groups on (z I, z R) with those on (z M, z X)),
          ``null_mean``, ``null_upper`` (95 % quantile) and ``p`` of 200 permutations of the channels,
        - ``silhouette_local`` and ``silhouette_target``.

        NaN where there are too few channels: three for the correlation, six for groups.

    Raises:
        NotApplicableError: see :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.

    Example:
        >>> import torch
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = [(torch.randn(128, 3, 6, 6), torch.randint(8, (128,)))]
        >>> table = alignment_table(EvidenceInputs(net, calibrate(net, images, progress=False), images))
        >>> table[["layer", "channels", "groups"]].values.tolist()
        [['0', 8, 2], ['0', 8, 3], ['0', 8, 4], ['0', 8, 5]]
    """
    depths = relative_depths(inputs.cells())
    numbers = list(groups)
    rows: list[dict[str, Any]] = []
    for name in task_cells(inputs):
        here, task = local_axis(inputs.statistics[name]), target_axis(inputs.statistics[name])
        both = {"local": standardised(*here), "target": standardised(*task)}
        cell = {
            "layer": name,
            "depth": depths[name],
            "channels": len(here.capture),
            "rho": cell_correlation(here.capture, task.task_mi),
            "mi_over_chance": 2.0 * inputs.statistics.num_images * float(task.task_mi.mean()),
        }
        for k in numbers:
            labels = {axis: group_channels(features, k, seed=inputs.seed) for axis, features in both.items()}
            found = agreement(labels["local"], labels["target"], seed=inputs.seed)
            rows.append(
                {
                    **cell,
                    "groups": k,
                    "ari": found.ari,
                    "null_mean": found.null_mean,
                    "null_upper": found.null_upper,
                    "p": found.p,
                    "silhouette_local": silhouette(both["local"], labels["local"]),
                    "silhouette_target": silhouette(both["target"], labels["target"]),
                }
            )
    return pd.DataFrame(rows)


def groups_table(table: pd.DataFrame) -> pd.DataFrame:
    """Condense an alignment table by the number of groups.

    Args:
        table: of :func:`alignment_table`, of one network or of several below each other.

    Returns:
        A row for each k: how many cells were grouped, mean index and that of its null, the shares of cells that do not
        differ from the null (``p > 0.05``) and that agree by less than 0.1, and mean silhouettes.

    Example:
        >>> row = {"groups": 3, "ari": 0.05, "null_mean": 0.0, "p": 0.2, "silhouette_local": 0.3,
        ...        "silhouette_target": 0.4}
        >>> groups_table(pd.DataFrame([row]))[["cells", "share_p_above_005", "share_ari_below_01"]].values.tolist()
        [[1.0, 1.0, 1.0]]
    """
    rows = []
    for k, cells in table.dropna(subset="ari").groupby("groups"):
        rows.append(
            {
                "groups": k,
                "cells": len(cells),
                "ari": cells.ari.mean(),
                "null_mean": cells.null_mean.mean(),
                "share_p_above_005": (cells.p > 0.05).mean(),
                "share_ari_below_01": (cells.ari < CHANCE).mean(),
                "silhouette_local": cells.silhouette_local.mean(),
                "silhouette_target": cells.silhouette_target.mean(),
            }
        )
    return pd.DataFrame(rows)


def alignment_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Condense an alignment table, by three groups, over cells and, where there are several, models and backbones.

    Args:
        table: of :func:`alignment_table`; of several networks below each other, with the columns ``network`` (the
            backbone) and ``seed``.

    Returns:
        Rows of :func:`~tp_twoaxis.diagnostics.run_aggregates.aggregate_runs` (table 3).

    Example:
        >>> cells = {"groups": [3, 3], "rho": [0.0, 0.5], "ari": 0.0, "silhouette_local": 0.4, "silhouette_target": 0.5}
        >>> alignment_summary(pd.DataFrame(cells))["mean"].tolist()
        [0.25, 0.0, 0.4, 0.5]
    """
    return aggregate_runs(table[table.groups == GROUPS], ["rho", "ari", "silhouette_local", "silhouette_target"])


def alignment_claims(table: pd.DataFrame) -> list[Claim]:
    """Judge weak alignment (H1, C1), by three groups.

    Args:
        table: of :func:`alignment_table`; of several networks below each other, with the columns ``network`` and
            ``seed``, intervals are over models where a backbone has three, otherwise over cells.

    Example:
        >>> cells = pd.DataFrame({"groups": 3, "rho": [0.1, 0.0, -0.1], "ari": [0.0, 0.01, 0.03], "p": [0.5, 0.2, 0.9]})
        >>> [claim.verdict for claim in alignment_claims(cells)]
        ['HOLDS', 'HOLDS', 'UNDECIDED', 'UNDECIDED']
    """
    cells = table[table.groups == GROUPS]
    grouped = cells.dropna(subset="ari")
    grouped = grouped.assign(by_chance=grouped.p > 0.05, apart=grouped.ari < CHANCE)
    ours = "The paper's number is lost; the bound is ours."
    either = "One of the two is the paper's 95 %; its text does not say which. The bound of 90 % is ours."
    return [
        Claim(
            "Within layers, input capture and task information rank channels almost independently (mean rho(I, M)).",
            "",
            best_estimate(cells, "rho"),
            above=-WEAK,
            below=WEAK,
            note=ours,
        ),
        Claim(
            "Groups by the local axis are not those by the target axis (mean adjusted Rand index).",
            "",
            best_estimate(cells, "ari"),
            above=-CHANCE,
            below=CHANCE,
            note=ours,
        ),
        Claim(
            "In most layers the groups agree no better than chance (share of cells with p > 0.05).",
            "0.95",
            best_share(grouped, "by_chance"),
            above=MOST_CELLS,
            note=either,
        ),
        Claim(
            "In most layers the groups hardly agree (share of cells with an adjusted Rand index below 0.1).",
            "0.95",
            best_share(grouped, "apart"),
            above=MOST_CELLS,
            note=either,
        ),
    ]


def alignment_section(inputs: EvidenceInputs) -> Section:
    """Assemble the evidence on the alignment of the axes of one network; intervals are over its layers.

    Raises:
        NotApplicableError: see :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.
    """
    table = alignment_table(inputs)
    cells = table[table.groups == GROUPS]
    missing = len(inputs.cells()) - len(cells)
    noisy = int((cells.mi_over_chance < NOISY).sum())
    noise = (
        f" In {noisy} of {len(cells)} layers mean task information is less than {NOISY:g} times what unrelated "
        f"channels show with {inputs.statistics.num_images:,} images: there its ranks are mostly noise, which no "
        "coordinate could be aligned with."
    )
    omitted = f" {missing} layers have more channels than there are images and are left out." if missing else ""
    return Section(
        "alignment",
        "Do channels that capture much of the input also say much about the task?",
        {
            "alignment": table,
            "alignment_summary": alignment_summary(table),
            "alignment_groups": groups_table(table),
        },
        alignment_claims(table),
        [
            Drawing(
                "alignment",
                lambda: alignment_figure(table),
                "Above: rank correlation of input capture with task information in each convolution, grey where it is "
                f"weak (within {WEAK:g}, a bound of ours). Below: agreement of the channels' groups by the local axis "
                "with those by the target axis (adjusted Rand index, three groups: 1 equal, 0 as by chance); lines "
                "reach to what 95 % of random permutations stay under.",
            )
        ],
        follows="Where the correlation is weak, a score of one axis orders a layer's channels almost as if it knew "
        "nothing of the other: what is removed depends on which axis is chosen.",
        fails="Both are Gaussian proxies of information, which see straight-line relations alone. "
        "Intervals are over the layers of one network and do not say what another training would give. A group index "
        "near 0 is also what two arbitrary groupings of points without clusters give: see the silhouettes."
        + (noise if noisy else "")
        + omitted,
    )


def alignment_figure(table: pd.DataFrame) -> Figure:
    """Draw correlation and agreement of every cell against depth.

    Args:
        table: of :func:`alignment_table`.

    Example:
        >>> cells = pd.DataFrame({"depth": [0.0, 1.0], "groups": 3, "rho": [0.1, 0.0], "ari": 0.02, "null_upper": 0.1})
        >>> len(alignment_figure(cells).axes)
        2
    """
    cells = table[table.groups == GROUPS]
    figure, (above, below) = panels(2, 2.7)
    above.axhspan(-WEAK, WEAK, color=BAND, zorder=0)
    above.axhline(0.0, color="0.5", linewidth=0.8)
    against_depth(above, cells, {"rho": "capture with task information"})
    above.set_ylim(-1.0, 1.0)
    above.set_ylabel("rank correlation")
    below.axhline(0.0, color="0.5", linewidth=0.8)
    below.vlines(cells.depth, 0.0, cells.null_upper, color="0.7", linewidth=2.0, label="95 % of permutations")
    against_depth(below, cells, {"ari": "local with target groups"})
    below.set_ylabel("adjusted Rand index")
    return figure
