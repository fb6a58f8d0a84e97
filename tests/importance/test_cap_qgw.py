"""Quantiles in clusters times gradient weights, against a twin; every choice and every refusal."""

import numpy as np
import pytest
import reference_scores as twin
import torch
import torch_pruning as tp
from cases import batches, conv_net

from tp_twoaxis import CapQGWImportance, TwoAxisError, calibrate, prune_to_flops
from tp_twoaxis.dependency.groups import root_size
from tp_twoaxis.importance.cap_qgw import TIE
from tp_twoaxis.scores.cluster import feature_clusters, spectral_clusters
from tp_twoaxis.scores.composite import z_scores
from tp_twoaxis.scores.local import input_capture, pair_overlap, peer_overlap

X = torch.zeros(1, 3, 8, 8)


@pytest.fixture(scope="module")
def stats():
    return calibrate(conv_net(), batches(), gradients=True, progress=False)


def groups_of(net):
    graph = tp.DependencyGraph().build_dependency(net, X)
    return {group[0].dep.target.module: group for group in graph.get_all_groups(ignored_layers=[net.fc])}


@pytest.mark.parametrize("clusters", ["plane", "overlap"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_twin_on_a_group_of_one_producer(stats, clusters, gamma):
    net = conv_net()
    layer = stats["reduce"]
    capture, overlap = input_capture(layer.variance), peer_overlap(layer.correlation)
    if clusters == "plane":
        labels = feature_clusters(torch.stack([z_scores(capture), z_scores(overlap)], 1))
    else:
        labels = spectral_clusters(pair_overlap(layer.correlation))
    assert len(labels.unique()) > 1
    quantiles = twin.cluster_quantiles(capture.tolist(), labels.tolist())
    everywhere = twin.cluster_quantiles(capture.tolist(), [0] * 8)
    weight = float(layer.saliency.mean()) / np.mean([float(s.saliency.mean()) for s in stats.layers.values()])
    got = CapQGWImportance(stats, clusters=clusters, gamma=gamma)(groups_of(net)[net.reduce])
    np.testing.assert_allclose(got.numpy(), quantiles * (1 - TIE * (1 - everywhere)) * weight**gamma, rtol=1e-5)
    assert got.max().item() == pytest.approx(weight**gamma, rel=1e-5)


@pytest.mark.parametrize("clusters", ["plane", "overlap"])
def test_groups_of_several_producers(stats, clusters):
    net = conv_net()
    importance = CapQGWImportance(stats, clusters=clusters)
    for group in groups_of(net).values():
        values = importance(group)
        assert values.shape == (root_size(group),)
        assert ((values > 0) & torch.isfinite(values)).all()
        assert len(values.unique()) == len(values)  # ties between leaders are broken


def test_a_partial_group_is_clustered_by_itself(stats):
    net = conv_net()
    graph = tp.DependencyGraph().build_dependency(net, X)
    group = graph.get_pruning_group(net.conv1, tp.prune_conv_out_channels, [6, 2, 5, 9])
    values = CapQGWImportance(stats)(group)
    assert values.shape == (4,)  # few channels are one cluster, so this is capture's order
    assert torch.equal(values.argsort(), CapQGWImportance(stats, gamma=0.0)(group).argsort())


def test_the_weight_decides_which_groups_lose(stats):
    weight, kept = {}, {}
    for gamma in (0.0, 3.0):
        net = conv_net()
        importance = CapQGWImportance(stats, gamma=gamma)
        weight[gamma] = [float(importance(group).max()) for group in groups_of(net).values()]
        report = prune_to_flops(net, X, importance, flops=0.6, repair=(), tolerance=0.1, progress=False)
        shares = {len(g.kept) + len(g.removed): len(g.kept) / (len(g.kept) + len(g.removed)) for g in report.groups}
        kept[gamma] = [shares[root_size(group)] for group in groups_of(conv_net()).values()]
    assert weight[0.0] == pytest.approx([1.0, 1.0])
    heavy, light = weight[3.0].index(max(weight[3.0])), weight[3.0].index(min(weight[3.0]))
    assert kept[3.0][heavy] - kept[3.0][light] > kept[0.0][heavy] - kept[0.0][light]


def test_recalibration_keeps_the_gradients(stats):
    net = conv_net()
    importance = CapQGWImportance(stats, loader=batches())
    with torch.no_grad():
        net.conv1.weight.mul_(1.5)
    assert importance(groups_of(net)[net.reduce]).shape == (8,)
    assert importance.stats is not stats
    assert importance.stats.has_gradients


def test_refusals(stats):
    net = conv_net()
    plain = calibrate(net, batches(), progress=False)
    with pytest.raises(TwoAxisError, match=r"expected statistics with gradients.*calibrate\(gradients=True\)"):
        CapQGWImportance(plain)(groups_of(net)[net.reduce])
    with pytest.raises(TwoAxisError, match="clusters: expected 'plane' or 'overlap', got 'kmeans'"):
        CapQGWImportance(stats, clusters="kmeans")
    for gamma in (-1.0, float("nan")):
        with pytest.raises(TwoAxisError, match="gamma"):
            CapQGWImportance(stats, gamma=gamma)
