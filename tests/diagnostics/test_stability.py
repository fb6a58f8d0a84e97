"""Bootstrap over shards and reliability from halves: against slow twins, against truth, and on bad input."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from cases import batches, conv_net
from scipy.stats import spearmanr
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate, calibrate_shards
from tp_twoaxis.diagnostics import (
    CalibrationSize,
    LayerReliability,
    calibration_is_enough,
    score_stability,
)
from tp_twoaxis.diagnostics.reliability import _halves, lengthening, spearman_brown
from tp_twoaxis.diagnostics.stability import _multiplicities
from tp_twoaxis.diagnostics.stability_figure import prunable_layers, stability_figure
from tp_twoaxis.scores import find_score

CHANNELS = 24
QUIET = {"progress": False}


def variance(layer):
    return layer.variance


def scaled_identity():
    """A layer whose channels are independent, with variances from 1 to 3."""
    net = nn.Sequential(nn.Linear(CHANNELS, CHANNELS, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.linspace(1.0, 3.0, CHANNELS).sqrt().diag())
    return net


def draw(images, seed):
    return [torch.randn(images, CHANNELS, generator=torch.Generator().manual_seed(seed))]


@pytest.fixture(scope="module")
def shards():
    return calibrate_shards(conv_net(), batches(48, 16), shards=4, **QUIET)


def merged(shards, chosen):
    """Merge copies one after the other: what the mixtures replace."""
    whole = copy.deepcopy(shards[chosen[0]])
    for shard in chosen[1:]:
        whole.merge(copy.deepcopy(shards[shard]))
    return whole


@pytest.mark.parametrize("score", ["capture", "hull", "task-mi"])
def test_bootstrap_is_repeated_merging(shards, score):
    report = score_stability(shards, score, layers=["conv2", "fc"], resamples=12, level=0.8, seed=3, **QUIET)
    function = find_score(score)
    full = merged(shards, range(4))
    draws = [[s for s, times in enumerate(row) for _ in range(times)] for row in _multiplicities(4, 12, 3).tolist()]
    for layer in report.layers:
        expected = function(full[layer.name]).numpy()
        resampled = np.stack([function(merged(shards, chosen)[layer.name]).numpy() for chosen in draws])
        np.testing.assert_allclose(layer.scores, expected, rtol=1e-8)
        np.testing.assert_allclose(layer.lower, np.quantile(resampled, 0.1, axis=0), rtol=1e-8)
        np.testing.assert_allclose(layer.upper, np.quantile(resampled, 0.9, axis=0), rtol=1e-8)
        rho = np.mean([spearmanr(row, expected).statistic for row in resampled])
        assert layer.rank_correlation == pytest.approx(rho, abs=1e-9)
        count = round(0.3 * len(expected))
        lowest = set(np.argsort(expected, kind="stable")[:count])
        shared = [len(lowest & set(np.argsort(row, kind="stable")[:count])) / count for row in resampled]
        assert layer.overlap == pytest.approx(np.mean(shared), abs=1e-9)


def test_reliability_is_that_of_merged_halves(shards):
    size = calibration_is_enough(shards, "capture", layers=["conv1"], splits=200, **QUIET)
    function = find_score("capture")
    rho = []
    for half in ((0, 1), (0, 2), (0, 3)):
        other = [s for s in range(4) if s not in half]
        a, b = (function(merged(shards, chosen)["conv1"]) for chosen in (half, other))
        rho.append(spearmanr(a, b).statistic)
    (layer,) = size.layers
    assert layer.halves == pytest.approx(np.mean(rho), abs=1e-9)
    assert layer.reliability == pytest.approx(2 * np.mean(rho) / (1 + np.mean(rho)), abs=1e-9)
    again = spearman_brown(layer.halves, layer.images_needed / 24)
    assert again >= 0.95
    assert spearman_brown(layer.halves, (layer.images_needed - 1) / 24) < 0.95


@pytest.mark.parametrize("count", [2, 3, 7, 8])
def test_halves_are_disjoint_and_distinct(count):
    first, second = _halves(count, 100, 0)
    assert int((first * second).sum()) == 0
    assert first.sum(1).unique().tolist() == second.sum(1).unique().tolist() == [count // 2]
    pairs = {frozenset((tuple(a), tuple(b))) for a, b in zip(first.tolist(), second.tolist(), strict=True)}
    assert len(pairs) == len(first)
    if count == 2:
        assert len(pairs) == 1


def test_lengthening_undoes_spearman_brown():
    for r, times in itertools.product((0.1, 0.5, 0.9), (0.5, 1.0, 3.0)):
        assert lengthening(r, spearman_brown(r, times)) == pytest.approx(times)


def test_the_forecast_is_what_other_images_show():
    """Reliability and the images needed, each against many independent calibration sets."""
    net = scaled_identity()
    forecasts = [
        calibration_is_enough(
            calibrate_shards(net, draw(128, seed), target=None, **QUIET), variance, reliability=0.9, splits=20, **QUIET
        )
        for seed in range(4)
    ]
    reliability = np.mean([size.layers[0].reliability for size in forecasts])
    needed = round(np.mean([size.images_needed for size in forecasts]))

    def agreement(images):
        scores = [calibrate(net, draw(images, 100 + seed), target=None, **QUIET)["0"].variance for seed in range(12)]
        return np.mean([spearmanr(a, b).statistic for a, b in itertools.combinations(scores, 2)])

    assert reliability == pytest.approx(agreement(128), abs=0.06)
    assert needed > 128
    assert agreement(needed) == pytest.approx(0.9, abs=0.03)
    # against all images there could be: the square root
    truth = torch.linspace(1.0, 3.0, CHANNELS)
    with_truth = np.mean(
        [spearmanr(calibrate(net, draw(128, s), target=None, **QUIET)["0"].variance, truth).statistic for s in range(9)]
    )
    assert with_truth == pytest.approx(reliability**0.5, abs=0.05)


def test_intervals_cover_the_truth():
    net, truth = scaled_identity(), np.linspace(1.0, 3.0, CHANNELS)
    inside = []
    for seed in range(5):
        shards = calibrate_shards(net, draw(800, seed), shards=16, target=None, **QUIET)
        (layer,) = score_stability(shards, variance, resamples=120, level=0.8, **QUIET).layers
        inside += list((np.array(layer.lower) <= truth) & (truth <= np.array(layer.upper)))
    assert 0.65 < np.mean(inside) < 0.9


def test_more_images_are_more_stable():
    net = scaled_identity()
    few, many = (calibrate_shards(net, draw(images, 0), **QUIET) for images in (64, 4096))
    small, large = (score_stability(s, "capture", resamples=40, **QUIET).layers[0] for s in (few, many))
    assert small.rank_correlation < large.rank_correlation
    assert small.overlap < large.overlap
    assert not calibration_is_enough(few, "capture", **QUIET)
    assert calibration_is_enough(many, "capture", **QUIET)


def test_order_of_shards_and_seed():
    shards = calibrate_shards(scaled_identity(), draw(64, 0), shards=4, **QUIET)
    one = calibration_is_enough(shards, "capture", splits=100, **QUIET)
    other = calibration_is_enough(shards[::-1], "capture", splits=100, **QUIET)
    assert one.layers[0].halves == pytest.approx(other.layers[0].halves)
    a, b, c = (score_stability(shards, "capture", resamples=10, seed=seed, **QUIET).to_json() for seed in (0, 0, 1))
    assert a == b != c


def test_constant_and_equal_channels_are_not_ranked():
    net = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        net[0].weight[2:] = 0.0
    shards = calibrate_shards(net, [torch.randn(40, 8)], **QUIET)
    (layer,) = score_stability(shards, "capture", resamples=5, **QUIET).layers
    assert (layer.rank_correlation, layer.overlap) == (None, None)
    size = calibration_is_enough(shards, "capture", **QUIET)
    assert (size.layers[0].channels, size.layers[0].reliability, bool(size)) == (2, None, False)
    assert "cannot be told" in str(size)
    flat = calibration_is_enough(
        calibrate_shards(scaled_identity(), draw(40, 0), **QUIET), lambda layer: torch.ones(CHANNELS), **QUIET
    )
    assert flat.layers[0].halves is None


def test_halves_that_do_not_agree():
    calls = itertools.count()

    def noise(layer):
        return torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(next(calls))).double()

    shards = calibrate_shards(scaled_identity(), draw(40, 0), shards=2, **QUIET)
    for _ in range(20):
        size = calibration_is_enough(shards, noise, **QUIET)
        if size.layers[0].halves <= 0:
            break
    assert (size.layers[0].reliability, size.images_needed) == (0.0, None)
    assert "do not agree at all on 0" in size.verdict


def test_reports(shards):
    stability = score_stability(shards, "capture", resamples=5, **QUIET)
    size = calibration_is_enough(shards, "capture", **QUIET)
    assert str(stability).count("\n") == len(shards[0]) + 2
    assert str(size).count("\n") == len(shards[0]) + 1
    content = json.loads(size.to_json())
    assert (content["images"], content["enough"], len(content["layers"])) == (48, False, len(shards[0]))
    assert len(json.loads(stability.to_json())["layers"][0]["lower"]) == 16
    figure = stability_figure(stability, size)
    weakest = min(size.judged, key=lambda layer: layer.reliability)
    assert figure.axes[1].get_title(loc="left") == weakest.name
    assert len(figure.axes[0].patches) == len(size.judged)
    figure = stability_figure(stability, size, {layer.name for layer in size.layers} - {weakest.name})
    assert figure.axes[1].get_title(loc="left") != weakest.name
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [label for label in labels if "(never pruned)" in label] == [f"{weakest.name} (never pruned)"]
    figure.draw_without_rendering()
    legend, label = figure.axes[0].get_legend().get_window_extent(), figure.axes[0].xaxis.label.get_window_extent()
    assert not legend.overlaps(label)
    assert not legend.overlaps(figure.axes[0].get_window_extent().shrunk(1.0, 0.99))


def test_the_model_s_outputs_are_never_pruned():
    assert prunable_layers(conv_net(), torch.randn(1, 3, 8, 8)) >= {"conv1", "conv2"}
    assert "fc" not in prunable_layers(conv_net(), torch.randn(1, 3, 8, 8))
    assert prunable_layers(conv_net(), torch.randn(1, 3)) >= {"conv1", "fc"}  # cannot be traced


def test_the_verdict_needs_every_layer():
    good = LayerReliability("a", 8, 0.99, 0.995, 10, True)
    bad = LayerReliability("b", 8, 0.5, 0.667, 950, False)
    silent = LayerReliability("c", 1, None, None, None, False)
    assert CalibrationSize("capture", 100, 0.95, [good, silent]).enough
    size = CalibrationSize("capture", 100, 0.95, [good, bad, silent])
    assert (size.enough, size.images_needed) == (False, 950)
    assert "1 of 2 layers" in size.verdict


@pytest.mark.parametrize("ask", [score_stability, calibration_is_enough])
def test_bad_input(shards, ask):
    with pytest.raises(TwoAxisError, match=r"expected one of capture, .*did you mean 'capture'"):
        ask(shards, "captur", **QUIET)
    with pytest.raises(TwoAxisError, match="at least 2 shards"):
        ask(shards[:1], "capture", **QUIET)
    with pytest.raises(TwoAxisError, match="at least 2 shards"):
        ask(shards[0], "capture", **QUIET)
    with pytest.raises(TwoAxisError, match="no statistics of layer 'nope'"):
        ask(shards, "capture", layers=["nope"], **QUIET)
    with pytest.raises(TwoAxisError, match="at least one layer"):
        ask(shards, "capture", layers=[], **QUIET)
    local = calibrate_shards(conv_net(), batches(16, 8), shards=2, target=None, layers=["conv1"], **QUIET)
    with pytest.raises(TwoAxisError, match="was not recorded"):
        ask(local, "task-mi", **QUIET)


def test_numbers_out_of_range(shards):
    for options in ({"level": 1.0}, {"resamples": 1}):
        with pytest.raises(TwoAxisError, match=next(iter(options))):
            score_stability(shards, "capture", **options, **QUIET)
    for options in ({"reliability": 1.0}, {"splits": 0}):
        with pytest.raises(TwoAxisError, match=next(iter(options))):
            calibration_is_enough(shards, "capture", **options, **QUIET)
