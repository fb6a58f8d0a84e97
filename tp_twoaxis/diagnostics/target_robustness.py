"""Whether weak alignment depends on the task variable or on the partners that the target axis is measured with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tp_twoaxis.diagnostics.alignment import WEAK
from tp_twoaxis.diagnostics.axis_coordinates import (
    cell_correlation,
    local_axis,
    relative_depths,
    target_axis,
    task_cells,
)
from tp_twoaxis.diagnostics.cell_figures import BAND, matrix, panels, strips
from tp_twoaxis.diagnostics.channel_groups import group_channels, grouping_index, standardised
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, EvidenceInputs, Section
from tp_twoaxis.diagnostics.partner_rules import DEFAULT, partner_table
from tp_twoaxis.diagnostics.run_aggregates import best_estimate
from tp_twoaxis.statistics.targets import LABEL_FREE, LABELLED

# in the order of the paper's tables
TARGET_WORDS = {
    "margin": "true margin",
    "correct_logit": "correct logit",
    "negative_loss": "negative loss",
    "predicted_margin": "predicted margin",
    "predicted_logit": "predicted logit",
    "one_vs_rest": "label, one vs rest",
}
# pairs of rankings, the paper's correlation, and whether it calls them near-duplicates
PAIRS = (
    ("margin", "predicted_margin", "0.990", True),
    ("correct_logit", "predicted_logit", "0.994", True),
    ("margin", "correct_logit", "0.230", False),
    ("margin", "negative_loss", "0.137", False),
    ("margin", "one_vs_rest", "0.053", False),
)
LOST = "The paper's numbers are lost; the bound is ours."
DUPLICATE, DIFFERENT = 0.9, 0.5
DUPLICATES = " Training images are mostly classified rightly, and then the two variables are one."


def target_tables(inputs: EvidenceInputs) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure the target axis with every task variable, in every cell.

    Args:
        inputs: with statistics that hold task variables; without labels there are two.

    Returns:
        Two tables. A row for each cell and variable, columns ``layer``, ``depth``, ``target``, ``rho`` (Spearman, of
        capture I and task information M) and ``ari`` (of the groups on (z I, z R) with those on (z M, z X), k = 3); and
        a row for each cell and pair of variables, columns ``layer``, ``depth``, ``first``, ``second`` and ``rho``
        (Spearman, of M by the one and by the other).

    Raises:
        NotApplicableError: see :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.

    Example:
        >>> import torch
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = [(torch.randn(128, 3, 6, 6), torch.randint(8, (128,)))]
        >>> [len(table) for table in target_tables(EvidenceInputs(net, calibrate(net, images, progress=False), images))]
        [6, 15]
    """
    depths = relative_depths(inputs.cells())
    single: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for name in task_cells(inputs):
        layer, cell = inputs.statistics[name], {"layer": name, "depth": depths[name]}
        here = local_axis(layer)
        groups = group_channels(standardised(*here), seed=inputs.seed)
        axes = {key: target_axis(layer, key) for key in TARGET_WORDS if key in layer.columns}
        for key, task in axes.items():
            index = grouping_index(groups, group_channels(standardised(*task), seed=inputs.seed))
            rho = cell_correlation(here.capture, task.task_mi)
            single.append({**cell, "target": key, "rho": rho, "ari": index})
        for first, second in itertools.combinations(axes, 2):
            rho = cell_correlation(axes[first].task_mi, axes[second].task_mi)
            pairs.append({**cell, "first": first, "second": second, "rho": rho})
    return pd.DataFrame(single), pd.DataFrame(pairs)


def target_matrix(pairs: pd.DataFrame) -> pd.DataFrame:
    """Average the agreement of the variables' rankings over cells (table 5).

    Args:
        pairs: the second of :func:`target_tables`.

    Returns:
        Square, symmetric, diagonal 1; rows and columns named as the variables.

    Example:
        >>> pairs = pd.DataFrame({"first": ["margin"], "second": ["correct_logit"], "rho": [0.2]})
        >>> target_matrix(pairs).values.tolist()
        [[1.0, 0.2], [0.2, 1.0]]
    """
    names = [key for key in TARGET_WORDS if key in set(pairs["first"]) | set(pairs.second)]
    square = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
    for (first, second), cells in pairs.groupby(["first", "second"]):
        square.loc[first, second] = square.loc[second, first] = cells.rho.mean()
    return square


def mean_tables(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Condense the section's tables over cells, as tables 4, 5 and 6 do.

    Args:
        tables: ``targets``, ``target_pairs`` and ``partners`` of :func:`target_choice_section`, of one network or of
            several below each other.

    Returns:
        ``target_means``, a row a task variable with mean ``rho`` and ``ari`` over so many ``cells``;
        ``target_matrix``; and ``partner_means``, a row a rule with mean ``rho``, ``rho_default`` and ``ari``.

    Example:
        >>> targets = pd.DataFrame({"target": ["margin"] * 2, "rho": [0.1, 0.3], "ari": 0.0})
        >>> pairs = pd.DataFrame({"first": ["margin"], "second": ["correct_logit"], "rho": [0.2]})
        >>> partners = pd.DataFrame({"partners": ["r2"], "rho": [0.1], "rho_default": [1.0], "ari": [0.0]})
        >>> found = mean_tables({"targets": targets, "target_pairs": pairs, "partners": partners})
        >>> found["target_means"].round(3).values.tolist()
        [['margin', 2, 0.2, 0.0]]
    """

    def means(table: pd.DataFrame, key: str, columns: list[str]) -> pd.DataFrame:
        groups = table.groupby(key, sort=False)
        return pd.concat([groups.size().rename("cells"), groups[columns].mean()], axis=1).reset_index()

    return {
        "target_means": means(tables["targets"], "target", ["rho", "ari"]),
        "target_matrix": target_matrix(tables["target_pairs"]).rename_axis("target").reset_index(),
        "partner_means": means(tables["partners"], "partners", ["rho", "rho_default", "ari"]),
    }


def target_claims(single: pd.DataFrame, pairs: pd.DataFrame) -> list[Claim]:
    """Judge tables 4 and 5.

    Args:
        single: the first of :func:`target_tables`, of one network or of several.
        pairs: the second.
    """
    estimates = {str(key): best_estimate(cells, "rho") for key, cells in single.groupby("target")}
    worst = max(estimates, key=lambda key: abs(estimates[key].value))
    claims = [
        Claim(
            "With none of the task variables does task information follow input capture.",
            "",
            estimates[worst],
            above=-WEAK,
            below=WEAK,
            note=f"Of the one farthest from 0, {TARGET_WORDS[worst]}. {LOST}",
        )
    ]
    for first, second, paper, alike in PAIRS:
        cells = pairs[(pairs["first"] == first) & (pairs.second == second)]
        if not len(cells):
            continue
        said = "almost alike" if alike else "differently"
        bounds = {"above": DUPLICATE} if alike else {"above": -DIFFERENT, "below": DIFFERENT}
        claims.append(
            Claim(
                f"Task information about {TARGET_WORDS[first]} and about {TARGET_WORDS[second]} rank channels {said}.",
                paper,
                best_estimate(cells, "rho"),
                note=f"The bound is ours.{DUPLICATES if alike else ''}",
                **bounds,
            )
        )
    return claims


def partner_claims(table: pd.DataFrame) -> list[Claim]:
    """Judge table 6.

    Args:
        table: of :func:`~tp_twoaxis.diagnostics.partner_rules.partner_table`, of one network or of several.
    """
    rows = {str(rule): cells for rule, cells in table.groupby("partners", sort=False)}
    coupled = max(rows, key=lambda rule: abs(float(rows[rule].rho.mean())))
    apart = min((rule for rule in rows if rule != DEFAULT), key=lambda rule: float(rows[rule].rho_default.mean()))
    return [
        Claim(
            "By no rule of partners does target excess follow input capture.",
            "",
            best_estimate(rows[coupled], "rho"),
            above=-WEAK,
            below=WEAK,
            note=f"Of the one farthest from 0, {coupled}. {LOST}",
        ),
        Claim(
            "All rules of partners rank channels by target excess alike.",
            "",
            best_estimate(rows[apart], "rho_default"),
            above=0.8,
            note=f"Of the one farthest from the default, {apart}. {LOST}",
        ),
    ]


def target_choice_section(inputs: EvidenceInputs) -> Section:
    """Assemble the evidence on task variables and partners of one network; intervals are over its layers.

    Raises:
        NotApplicableError: see :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.
    """
    single, pairs = target_tables(inputs)
    partners = partner_table(inputs)
    tables = {"targets": single, "target_pairs": pairs, "partners": partners}
    square = target_matrix(pairs)
    missing = [TARGET_WORDS[key] for key in (*LABELLED, *LABEL_FREE) if key not in square.index]
    without = f" Without labels there is nothing about {', '.join(missing)}." if missing else ""
    return Section(
        "target-choice",
        "Does it matter which task variable and which partners the target axis is measured with?",
        mean_tables(tables) | tables,
        target_claims(single, pairs) + partner_claims(partners),
        [
            Drawing(
                "target_choice",
                lambda: target_figure(single, partners),
                "Rank correlation of input capture with task information by each task variable (above), and with "
                f"target excess by each rule of partners (below); grey where it is weak (within {WEAK:g}, ours).",
            ),
            Drawing(
                "target_matrix",
                lambda: matrix_figure(square),
                "How alike the task variables rank a layer's channels by task information: rank correlation, mean of "
                "the layers.",
            ),
        ],
        follows="A score of the target axis depends on its task variable more than on its partners: say which was "
        "used. Weak alignment with the local axis does not hang on the choice where all rows lie around 0.",
        fails="Partners that are chosen by excess or joint information make the excess large by selection, so that "
        "its size cannot be compared between rules, only its ranking. In layers with hardly more channels than "
        "partners all rules choose the same. The pool of the random rule, twice the partners, is ours." + without,
    )


def target_figure(single: pd.DataFrame, partners: pd.DataFrame) -> Figure:
    """Draw every cell's correlation with the local axis, by variable and by rule.

    Args:
        single: the first of :func:`target_tables`.
        partners: of :func:`~tp_twoaxis.diagnostics.partner_rules.partner_table`.

    Example:
        >>> single = pd.DataFrame({"target": ["margin"], "rho": [0.1]})
        >>> len(target_figure(single, pd.DataFrame({"partners": [DEFAULT], "rho": [0.1]})).axes)
        2
    """
    figure, (above, below) = panels(2, 2.7)
    by_target = single.groupby("target").rho
    rows = {TARGET_WORDS[key]: by_target.get_group(key).tolist() for key in TARGET_WORDS if key in by_target.groups}
    strips(above, rows, label="rank correlation of capture with task information")
    by_rule = {str(rule): cells.tolist() for rule, cells in partners.groupby("partners", sort=False).rho}
    strips(below, by_rule, label="rank correlation of capture with excess")
    for axes in (above, below):
        axes.axvspan(-WEAK, WEAK, color=BAND, zorder=0)
        axes.set_xlim(-1.0, 1.0)
    return figure


def matrix_figure(square: pd.DataFrame) -> Figure:
    """Draw the agreement of the task variables.

    Args:
        square: of :func:`target_matrix`.

    Example:
        >>> names = ["margin", "correct_logit"]
        >>> len(matrix_figure(pd.DataFrame(np.eye(2), index=names, columns=names)).axes)
        1
    """
    figure, (axes,) = panels(1, 4.4)
    matrix(axes, square.to_numpy(), [TARGET_WORDS[str(key)] for key in square.index])
    return figure
