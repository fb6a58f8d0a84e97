"""Whether permuted labels change the target axis alone, and whether input powers are exact (C3, C4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from tp_twoaxis.diagnostics.axis_coordinates import local_axis, relative_depths, target_axis, task_cells
from tp_twoaxis.diagnostics.cell_figures import against_depth, panels
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, EvidenceInputs, NotApplicableError, Section
from tp_twoaxis.diagnostics.exact_power import EXACT_IMAGES, LARGEST_EXACT, exact_power_table
from tp_twoaxis.diagnostics.run_aggregates import best_estimate
from tp_twoaxis.runtime.batches import read_batch
from tp_twoaxis.runtime.inputs import CallSignature, Inputs
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.statistics.calibration import calibrate

DROPPED = 0.5


def label_permutation_table(inputs: EvidenceInputs) -> pd.DataFrame:
    """Calibrate on labels as they are and on permuted ones, with everything else the same (C3).

    Args:
        inputs: with labelled images.

    Returns:
        A row for each cell with the columns ``layer``, ``depth``, ``task_mi`` and ``task_mi_permuted`` (means over
        channels of M about the true margin, nats), ``task_mi_chance`` (1 / (2 n) nats, what unrelated channels show on
        average over n images), ``ratio`` (of the second to the first), ``local_difference`` (the largest of I and R
        over channels) and ``local_equal`` (1.0 where both are equal to the bit, else 0.0).

    Raises:
        NotApplicableError: there are no labels; see also
            :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = [(torch.randn(128, 3, 6, 6), torch.randint(8, (128,)))]
        >>> inputs = EvidenceInputs(net, calibrate(net, images, progress=False), images, progress=False)
        >>> label_permutation_table(inputs)[["layer", "local_equal"]].values.tolist()
        [['0', 1.0]]
    """
    cells, depths = task_cells(inputs), relative_depths(inputs.cells())
    call = CallSignature.of(unwrap(inputs.model))
    batches = [read_batch(batch, number, call=call) for number, batch in enumerate(inputs.calibration)]
    known = [labels for _, labels in batches if labels is not None]
    if len(known) < len(batches):
        raise NotApplicableError("the images have no labels; there is nothing to permute")
    together = torch.cat(known)
    shuffled = together[torch.randperm(len(together), generator=torch.Generator().manual_seed(0))]
    # both are calibrated here: statistics of another batch size or device differ in the last bits
    true, permuted = (
        calibrate(inputs.model, _labelled(batches, labels), layers=cells, max_images=None, progress=inputs.progress)
        for labels in (together, shuffled)
    )
    rows: list[dict[str, Any]] = []
    for name in cells:
        first, second = local_axis(true[name]), local_axis(permuted[name])
        real, chance = (float(target_axis(layer, "margin").task_mi.mean()) for layer in (true[name], permuted[name]))
        difference = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
        rows.append(
            {
                "layer": name,
                "depth": depths[name],
                "task_mi": real,
                "task_mi_permuted": chance,
                "task_mi_chance": 0.5 / true.num_images,
                "ratio": chance / real if real > 0 else math.nan,
                "local_difference": difference,
                "local_equal": float(all(torch.equal(a, b) for a, b in zip(first, second, strict=True))),
            }
        )
    return pd.DataFrame(rows)


def _labelled(batches: list[tuple[Inputs, Tensor | None]], labels: Tensor) -> list[tuple[Inputs, Tensor]]:
    parts = torch.split(labels, [len(inputs) for inputs, _ in batches])
    return [(inputs, own) for (inputs, _), own in zip(batches, parts, strict=True)]


def control_claims(permuted: pd.DataFrame | None, exact: pd.DataFrame | None) -> list[Claim]:
    """Judge C3 and C4.

    Args:
        permuted: of :func:`label_permutation_table`, or None where it cannot be had.
        exact: of :func:`exact_power_table`, or None.
    """
    claims = []
    if permuted is not None:
        claims += [
            Claim(
                "Permuting the labels takes task information away (mean of M with permuted labels over M).",
                "",
                best_estimate(permuted, "ratio"),
                below=DROPPED,
                note="The paper's number is lost; the bound is ours. What stays is the bias of so many images, "
                "1 / (2 n) nats on average, and the network's confidence.",
            ),
            Claim(
                "Permuting the labels leaves capture and overlap as they are (share of layers where both are equal to "
                "the last bit).",
                "unchanged",
                best_estimate(permuted, "local_equal"),
                above=0.999,
            ),
        ]
    if exact is not None:
        claims += [
            Claim(
                f"Rayleigh quotients from output variances, of {positions} positions, rank channels as those from an "
                "explicit patch covariance.",
                "> 0.999",
                best_estimate(exact[exact.positions == positions], "rho"),
                above=0.999,
            )
            for positions in ("all", "sampled")
        ]
    return claims


def controls_section(inputs: EvidenceInputs) -> Section:
    """Assemble the controls C3 and C4 of one network; intervals are over its layers.

    Raises:
        NotApplicableError: neither of the two can be computed; the message is of the first.
    """
    permuted, why_not_permuted = _attempt(label_permutation_table, inputs)
    exact, why_not_exact = _attempt(exact_power_table, inputs)
    reasons = [reason for reason in (why_not_permuted, why_not_exact) if reason is not None]
    if permuted is None and exact is None:
        raise reasons[0]
    tables = {"label_permutation": permuted, "exact_power": exact}
    drawings = []
    if permuted is not None:
        drawings.append(
            Drawing(
                "label_permutation",
                lambda: permutation_figure(permuted),
                "Mean task information of the channels of each layer with the true labels and with permuted ones "
                "(logarithmic). Where the two meet, the images do not suffice to tell task information from chance.",
            )
        )
    return Section(
        "controls",
        "Does the target axis measure the task, and the local axis the input alone?",
        {name: table for name, table in tables.items() if table is not None},
        control_claims(permuted, exact),
        drawings,
        follows="The local axis may be computed without labels, from outputs alone and from some of their positions.",
        fails=" ".join(
            [
                "A margin of permuted labels still measures how confident the network is, so that it keeps some "
                f"information where a layer knows that. The exact comparison is of the first {EXACT_IMAGES} images and "
                f"of layers of at most {LARGEST_EXACT:,} inputs x taps.",
                *(f"Left out: {reason}." for reason in reasons),
            ]
        ),
    )


def _attempt(
    compute: Callable[[EvidenceInputs], pd.DataFrame], inputs: EvidenceInputs
) -> tuple[pd.DataFrame | None, NotApplicableError | None]:
    try:
        return compute(inputs), None
    except NotApplicableError as reason:
        return None, reason


def permutation_figure(permuted: pd.DataFrame) -> Figure:
    """Draw task information with true and with permuted labels.

    Args:
        permuted: of :func:`label_permutation_table`.

    Example:
        >>> cells = pd.DataFrame({"depth": [0.0, 1.0], "task_mi": [0.01, 0.02], "task_mi_permuted": [0.001, 0.001],
        ...                       "task_mi_chance": 0.0005})
        >>> permutation_figure(cells).axes[0].get_yscale()
        'log'
    """
    figure, (axes,) = panels(1, 3.0)
    chance = float(permuted.task_mi_chance.iloc[0])
    axes.axhline(chance, color="0.4", linewidth=1.0, linestyle="--", label="unrelated, $1 / (2 n)$")
    against_depth(axes, permuted, {"task_mi": "true labels", "task_mi_permuted": "permuted labels"}, mean=False)
    axes.set_yscale("log")
    axes.set_ylabel("mean task information (nats)")
    return figure
