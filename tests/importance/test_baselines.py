"""Criteria of others, as published."""

import pytest
import torch
import torch_pruning as tp
from cases import conv_net
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.importance.baselines import FPGMImportance


@pytest.mark.parametrize("reduction", ["mean", "first"])
def test_fpgm_sums_euclidean_distances_between_filters(reduction):
    net = conv_net()
    graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
    group = graph.get_pruning_group(net.reduce, tp.prune_conv_out_channels, [5, 0, 3])
    weight = net.reduce.weight.detach().double().flatten(1)
    expected = [sum(float((weight[k] - other).norm()) for other in weight) for k in (5, 0, 3)]
    got = FPGMImportance(group_reduction=reduction, normalizer=None)(group)
    torch.testing.assert_close(got, torch.tensor(expected))


def test_fpgm_needs_a_layer_with_filters():
    net = nn.Sequential(nn.Embedding(4, 6), nn.Linear(6, 2))
    graph = tp.DependencyGraph().build_dependency(net, torch.tensor([[1, 2]]))
    group = graph.get_pruning_group(net[0], tp.prune_embedding_out_channels, [0, 1])
    with pytest.raises(TwoAxisError, match="no convolution or linear layer writes"):
        FPGMImportance()(group)
