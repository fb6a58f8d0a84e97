"""Triplet excess against least squares on the images themselves."""

import itertools

import numpy as np
import pytest
import reference_collapse
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.triplets import triplet_excess, triplet_table
from tp_twoaxis.statistics import pooled_samples


def test_equals_least_squares():
    generator = np.random.default_rng(0)
    samples = generator.normal(size=(300, 5)) @ generator.normal(size=(5, 5))
    target = samples @ generator.normal(size=5) + 3 * generator.normal(size=300)
    rho = torch.tensor(np.corrcoef(samples, target[:, None], rowvar=False))
    triples = torch.combinations(torch.arange(5), 3)
    found = triplet_excess(rho[:5, 5], rho[:5, :5], triples)
    for triple, value in zip(triples.tolist(), found.tolist(), strict=True):
        pairs = [reference_collapse.gaussian_information(samples, target, p) for p in itertools.combinations(triple, 2)]
        expected = reference_collapse.gaussian_information(samples, target, tuple(triple)) - max(pairs)
        assert value == pytest.approx(max(expected, 0.0), abs=1e-9)


def test_collinear_channels_add_nothing_and_columns_are_averaged():
    correlation = torch.ones(3, 3, dtype=torch.float64)
    correlation[2, :2] = correlation[:2, 2] = 0.5
    task = torch.tensor([0.6, 0.6, 0.4], dtype=torch.float64)
    triples = torch.tensor([[0, 1, 2]])
    assert float(triplet_excess(task, correlation, triples)) == pytest.approx(0.0, abs=1e-9)
    several = torch.stack([torch.full((3,), 0.5), torch.zeros(3)], dim=1)
    one = triplet_excess(several[:, 0], torch.eye(3), triples)
    torch.testing.assert_close(triplet_excess(several, torch.eye(3), triples), one / 2)


def test_the_table_equals_loops_over_all_triplets():
    net, loader = conv_net(), batches(200, 100)
    with torch.no_grad():
        net.conv2.weight[3] = 0.0  # a constant channel
    stats, samples = calibrate(net, loader, progress=False), pooled_samples(net, loader, progress=False)
    table = triplet_table(stats, ["conv1", "conv2", "reduce"], most_relevant=6).set_index("layer")
    assert table.depth.tolist() == [0.0, 0.5, 1.0]
    assert (table.triples == 20).all()
    assert (table.chance == 1 / 400).all()
    target = samples.target_values().numpy()
    for name in table.index:
        values = samples.outputs[name].double().numpy()
        varying = [k for k in range(values.shape[1]) if name != "conv2" or k != 3]
        relevance = {k: reference_collapse.gaussian_information(values, target, (k,)) for k in varying}
        top = sorted(varying, key=lambda k: -relevance[k])[:6]
        assert table.ratio[name] == pytest.approx(reference_collapse.triplet_ratio(values, target, top), rel=1e-3)


def test_many_triplets_are_drawn_once_each():
    net, loader = conv_net(width=32), batches(120, 60)
    stats = calibrate(net, loader, progress=False)
    full, drawn, again = (triplet_table(stats, ["conv1"], triples=n).iloc[0] for n in (2024, 1500, 1500))
    assert (full.channels, full.triples, drawn.triples) == (24, 2024, 1500)
    assert drawn.triplet_excess == again.triplet_excess
    assert drawn.triplet_excess == pytest.approx(full.triplet_excess, rel=0.1)
    assert drawn.pair_excess == full.pair_excess


def test_a_layer_of_two_channels_has_none():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    table = triplet_table(calibrate(net, [(x, y % 2) for x, y in batches()], progress=False), ["0"])
    assert len(table) == 0
    assert "ratio" in table.columns
