"""Propagation: equation 13 against loops, sums of several layers, blocks of the matrix, types, and what is refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from cases import batches, conv_net
from scipy.stats import spearmanr
from torch import nn

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.diagnostics.propagation import (
    axis_contrast,
    channel_types,
    propagation_edges,
    propagation_section,
    routed,
    routing_table,
    routing_weights,
    type_table,
)
from tp_twoaxis.models.cifar_resnet import CifarResNet
from tp_twoaxis.scores import local, target

DEPTHS = {"conv1": 0.0, "conv2": 0.3, "depthwise": 0.6, "reduce": 1.0}


def evidence(net, size=8, classes=5, **options):
    data = batches(104, size=size, classes=classes)
    return EvidenceInputs(net, calibrate(net, data, progress=False, **options), data, progress=False)


def residual_net():
    torch.manual_seed(0)
    net = CifarResNet(8, 5, "pad").eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(5, 4, 3), nn.Conv2d(6, 4, (1, 3), groups=2), nn.Conv2d(4, 8, 3, groups=4), nn.ConvTranspose2d(4, 6, 2)],
)
def test_equation_13_equals_its_slow_twin(layer):
    torch.manual_seed(0)
    values = torch.randn(layer.in_channels, dtype=torch.float64)
    values[1] = math.nan
    weight = layer.weight.detach().double().numpy()
    outputs, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    expected = []
    for k in range(layer.out_channels):
        block = k // outputs
        numerator = denominator = 0.0
        for i in range(inputs):
            j = block * inputs + i
            kernel = weight[j, k - block * outputs] if isinstance(layer, nn.ConvTranspose2d) else weight[k, i]
            norm = math.sqrt(sum(float(v) ** 2 for v in kernel.ravel()))
            if not math.isnan(values[j]):
                numerator += norm * float(values[j])
                denominator += norm
        expected.append(numerator / denominator if denominator else math.nan)
    np.testing.assert_allclose(routed(routing_weights(layer), values).numpy(), expected, rtol=1e-12)


def test_rows_are_rank_correlations_with_what_sources_have():
    net = conv_net()
    inputs = evidence(net)
    edges = {edge.layer: edge for edge in propagation_edges(inputs)}
    assert {name: edge.sources for name, edge in edges.items()} == {
        "conv2": ["conv1"],
        "depthwise": ["conv1", "conv2"],
        "reduce": ["depthwise"],
    }
    stats = inputs.statistics
    table = routing_table(list(edges.values()), dict.fromkeys(edges, 0.5))
    assert len(table) == 3 * 16
    overlap = local.peer_overlap(stats["conv1"].correlation)
    information = target.task_information(stats["conv2"].target_correlation())
    kernels = net.conv2.weight.detach().double().flatten(2).norm(dim=2)
    mean = (kernels @ overlap) / kernels.sum(1)
    row = table[(table.layer == "conv2") & (table.source_quantity == "R") & (table.quantity == "M")].iloc[0]
    assert row.rho == pytest.approx(spearmanr(mean, information).statistic)
    # of a sum the mean of both layers' z-scores; a depthwise channel has one source
    power = [stats[name].variance for name in ("conv1", "conv2")]
    z = [torch.log1p(p / p.quantile(0.5)) for p in power]
    z = sum((values - values.mean()) / values.std(correction=0) for values in z) / 2
    row = table[(table.layer == "depthwise") & (table.source_quantity == "I") & (table.quantity == "I")].iloc[0]
    assert row.rho == pytest.approx(spearmanr(z, stats["depthwise"].variance).statistic)


def test_padding_has_no_source_and_constant_channels_do_not_count():
    net = residual_net()
    with torch.no_grad():
        net.layer1[0].conv1.weight[3] = 0.0
    inputs = evidence(net, size=16)
    edges = {edge.layer: edge for edge in propagation_edges(inputs)}
    assert list(edges)[-1] == "layer3.0.conv2"
    assert edges["layer3.0.conv1"].sources == ["conv1", "layer1.0.conv2", "layer2.0.conv2"]
    assert bool(edges["layer1.0.conv2"].read["I"].isnan()[3])
    assert int(edges["layer1.0.conv2"].read["I"].isnan().sum()) == 1
    table = routing_table(list(edges.values()), dict.fromkeys(edges, 0.0))
    assert table[table.layer == "layer1.0.conv1"].channels.unique().tolist() == [15]
    only = net.layer1[0].conv2
    mask = torch.arange(16) != 3
    values = inputs.statistics["layer1.0.conv1"].variance
    kernels = only.weight.detach().double().flatten(2).norm(dim=2)[:, mask]
    power = torch.log1p(values[mask] / values[mask].quantile(0.5))
    row = table[(table.layer == "layer1.0.conv2") & (table.source_quantity == "I") & (table.quantity == "I")].iloc[0]
    expected = spearmanr((kernels @ power) / kernels.sum(1), inputs.statistics["layer1.0.conv2"].variance).statistic
    assert row.rho == pytest.approx(expected)


def test_blocks_of_the_matrix():
    inputs = evidence(conv_net())
    edges = propagation_edges(inputs)
    table = routing_table(edges, {"conv2": 0.2, "depthwise": 0.5, "reduce": 1.0})
    contrast = axis_contrast(table).set_index("layer")
    assert contrast.depth.tolist() == [0.2, 0.5, 1.0]
    for name, part in table.groupby("layer"):
        cell = part.set_index(["source_quantity", "quantity"]).rho
        within = [np.mean([cell[a, b] for a in axis for b in axis]) for axis in ("IR", "MX")]
        cross = np.mean([cell[a, b] for a, b in cell.index if (a in "IR") != (b in "IR")])
        assert contrast.local[name] == pytest.approx(within[0])
        assert contrast.target[name] == pytest.approx(within[1])
        assert contrast.within_minus_cross[name] == pytest.approx(np.mean(within) - cross)


def test_a_planted_copy_propagates_its_types():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    net.append(nn.Linear(16, 5)).eval()
    with torch.no_grad():
        net[2].weight.copy_(torch.eye(16)[:, :, None, None] + 1e-4 * torch.rand(16, 16, 1, 1))
    inputs = evidence(net)
    edges = propagation_edges(inputs)
    types = type_table(edges, {"2": 1.0}).iloc[0]
    assert (types.same, types.p) == (1.0, 1 / 201)
    assert types.excess == pytest.approx(types.same - types.chance)
    assert 0.1 < types.chance < 0.5
    table = routing_table(edges, {"2": 1.0}).set_index(["source_quantity", "quantity"]).rho
    assert min(table["I", "I"], table["R", "R"], table["M", "M"]) > 0.95


def test_types_equal_their_slow_twin():
    inputs = evidence(conv_net())
    edge = propagation_edges(inputs)[0]
    i, m = edge.written["I"], edge.written["M"]
    own = [(x > np.median(i), y > np.median(m)) for x, y in zip(i.tolist(), m.tolist(), strict=True)]
    i, m = edge.read["I"], edge.read["M"]
    read = [(x > np.median(i), y > np.median(m)) for x, y in zip(i.tolist(), m.tolist(), strict=True)]
    heaviest = [max(range(16), key=lambda j, k=k: float(edge.weights[k, j])) for k in range(16)]
    same = np.mean([own[k] == read[heaviest[k]] for k in range(16)])
    assert type_table([edge], {"conv2": 0.0}).same[0] == pytest.approx(same)
    assert channel_types(torch.full((3,), math.nan), torch.ones(3)).tolist() == [-1, -1, -1]


def test_permuting_channels_changes_nothing():
    net = conv_net()
    with torch.no_grad():
        net.conv1.weight.copy_(net.conv1.weight * torch.linspace(0.2, 2, 16)[:, None, None, None])
    order = torch.randperm(8)
    permuted = copy.deepcopy(net)
    with torch.no_grad():
        permuted.reduce.weight.copy_(net.reduce.weight[order])
        permuted.reduce.bias.copy_(net.reduce.bias[order])
        columns = (4 * order[:, None] + torch.arange(4)).ravel()
        permuted.fc.weight.copy_(net.fc.weight[:, columns])
    first, second = (routing_table(propagation_edges(evidence(n)), DEPTHS) for n in (net, permuted))
    np.testing.assert_allclose(first.rho, second.rho, atol=1e-12)


def test_the_section():
    net = residual_net()
    inputs = evidence(net, size=16)
    before = copy.deepcopy(net.state_dict())
    section = propagation_section(inputs)
    assert list(section.tables) == ["routing", "contrast", "types"]
    assert section.tables["types"].depth.iloc[-1] == 1.0
    assert len(section.claims) == 5
    figure = section.drawings[0].draw()
    assert len(figure.axes) == 3  # with the colour bar
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    again = propagation_section(inputs)
    assert again.tables["types"].equals(section.tables["types"])


def test_networks_it_does_not_apply_to():
    single = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(NotApplicableError, match="no convolution reads what another"):
        propagation_section(evidence(single))
    with pytest.raises(NotApplicableError, match="no task variable"):
        propagation_section(evidence(conv_net(), target=None))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(NotApplicableError, match="no convolution"):
        propagation_section(evidence(flat))
    few = batches(8)
    with pytest.raises(NotApplicableError, match="at least 100 images"):
        propagation_section(EvidenceInputs(conv_net(), calibrate(conv_net(), few, progress=False), few))
    alike = [(images, torch.zeros_like(labels)) for images, labels in batches(104)]
    with pytest.raises(NotApplicableError, match="have one class"):
        propagation_section(EvidenceInputs(conv_net(), calibrate(conv_net(), alike, progress=False), alike))
    # layers with more channels than images are no edges, and no sources
    wide, enough = conv_net(width=120), batches(104)
    with pytest.raises(NotApplicableError, match="no convolution reads"):
        propagation_edges(EvidenceInputs(wide, calibrate(wide, enough, progress=False), enough))
    inputs = evidence(conv_net())
    inputs.calibration = [{"pixel_values": images, "labels": labels} for images, labels in inputs.calibration]
    with pytest.raises(NotApplicableError, match="one tensor of images"):
        propagation_section(inputs)
