"""Criteria on weights, as published."""

import pytest
import torch
import torch_pruning as tp
from baseline_cases import X, full_group, residual
from cases import conv_net
from reference_baselines import folded_norm
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.importance.baselines.weight_criteria import (
    BNFoldedNormImportance,
    FPGMImportance,
    NetworkSlimmingImportance,
)


def numbers(tensor):
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("reduction", ["mean", "first"])
def test_fpgm_sums_euclidean_distances_between_filters(reduction):
    net = conv_net()
    graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
    group = graph.get_pruning_group(net.reduce, tp.prune_conv_out_channels, [5, 0, 3])
    weight = net.reduce.weight.detach().double().flatten(1)
    expected = [sum(float((weight[k] - other).norm()) for other in weight) for k in (5, 0, 3)]
    got = FPGMImportance(group_reduction=reduction, normalizer=None)(group)
    torch.testing.assert_close(got, torch.tensor(expected))


@pytest.mark.parametrize("importance", [FPGMImportance(), BNFoldedNormImportance()])
def test_filters_are_needed(importance):
    net = nn.Sequential(nn.Embedding(4, 6), nn.Linear(6, 2))
    graph = tp.DependencyGraph().build_dependency(net, torch.tensor([[1, 2]]))
    group = graph.get_pruning_group(net[0], tp.prune_embedding_out_channels, [0, 1])
    with pytest.raises(TwoAxisError, match="no convolution or linear layer writes"):
        importance(group)


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_slimming_reads_the_scale_of_every_batch_norm_of_the_stream(reduction):
    net = residual()
    scales = torch.stack([net.bn_first.weight, net.bn_second.weight]).detach().abs()
    expected = {"mean": scales.mean(0), "sum": scales.sum(0), "max": scales.amax(0)}[reduction]
    importance = NetworkSlimmingImportance(group_reduction=reduction, normalizer=None)
    torch.testing.assert_close(importance(full_group(net, "first")), expected)
    partial = (
        tp.DependencyGraph().build_dependency(net, X).get_pruning_group(net.second, tp.prune_conv_out_channels, [4, 1])
    )
    torch.testing.assert_close(importance(partial), expected[[4, 1]])


def test_slimming_names_the_group_without_a_batch_norm():
    with pytest.raises(TwoAxisError, match=r"group of reduce.*BatchNorm with a scale.*Conv2d, Linear.*'bn-scale'"):
        NetworkSlimmingImportance()(full_group(conv_net(), "reduce"))
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1))
    with pytest.raises(TwoAxisError, match="BatchNorm with a scale"):
        NetworkSlimmingImportance()(full_group(net, "0"))


def test_folded_norms_are_those_of_the_folded_weights():
    net = residual()
    parts = [
        folded_norm(numbers(conv.weight), numbers(norm.weight), numbers(norm.running_var), norm.eps)
        for conv, norm in ((net.first, net.bn_first), (net.second, net.bn_second))
    ]
    got = BNFoldedNormImportance(normalizer=None)(full_group(net, "first"))
    torch.testing.assert_close(got.double(), torch.tensor(sum(parts) / 2), rtol=1e-6, atol=0)
    fused = nn.utils.fusion.fuse_conv_bn_eval(net.first, net.bn_first)
    first = BNFoldedNormImportance(normalizer=None, group_reduction="first")(full_group(net, "first"))
    torch.testing.assert_close(first, fused.weight.detach().flatten(1).norm(dim=1))


def test_folding_does_not_depend_on_how_weight_and_batch_norm_share_a_scale():
    net, scale = residual(), torch.tensor([0.1, 2.0, 3.0, 0.5, 9.0, 1.0])
    before = BNFoldedNormImportance()(full_group(net, "first"))
    with torch.no_grad():
        net.first.weight *= scale[:, None, None, None]
        net.bn_first.running_mean *= scale
        net.bn_first.running_var *= scale**2
        net.bn_first.eps = 0.0
    torch.testing.assert_close(BNFoldedNormImportance()(full_group(net, "first")), before, rtol=1e-4, atol=0)


def test_a_producer_without_batch_norm_counts_with_its_plain_norm():
    net = conv_net()
    got = BNFoldedNormImportance(normalizer=None)(full_group(net, "reduce"))
    torch.testing.assert_close(got, net.reduce.weight.detach().flatten(1).norm(dim=1))


def test_folding_needs_a_running_variance():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 2, 1))
    with pytest.raises(TwoAxisError, match="no running variance"):
        BNFoldedNormImportance()(full_group(net, "0"))
