"""Layers whose stored weights do not act are found by trying, with the way out; those that only pad are not."""

import pytest
import torch
from pruning_cases import assert_unchanged, everything
from removal_cases import FanIn, Padded, convolutions, old_weight_norm
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tp_twoaxis import prune_to_flops
from tp_twoaxis.dependency.acting_weights import layers_with_other_weights
from tp_twoaxis.dependency.graph import build_graph, prunable_groups

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def found(net):
    groups = prunable_groups(build_graph(net.eval(), X), net, [])[0]
    before = everything(net)
    reasons = layers_with_other_weights(groups, net, X)
    assert_unchanged(net, before)
    return reasons


@pytest.mark.parametrize("make", [lambda: convolutions(lambda x: x), lambda: convolutions(lambda x: x, Padded, 0)])
def test_layers_that_compute_with_what_they_store_are_not_suspected(make):
    torch.manual_seed(0)
    assert found(make()) == {}


@pytest.mark.parametrize(
    ("wrap", "way_out"),
    [
        (parametrizations.spectral_norm, "remove_parametrizations(layer, 'weight')"),
        (parametrizations.weight_norm, "remove_parametrizations(layer, 'weight')"),
        (old_weight_norm, "remove_weight_norm(layer)"),
        (nn.utils.spectral_norm, "remove_spectral_norm(layer)"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove(layer, 'weight')"),
    ],
)
def test_normalised_weights_and_their_ways_out(wrap, way_out):
    torch.manual_seed(0)
    reasons = found(convolutions(wrap))
    assert reasons["0"].endswith("before pruning")
    assert way_out in reasons["0"]
    assert " 2" in reasons["0"]


def test_the_way_out_leads_out():
    torch.manual_seed(0)
    net = convolutions(parametrizations.spectral_norm).eval()
    parametrize.remove_parametrizations(net[2], "weight")
    report = prune_to_flops(net, X, "l2", flops=0.6, repair=(), progress=False)
    assert not report.notes


def test_scaled_weights():
    torch.manual_seed(0)
    reasons = found(convolutions(lambda x: x, FanIn))
    assert list(reasons) == ["0"]  # outputs of a filter may leave: each is scaled by itself
    assert "the weights that 2 stores are not those that act; put a plain Conv2d" in reasons["0"]
    assert "in place of this FanIn" in reasons["0"]
