"""On which axis weight norm and Taylor saliency lie, and what a second axis changes (table 14, appendix M)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from tp_twoaxis.diagnostics.axis_coordinates import (
    LocalAxis,
    TargetAxis,
    cell_correlation,
    local_axis,
    relative_depths,
    target_axis,
    task_cells,
)
from tp_twoaxis.diagnostics.cell_figures import panels, strips
from tp_twoaxis.diagnostics.channel_groups import standardised
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, EvidenceInputs, Section
from tp_twoaxis.diagnostics.run_aggregates import best_estimate
from tp_twoaxis.runtime.batches import read_batch
from tp_twoaxis.runtime.inputs import CallSignature
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.scores.composite import z_scores
from tp_twoaxis.scores.local import rayleigh_quotient
from tp_twoaxis.scores.target import target_redundancy
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.layer_statistics import LayerStatistics
from tp_twoaxis.statistics.store import CalibrationStatistics

REGRESSORS = ("task_mi", "redundancy", "excess")
CORRELATIONS = {
    "norm_capture": "norm with capture",
    "norm_overlap": "norm with overlap",
    "saliency_capture": "saliency with capture",
    "saliency_task_mi": "saliency with task information",
}


def magnitude_table(inputs: EvidenceInputs) -> pd.DataFrame:
    """Place weight norm and first-order Taylor saliency on both axes, in every cell.

    Args:
        inputs: with labels; where its statistics hold no saliencies, they are gathered in a pass of their own.

    Returns:
        A row for each cell with the columns ``layer``, ``depth``, ``channels`` (that vary), ``sd_log_rayleigh`` (of ln
        RQ over channels), Spearman correlations ``norm_capture``, ``norm_overlap``, ``saliency_capture`` and
        ``saliency_task_mi``, and ``pid_r2``, the share of the variance of z(saliency) that z M, z Rt and z X explain,
        with ``pid_r2_chance``, what three unrelated quantities explain on average, 3 / (channels - 1). Without labels
        those of the saliency are NaN.

    Raises:
        NotApplicableError: see :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.

    Example:
        >>> import torch
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = [(torch.randn(128, 3, 6, 6), torch.randint(8, (128,)))]
        >>> inputs = EvidenceInputs(net, calibrate(net, images, progress=False), images, progress=False)
        >>> table = magnitude_table(inputs)
        >>> table.channels.tolist(), bool(0.0 <= table.pid_r2[0] <= 1.0)
        ([8], True)
    """
    cells, depths = task_cells(inputs), relative_depths(inputs.cells())
    gathered = _with_saliencies(inputs, cells)
    rows = []
    for name in cells:
        layer = inputs.statistics[name]
        saliency = None if gathered is None else gathered[name].saliency
        rows.append({"layer": name, "depth": depths[name], **_cell(layer, saliency)})
    return pd.DataFrame(rows)


def _with_saliencies(inputs: EvidenceInputs, cells: list[str]) -> CalibrationStatistics | None:
    if inputs.statistics.has_gradients:
        return inputs.statistics
    _, labels = read_batch(next(iter(inputs.calibration)), call=CallSignature.of(unwrap(inputs.model)))
    if labels is None:
        return None
    return calibrate(
        inputs.model, inputs.calibration, layers=cells, max_images=None, gradients=True, progress=inputs.progress
    )


def _cell(layer: LayerStatistics, saliency: Tensor | None) -> dict[str, Any]:
    active = layer.variance > 0
    here, task = local_axis(layer), target_axis(layer)
    norm = layer.weight_power[active].sqrt()
    quotient = rayleigh_quotient(layer.variance, layer.weight_power)[active]
    count = int(active.sum())
    row: dict[str, Any] = {
        "channels": count,
        "sd_log_rayleigh": float(quotient.log().std(correction=0)) if count else math.nan,
        "norm_capture": cell_correlation(norm, here.capture),
        "norm_overlap": cell_correlation(norm, here.overlap),
        **dict.fromkeys(("saliency_capture", "saliency_task_mi", "pid_r2"), math.nan),
        "pid_r2_chance": min(1.0, len(REGRESSORS) / (count - 1)) if count > 1 else math.nan,
    }
    if saliency is not None:
        saliency = saliency[active]
        row["saliency_capture"] = cell_correlation(saliency, here.capture)
        row["saliency_task_mi"] = cell_correlation(saliency, task.task_mi)
        row["pid_r2"] = explained_share(saliency, task.task_mi, target_redundancy(task.task_mi), task.excess)
    return row


def explained_share(values: Tensor, *regressors: Tensor) -> float:
    """Share of the variance of a quantity that others explain linearly, R^2 of least squares on z-scores.

    Args:
        values: [V].
        regressors: [V] each.

    Returns:
        A number in [0, 1]; NaN where the values are all alike, or there are no more channels than regressors and a
        constant.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.0, 1.0, 2.0, 4.0])
        >>> round(explained_share(2.0 * x + 1.0, x), 6)
        1.0
    """
    wanted = z_scores(values)
    if len(values) <= len(regressors) + 1 or not bool(wanted.any()):
        return math.nan
    features = standardised(*regressors)
    solution = np.linalg.lstsq(features, wanted.numpy(), rcond=None)[0]
    return float(1.0 - np.mean((wanted.numpy() - features @ solution) ** 2))


def kept_half_table(inputs: EvidenceInputs) -> pd.DataFrame:
    """Compare which half of a layer is kept by task information alone and by both axes (appendix M).

    Args:
        inputs: with statistics that hold a task variable.

    Returns:
        A row for each cell of at least three varying channels with the columns ``layer``, ``depth``, ``differs``, the
        share of the half that M keeps and z M + z I does not, and ``expected``, that of two normal scores of the same
        correlation: ``1/2 - arcsin(sqrt((1 + r) / 2)) / pi``, 25 % where they are unrelated.

    Raises:
        NotApplicableError: see :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.

    Example:
        >>> import torch
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = [(torch.randn(128, 3, 6, 6), torch.randint(8, (128,)))]
        >>> inputs = EvidenceInputs(net, calibrate(net, images, progress=False), images, progress=False)
        >>> kept_half_table(inputs).columns.tolist()
        ['layer', 'depth', 'differs', 'expected']
    """
    depths = relative_depths(inputs.cells())
    rows = []
    for name in task_cells(inputs):
        layer = inputs.statistics[name]
        here, task = local_axis(layer), target_axis(layer)
        if len(here.capture) < 3:
            continue
        rows.append({"layer": name, "depth": depths[name], **_kept_half(here, task)})
    return pd.DataFrame(rows, columns=["layer", "depth", "differs", "expected"])


def _kept_half(here: LocalAxis, task: TargetAxis) -> dict[str, float]:
    relevance, capture = z_scores(task.task_mi), z_scores(here.capture)
    half = len(relevance) // 2
    alone, both = (set(score.topk(half).indices.tolist()) for score in (relevance, relevance + capture))
    correlation = float((relevance * capture).mean())
    return {"differs": len(alone - both) / half, "expected": expected_difference(correlation)}


def expected_difference(correlation: float) -> float:
    """Share of the kept half that changes when an equally weighted score is added, of two normal scores.

    The sum has the correlation ``sqrt((1 + r) / 2)`` with the first score, and the halves above two medians of
    correlation c differ by ``1/2 - arcsin(c) / pi`` (Sheppard 1899).

    Args:
        correlation: r of the two scores, in [-1, 1].

    Example:
        >>> round(expected_difference(0.0), 6), expected_difference(1.0)
        (0.25, 0.0)
    """
    return 0.5 - math.asin(min(1.0, math.sqrt(max(0.0, (1.0 + correlation) / 2.0)))) / math.pi


def magnitude_claims(table: pd.DataFrame, halves: pd.DataFrame) -> list[Claim]:
    """Judge table 14, the Taylor correlations of section 3.2, and appendix M.

    Args:
        table: of :func:`magnitude_table`, of one network or of several.
        halves: of :func:`kept_half_table`.
    """
    ours = "The paper's number is lost; the bound is ours."
    taylor = table.assign(lead=table.saliency_capture - table.saliency_task_mi)
    halves = halves.assign(surplus=halves.differs - halves.expected)
    return [
        Claim(
            "Weight norm ranks channels moderately as input capture does.",
            "",
            best_estimate(table, "norm_capture"),
            above=0.2,
            below=0.8,
            note=ours,
        ),
        Claim(
            "Weight norm is weakly or negatively aligned with peer overlap.",
            "",
            best_estimate(table, "norm_overlap"),
            below=0.2,
            note=ours,
        ),
        Claim(
            "Taylor saliency follows input capture more closely than task information (difference of rank "
            "correlations).",
            "",
            best_estimate(taylor, "lead"),
            above=0.0,
        ),
        Claim(
            "Adding input capture to task information changes a quarter of the half that is kept.",
            "0.26 in one layer",
            best_estimate(halves, "differs"),
            above=0.2,
            below=0.3,
            note="The bounds are ours. Unrelated scores give 0.25, so that the number says no more than weak "
            "alignment does.",
        ),
        Claim(
            "It changes more than normal scores of the same correlation would (difference of shares).",
            "",
            best_estimate(halves, "surplus"),
            above=0.0,
            note="The paper does not claim it; the comparison is ours.",
        ),
    ]


def magnitude_section(inputs: EvidenceInputs) -> Section:
    """Assemble the evidence on weight norm, Taylor saliency and the kept half; intervals are over the layers.

    Raises:
        NotApplicableError: see :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.
    """
    table, halves = magnitude_table(inputs), kept_half_table(inputs)
    spread = float(table.sd_log_rayleigh.mean())
    claims = magnitude_claims(table, halves)
    return Section(
        "magnitude",
        "Do weight norm and Taylor saliency already know the local axis, and does a second axis change the choice?",
        {"magnitude": table, "kept_half": halves},
        [claim for claim in claims if not math.isnan(claim.estimate.value)],
        [
            Drawing(
                "magnitude",
                lambda: magnitude_figure(table),
                "Rank correlations of weight norm and of Taylor saliency with coordinates of both axes, a dot a layer.",
            ),
            Drawing(
                "kept_half",
                lambda: kept_half_figure(halves),
                "Share of the kept half of a layer's channels that changes when input capture is added to task "
                "information, and what normal scores of the same correlation give. The line at 0.25 is where the two "
                "are unrelated.",
            ),
        ],
        follows="Capture is the log of the squared norm times the Rayleigh quotient: where the latter hardly varies "
        f"within layers (here ln RQ has a standard deviation of {spread:.2f}), the norm does nearly as well. It says "
        "little about overlap with peers.",
        fails="With few channels three regressors explain much by chance: compare R^2 with its chance column. The "
        "saliency's sum over positions before its absolute value is this package's choice.",
    )


def magnitude_figure(table: pd.DataFrame) -> Figure:
    """Draw the correlations of norm and saliency.

    Args:
        table: of :func:`magnitude_table`.

    Example:
        >>> len(magnitude_figure(pd.DataFrame({key: [0.1, 0.2] for key in CORRELATIONS})).axes)
        1
    """
    figure, (axes,) = panels(1, 2.6)
    strips(axes, {words: table[key].tolist() for key, words in CORRELATIONS.items()}, label="rank correlation")
    axes.set_xlim(-1.0, 1.0)
    return figure


def kept_half_figure(halves: pd.DataFrame) -> Figure:
    """Draw the share of the kept half that changes.

    Args:
        halves: of :func:`kept_half_table`.

    Example:
        >>> len(kept_half_figure(pd.DataFrame({"differs": [0.2, 0.3], "expected": [0.25, 0.26]})).axes)
        1
    """
    figure, (axes,) = panels(1, 1.9)
    rows = {"measured": halves.differs.tolist(), "normal scores": halves.expected.tolist()}
    strips(axes, rows, label="share of the kept half that changes")
    axes.axvline(0.25, color="0.5", linewidth=0.8, linestyle="--")
    axes.set_xlim(-0.02, 0.62)
    return figure
