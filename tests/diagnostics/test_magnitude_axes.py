"""Norm and saliency on both axes: correlations, explained shares and kept halves by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference_alignment as slow
import reference_scores
import torch
from alignment_cases import evidence_inputs
from cases import batches, conv_net

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.axis_coordinates import local_axis, target_axis
from tp_twoaxis.diagnostics.evidence import EvidenceInputs
from tp_twoaxis.diagnostics.magnitude_axes import (
    expected_difference,
    explained_share,
    kept_half_table,
    magnitude_section,
    magnitude_table,
)


def test_a_cell_by_hand():
    inputs = evidence_inputs()
    table = magnitude_table(inputs)
    with_gradients = calibrate(inputs.model, inputs.calibration, gradients=True, progress=False)
    layer, row = with_gradients["conv2"], table[table.layer == "conv2"].iloc[0]
    here, task = local_axis(layer), target_axis(layer)
    weight = inputs.model.conv2.weight.detach().double().flatten(1).numpy()
    norm = np.linalg.norm(weight, axis=1)
    quotient = layer.variance.numpy() / norm**2
    assert row.sd_log_rayleigh == pytest.approx(np.log(quotient).std(), rel=1e-4)
    assert row.norm_capture == pytest.approx(slow.spearman(norm, here.capture.numpy()))
    assert row.norm_overlap == pytest.approx(slow.spearman(norm, here.overlap.numpy()))
    saliency = layer.saliency.numpy()
    assert row.saliency_capture == pytest.approx(slow.spearman(saliency, here.capture.numpy()))
    assert row.saliency_task_mi == pytest.approx(slow.spearman(saliency, task.task_mi.numpy()))
    task_mi = task.task_mi.numpy()
    columns = [np.ones(16), task_mi, reference_scores.target_redundancy(task_mi), task.excess.numpy()]
    fitted = np.stack(columns, 1) @ np.linalg.lstsq(np.stack(columns, 1), saliency, rcond=None)[0]
    r2 = 1 - ((saliency - fitted) ** 2).sum() / ((saliency - saliency.mean()) ** 2).sum()
    assert row.pid_r2 == pytest.approx(r2, rel=1e-3)
    assert row.pid_r2_chance == pytest.approx(3 / 15)
    again = EvidenceInputs(inputs.model, with_gradients, inputs.calibration, progress=False)
    assert magnitude_table(again).pid_r2.to_numpy() == pytest.approx(table.pid_r2.to_numpy(), rel=1e-3)


def test_three_unrelated_regressors_explain_what_chance_gives():
    generator = torch.Generator().manual_seed(0)
    shares = [explained_share(*torch.randn(4, 16, generator=generator)) for _ in range(400)]
    assert np.mean(shares) == pytest.approx(3 / 15, abs=0.02)
    assert math.isnan(explained_share(torch.randn(4), *torch.randn(3, 4)))
    assert math.isnan(explained_share(torch.ones(9), torch.randn(9)))


def test_kept_halves_by_hand():
    inputs = evidence_inputs()
    row = kept_half_table(inputs).set_index("layer").loc["conv2"]
    layer = inputs.statistics["conv2"]
    capture, task_mi = local_axis(layer).capture.numpy(), target_axis(layer).task_mi.numpy()
    every = np.ones(16, dtype=bool)
    both = reference_scores.z(task_mi, every) + reference_scores.z(capture, every)
    kept = [set(np.argsort(-score)[:8]) for score in (task_mi, both)]
    assert row.differs == len(kept[0] - kept[1]) / 8
    assert row.expected == pytest.approx(expected_difference(np.corrcoef(capture, task_mi)[0, 1]))


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.6])
def test_the_expected_difference_is_that_of_normal_scores(correlation):
    generator = np.random.default_rng(0)
    first, second = generator.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], size=200_000).T
    alone, both = first > np.median(first), first + second > np.median(first + second)
    assert expected_difference(correlation) == pytest.approx((alone & ~both).sum() / alone.sum(), abs=0.005)


def test_the_section_is_whole_and_without_labels_has_no_saliencies():
    section = magnitude_section(evidence_inputs())
    assert set(section.tables) == {"magnitude", "kept_half"}
    assert len(section.claims) == 5
    assert all(drawing.draw().axes for drawing in section.drawings)
    network = conv_net()
    images = [x for x, _ in batches(160, 32)]
    inputs = EvidenceInputs(network, calibrate(network, images, progress=False), images, progress=False)
    unlabelled = magnitude_section(inputs)
    assert unlabelled.tables["magnitude"].saliency_capture.isna().all()
    assert len(unlabelled.claims) == 4
