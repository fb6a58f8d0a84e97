"""Where channels lie on both axes, and who can stand in for them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cases import batches, conv_net
from reference import emitted
from reference_lesions import rank_below, regression
from reference_scores import capture, explanation, greedy_hull, peer_overlap, target_excess, task_information
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.diagnostics.peers import predict_from_peers, profile_channels


@pytest.fixture(scope="module")
def net():
    net = conv_net()
    with torch.no_grad():
        net.conv2.weight[3] = 0.0
        net.conv2.weight[6], net.conv2.bias[6] = -2.0 * net.conv2.weight[4], 0.7
    return net


@pytest.fixture(scope="module")
def layer(net):
    return calibrate(net, batches(96), positions="all", progress=False)["conv2"]


def test_profiles_are_those_of_the_formulas():
    net = conv_net()
    with torch.no_grad():
        net.conv2.weight[3] = 0.0
    layer = calibrate(net, batches(96), progress=False)["conv2"]
    profiles = profile_channels(layer)
    rho, variance, r = layer.correlation.numpy(), layer.variance.numpy(), layer.target_correlation().numpy()
    active = variance > 0
    values = {
        "capture": capture(variance),
        "overlap": peer_overlap(rho, active),
        "task_mi": task_information(r),
    }
    excess = np.zeros(len(r))
    excess[active] = target_excess(r[active], layer.pooled_correlation.numpy()[np.ix_(active, active)])
    values["target_excess"] = excess
    assert [p.channel for p in profiles] == list(range(16))
    for name, expected in values.items():
        found = [getattr(p, name) for p in profiles]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9, err_msg=name)
    for k, profile in enumerate(profiles):
        if not active[k]:
            continue
        chosen, path, _, size = greedy_hull(rho, k, active)
        assert profile.order == tuple(chosen)
        assert profile.hull == tuple(chosen[:size])
        np.testing.assert_allclose(profile.path, path, rtol=1e-6, atol=1e-9)
        assert profile.hull_explanation == profile.path[size - 1]
        for name in profile.ranks:
            column = [getattr(p, name) for p in profiles]
            assert profile.ranks[name] == pytest.approx(rank_below(column, k, active)), name


def test_predictions_are_regressions_on_the_rows(net, layer):
    images = [images for images, _ in batches(96)]
    rows = emitted(net, images, {"conv2": net.conv2})["conv2"].reshape(-1, 16)
    for prediction in predict_from_peers(layer, peers=3):
        k, peers = prediction.channel, prediction.peers
        if k in (3, 4, 6):
            continue
        weights, intercept, explained = regression(rows, k, peers)
        np.testing.assert_allclose(prediction.weights, weights, rtol=2e-3, atol=2e-4)
        assert prediction.intercept == pytest.approx(intercept, abs=1e-3)
        assert prediction.explained == pytest.approx(explained, abs=1e-4)
        assert prediction.explained == pytest.approx(explanation(layer.correlation.numpy(), k, peers, 1e-6), abs=1e-9)


def test_a_planted_copy_is_its_peers_whole_hull(layer):
    profile = profile_channels(layer)[6]
    assert profile.hull == (4,)
    assert profile.hull_explanation == pytest.approx(1.0, abs=1e-5)
    first = predict_from_peers(layer, peers=1)[6]
    assert first.weights == pytest.approx((-2.0,), rel=1e-4)


def test_constant_channels_have_no_peers_and_are_nobodys(layer):
    profiles = profile_channels(layer)
    constant = profiles[3]
    assert constant.constant
    assert (constant.hull, constant.order, constant.ranks, constant.prediction.peers) == ((), (), {}, ())
    assert constant.prediction.intercept == pytest.approx(float(layer.mean[3]))
    assert not any(3 in p.order or 3 in p.prediction.peers for p in profiles)


def test_permuting_channels_permutes_profiles():
    net, order = nn.Sequential(nn.Conv2d(3, 9, 3)), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    images = [images for images, _ in batches(64)]
    before = profile_channels(calibrate(net, images, target=None, progress=False)["0"])
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight[order])
        net[0].bias.copy_(net[0].bias[order])
    after = profile_channels(calibrate(net, images, target=None, progress=False)["0"])
    for new, old in enumerate(order.tolist()):
        assert [int(order[peer]) for peer in after[new].hull] == list(before[old].hull)
        assert after[new].hull_explanation == pytest.approx(before[old].hull_explanation, rel=1e-5)
        assert after[new].capture == pytest.approx(before[old].capture, rel=1e-5)


def test_scaling_a_channel_scales_its_weights_alone(layer):
    factor = torch.ones(16, dtype=torch.float64)
    factor[5] = 100.0
    rows, pooled = (type(m).from_parts(m.count, m.mean * factor, m.scatter * torch.outer(factor, factor))
                    for m in (layer.rows, layer.pooled))  # fmt: skip
    scaled = dataclasses.replace(layer, rows=rows, pooled=pooled)
    for before, after in zip(profile_channels(layer), profile_channels(scaled), strict=True):
        assert after.hull == before.hull
        assert after.hull_explanation == pytest.approx(before.hull_explanation, rel=1e-9)
        expected = [
            w * float(factor[before.channel] / factor[j])
            for j, w in zip(before.prediction.peers, before.prediction.weights, strict=True)
        ]
        assert after.prediction.weights == pytest.approx(expected, rel=1e-6)


def test_a_layer_of_one_channel():
    stats = calibrate(nn.Sequential(nn.Conv2d(3, 1, 3)), [batches(8)[0][0]], target=None, progress=False)
    (profile,) = profile_channels(stats["0"])
    assert (profile.hull, profile.order, profile.task_mi) == ((), (), None)
    assert profile.ranks["capture"] == 0.5


@pytest.mark.parametrize("peers", [0, 11])
def test_numbers_of_peers_out_of_range(layer, peers):
    with pytest.raises(TwoAxisError, match="peers: expected 1 to 10"):
        profile_channels(layer, peers)
    with pytest.raises(TwoAxisError, match="peers: expected 1 to 10"):
        predict_from_peers(layer, peers)
