"""Whether target excess depends on which partners a channel is paired with (table 6)."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd

from tp_twoaxis.diagnostics.axis_coordinates import (
    cell_correlation,
    local_axis,
    relative_depths,
    target_axis,
    task_cells,
)
from tp_twoaxis.diagnostics.channel_groups import group_channels, grouping_index, standardised
from tp_twoaxis.diagnostics.evidence import EvidenceInputs
from tp_twoaxis.scores.target import PartnerRule


class Partners(NamedTuple):
    """How partners are chosen, and how many."""

    rule: PartnerRule
    number: int


PARTNERS: dict[str, Partners] = {
    "top task information, 5": Partners("task-mi", 5),
    "top task information, 10": Partners("task-mi", 10),
    "top task information, 20": Partners("task-mi", 20),
    "top joint information, 10": Partners("joint-mi", 10),
    "top excess, 10": Partners("excess", 10),
    "random of the top 20, 10": Partners("random", 10),
}
DEFAULT = "top task information, 10"


def partner_table(inputs: EvidenceInputs) -> pd.DataFrame:
    """Compare six choices of partners in every cell.

    Of a layer with no more channels than partners all peers are partners, and the rules give the same.

    Args:
        inputs: with statistics that hold a task variable.

    Returns:
        A row for each cell and rule with the columns ``layer``, ``depth``, ``partners`` (the rule), ``rho`` (Spearman,
        of capture I and excess X), ``rho_default`` (of X and that by the default rule) and ``ari`` (of the groups on
        (z I, z R) with those on (z M, z X), k = 3).

    Raises:
        NotApplicableError: see :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.

    Example:
        >>> import torch
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = [(torch.randn(128, 3, 6, 6), torch.randint(8, (128,)))]
        >>> table = partner_table(EvidenceInputs(net, calibrate(net, images, progress=False), images))
        >>> len(table), float(table.rho_default[1])
        (6, 1.0)
    """
    depths = relative_depths(inputs.cells())
    rows: list[dict[str, Any]] = []
    for name in task_cells(inputs):
        layer = inputs.statistics[name]
        here = local_axis(layer)
        groups = group_channels(standardised(*here), seed=inputs.seed)
        axes = {
            label: target_axis(layer, partners=chosen.number, rule=chosen.rule, seed=inputs.seed)
            for label, chosen in PARTNERS.items()
        }
        for label, task in axes.items():
            rows.append(
                {
                    "layer": name,
                    "depth": depths[name],
                    "partners": label,
                    "rho": cell_correlation(here.capture, task.excess),
                    "rho_default": cell_correlation(task.excess, axes[DEFAULT].excess),
                    "ari": grouping_index(groups, group_channels(standardised(*task), seed=inputs.seed)),
                }
            )
    return pd.DataFrame(rows)
