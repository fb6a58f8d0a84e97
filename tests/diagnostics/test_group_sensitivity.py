"""The sensitivity of groups: what is measured, what tables say of it, and what a pruning's report keeps."""

import json

import numpy as np
import pytest
import torch
from cases import batches, conv_net
from pruning_cases import assert_unchanged, everything
from torch import nn

from tp_twoaxis import AnticipatingImportance, HybridImportance, TwoAxisError, calibrate, prune_to_flops
from tp_twoaxis.diagnostics import SensitivityReport, sensitivity
from tp_twoaxis.importance import DistortionCurve, DistortionCurves

X = torch.zeros(1, 3, 8, 8)
LOADER = batches(images=64, batch_size=24)


def curve(name="conv1", distortion=(0.0, 0.1, 0.4), error=(0.0, 0.02, 0.1), size=8, saved=0.05):
    removed = (0, size // 2, size - 1)
    return DistortionCurve(name, size, removed, distortion, error, tuple(saved * k for k in removed), 32)


def report_of(*curves, **options):
    return SensitivityReport(DistortionCurves(list(curves)), **options)


def test_every_group_is_measured_and_the_network_stays_as_it_was():
    net = conv_net()
    before = everything(net)
    report = sensitivity(net, X, [x for x, _ in LOADER], levels=2, progress=False)
    assert_unchanged(net, before)
    pruned = prune_to_flops(conv_net(), X, lambda group: torch.rand(len(group[0].idxs)), repair=(), progress=False)
    assert sorted(report.curves) == sorted(group.name for group in pruned.groups)
    assert list(report.curves) == [name for name, _ in net.named_modules() if name in report.curves]
    table, summary = report.table(), report.summary()
    assert list(summary.group) == list(report.curves)
    for _, part in table.groupby("group"):
        assert part.share_removed.iloc[0] == part.distortion.iloc[0] == part.macs_saved.iloc[0] == 0.0
        assert part.removed.iloc[-1] == part["size"].iloc[0] - 1
    assert summary.share_removable.between(0, 1).all()


def test_ignored_layers_have_no_curve():
    report = sensitivity(conv_net(), X, LOADER, levels=1, ignored_layers=["reduce"], progress=False)
    assert list(report.curves) == ["depthwise"]


def test_macs_are_those_that_a_removal_of_the_group_alone_saves():
    """conv2 both writes and reads the channels of its group: what they save is no multiple of what one of them does."""
    (whole,) = sensitivity(conv_net(), X, LOADER, levels=2, ignored_layers=["reduce"], progress=False).curves.values()
    for removed, saved in zip(whole.removed[1:], whole.macs_saved[1:], strict=True):
        report = prune_to_flops(
            conv_net(),
            X,
            lambda group: torch.arange(float(len(group[0].idxs))),
            flops=1 - saved,
            ignored_layers=["reduce"],
            min_keep=1e-3,
            repair=(),
            progress=False,
        )
        assert len(report.groups[0].removed) == removed
        assert report.after.macs / report.before.macs == pytest.approx(1 - saved)


def test_what_can_go_is_read_off_the_curve():
    """A power of two with half the channels at 0.1: distortion is 0.1 (k / 4) ** 2 up to there."""
    (row,) = (
        report_of(curve(distortion=(0.0, 0.1, 0.1 * (7 / 4) ** 2)), price=0.1 * (3 / 4) ** 2).summary().itertuples()
    )
    assert (row.share_removable, row.macs_freed) == (3 / 8, pytest.approx(0.15))
    assert (row.half_distortion, row.half_error, row.half_macs) == (pytest.approx(0.1), pytest.approx(0.02), 0.2)
    assert row.last_distortion == pytest.approx(0.1 * (7 / 4) ** 2)


@pytest.mark.parametrize(
    ("distortion", "error", "flat", "noise"),
    [
        ((0.0, 0.1, 0.4), (0.0, 0.02, 0.1), False, [True, False, False]),
        ((0.0, 0.1, 0.4), (0.0, 0.06, 0.3), True, [True, True, True]),
        ((0.0, 1e-5, 2e-4), (0.0, 1e-7, 1e-6), True, [True, False, False]),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), True, [True, True, True]),
    ],
)
def test_flat_groups_and_points_within_noise_are_marked(distortion, error, flat, noise):
    report = report_of(curve(distortion=distortion, error=error))
    assert report.summary().flat.tolist() == [flat]
    assert report.table().within_noise.tolist() == noise
    assert ("flat: within noise" in str(report)) == flat


def test_nothing_is_removable_at_a_price_below_the_first_channel():
    (row,) = report_of(curve(), price=1e-9).summary().itertuples()
    assert (row.share_removable, row.macs_freed) == (0.0, 0.0)


def test_text_and_json_hold_what_the_tables_hold():
    report = report_of(curve(), curve("größe.2"), notes=["heads stay"])
    text = str(report)
    assert "größe.2" in text
    assert text.splitlines()[-1] == "note: heads stay"
    assert max(map(len, text.splitlines())) <= 100
    payload = json.loads(report.to_json())
    assert payload["price"] == report.price
    assert [row["group"] for row in payload["summary"]] == ["conv1", "größe.2"]
    assert [row["distortion"] for row in payload["points"]] == report.table().distortion.tolist()


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (conv_net(), {"price": 0.0}, "price: expected a distortion above 0, got 0.0"),
        (conv_net(), {"levels": 0}, "levels >= 1"),
        (conv_net(), {"ignored_layers": ["conv9"]}, "no layer 'conv9'"),
        (conv_net(), {"ignored_layers": ["conv1", "conv2", "depthwise", "reduce"]}, "could leave, got none"),
        (nn.Flatten(), {}, "no parameters"),
    ],
)
def test_refusals(net, options, message):
    with pytest.raises(TwoAxisError, match=message):
        sensitivity(net, X, LOADER, progress=False, **options)


@pytest.mark.parametrize("kind", ["name", "object", "hybrid"])
def test_a_pruning_report_keeps_the_curves_of_its_criterion(kind):
    net, loader = conv_net(), [x for x, _ in LOADER]
    importance = "anticipating(levels=2)"
    if kind != "name":
        stats = calibrate(net, loader, target=None, consumers=True, progress=False)
        importance = AnticipatingImportance(stats, levels=2, loader=loader, progress=False)
    if kind == "hybrid":
        importance = HybridImportance(importance, "l2")
    report = prune_to_flops(net, X, importance, flops=0.6, repair=(), loader=loader, progress=False)
    assert sorted(c.name for c in report.sensitivity) == sorted(group.name for group in report.groups)
    entries = json.loads(report.to_json())["sensitivity"]
    read = SensitivityReport(DistortionCurves([DistortionCurve(**entry) for entry in entries]))
    kept = SensitivityReport(DistortionCurves(report.sensitivity))
    assert np.array_equal(read.summary(), kept.summary())
    assert str(read) == str(kept)


def test_a_criterion_without_curves_leaves_none():
    assert prune_to_flops(conv_net(), X, "l2", flops=0.6, repair=(), progress=False).sensitivity == []
