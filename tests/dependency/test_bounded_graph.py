"""Groups listed with tables and bounds are Torch-Pruning's own, item by item; what has no end stops early."""

import time

import pytest
import timm
import torch
import torch_pruning as tp
import torchvision
from cases import conv_net
from removal_cases import CASES, Stacked, UNet, channel_gates, gated
from torch import nn

from tp_twoaxis.dependency.bounded_graph import BoundedGraph, ListingLimitError, SharedChannelsError
from tp_twoaxis.dependency.graph import build_graph, prunable_groups
from tp_twoaxis.dependency.validation import verified_groups

X = torch.randn(1, 3, 32, 32)
NETS = {
    "conv_net": (conv_net, torch.randn(1, 3, 8, 8)),
    "mobilenet": (lambda: torchvision.models.mobilenet_v2(width_mult=0.35), X),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16), X),
    "vit": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64), X),
    "timm vit": (lambda: timm.models.VisionTransformer(32, 8, embed_dim=24, depth=2, num_heads=3), X),
    "halves": (lambda: Stacked("chunk"), X),
    "gated": (lambda: gated(lambda x: x.chunk(2, 1)), X),
    "unet": (UNet, X),
}


def items(group):
    return [(type(dep.target.module), dep.handler.__name__, list(idxs)) for dep, idxs in group]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("some", [False, True])
def test_groups_are_torch_prunings_own(name, some):
    make, x = NETS[name]
    net = make().eval()
    ours = BoundedGraph().build_dependency(net, x, verbose=False)
    theirs = tp.DependencyGraph().build_dependency(net, x, verbose=False)
    compared = 0
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer in theirs.module2node:
            pruner = theirs.get_pruner_of_module(layer)
            channels = [1, 0, 3] if some else list(range(pruner.get_out_channels(layer)))
            expected = theirs.get_pruning_group(layer, pruner.prune_out_channels, channels)
            found = ours.get_pruning_group(layer, pruner.prune_out_channels, channels)
            assert items(found) == items(expected)
            assert [item.root_idxs for item in found] == [item.root_idxs for item in expected]
            compared += 1
    assert compared > 3


def test_a_listing_without_end_stops_and_says_where():
    torch.manual_seed(0)
    net = torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5).eval()
    graph, start = build_graph(net, torch.randn(1, 3, 64, 64)), time.perf_counter()
    layer = net.features[3][1].mlp[3]
    with pytest.raises(ListingLimitError, match=r"without end .* behind features\.3\.1\.mlp\.3") as met:
        graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(range(32)))
    assert layer in met.value.layers
    groups, notes = prunable_groups(graph, net, [])
    assert time.perf_counter() - start < 20
    assert groups
    assert any("stay whole" in note and "without end" in note for note in notes)


def test_wide_gates_over_channels_end():
    start = time.perf_counter()
    net = channel_gates(256, 6).eval()
    x = torch.randn(1, 3, 8, 8)
    groups, notes = verified_groups(build_graph(net, x), net, x, [])
    assert time.perf_counter() - start < 20
    assert any(note.startswith("stem.0: stays whole") for note in notes)
    assert not any(part.module is net.stem[0] for group in groups for part in group.parts)


def test_maps_of_vectors_are_listed_by_channels_of_the_map():
    case = CASES["generator"]
    net = case.network()
    graph = build_graph(net, case.inputs())
    with graph.unchanged(), pytest.raises(SharedChannelsError, match="several root channels are one channel"):
        graph.get_pruning_group(net.project, tp.prune_linear_out_channels, list(range(48)))
    groups, notes = prunable_groups(graph, net, [])
    assert not notes
    group = next(g for g in groups if g.name == "up.2 (inputs)")
    assert len(group.channels) == 12
    producer = next(part for part in group.parts if part.module is net.project)
    assert producer.roots.bincount(minlength=12).tolist() == [4] * 12
    assert (producer.channels // 4 == producer.roots).all()


def test_halves_that_are_multiplied_leave_in_pairs():
    net = gated(lambda x: x.chunk(2, 1)).eval()
    groups, _ = prunable_groups(build_graph(net, X), net, [])
    group = next(g for g in groups if any(part.module is net.both for part in g.parts if part.is_producer))
    producer = next(part for part in group.parts if part.module is net.both and part.is_producer)
    assert group.name == "next (inputs)"
    assert (producer.channels % 16 == producer.roots).all()
    assert len(producer.channels) == 32
