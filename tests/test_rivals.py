"""The rivals of the benchmarks: folding channels that are alike, and factors of full rank, change nothing."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tp_twoaxis.dependency.flops import count_macs
from tp_twoaxis.models.cifar_resnet import cifar_resnet20_conv_shortcut, cifar_resnet20_option_a

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
EXAMPLE = torch.zeros(1, 3, 16, 16)


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    if not (BENCHMARKS / "model_folding.py").is_file():
        pytest.skip("the benchmarks are not part of an installed package")
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def varied(network):
    """Give BatchNorms statistics and weights of their own, so that channels differ in all that folding looks at."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                values.data.add_(torch.rand(values.shape, generator=generator))
    return network.eval()


def doubled():
    """A network of two convolutions of which channels 2k and 2k + 1 are alike."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
    )
    varied(network)
    with torch.no_grad():
        for layer in (network[0], network[1], network[3]):
            for values in (*layer.parameters(), *layer.buffers()):
                if values.ndim:
                    values[1::2] = values[::2]
    return network


def test_folding_channels_that_are_alike_changes_nothing():
    from model_folding import fold_channels

    network, x = doubled(), torch.randn(4, 3, 16, 16)
    folded = fold_channels(network, EXAMPLE, 0.5, seed=0)
    assert (folded[0].out_channels, folded[3].groups, folded[4].in_channels) == (4, 4, 4)
    torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_cluster_becomes_its_mean_and_is_read_as_a_sum():
    from model_folding import fold_channels

    network = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0], [9.0], [2.0]]))
        network[0].bias.zero_()
        network[1].weight.copy_(torch.tensor([[10.0, 20.0, 40.0]]))
    folded = fold_channels(network, torch.zeros(1, 1), 0.67, seed=0)
    assert folded[0].weight[:, 0].tolist() == [1.5, 9.0]
    assert folded[1].weight[0].tolist() == [50.0, 20.0]


@pytest.mark.parametrize("factory", [cifar_resnet20_conv_shortcut, cifar_resnet20_option_a])
def test_folding_reaches_the_macs(factory):
    from model_folding import fold

    torch.manual_seed(0)
    network = varied(factory())
    folded = fold(network, EXAMPLE, 0.5, seed=0)
    assert count_macs(folded, EXAMPLE).total / count_macs(network, EXAMPLE).total == pytest.approx(0.5, abs=0.02)
    assert torch.isfinite(folded(torch.randn(2, 3, 16, 16))).all()


def test_factors_reach_the_macs_and_at_full_rank_change_nothing():
    from low_rank import factors_of, truncate

    torch.manual_seed(0)
    network, x = varied(cifar_resnet20_conv_shortcut()), torch.randn(32, 3, 16, 16)
    factors = factors_of(network, [(x, torch.zeros(32, dtype=torch.long))])
    truncated = truncate(network, EXAMPLE, 0.5, factors)
    assert count_macs(truncated, EXAMPLE).total / count_macs(network, EXAMPLE).total == pytest.approx(0.5, abs=0.02)
    own = factors["layer1.0.conv1"]
    whole = (own.left[:, : len(own.values)] * own.values) @ own.right
    torch.testing.assert_close(whole.float().reshape(own.layer.weight.shape), own.layer.weight, rtol=1e-4, atol=1e-5)
    z = torch.randn(2, 16, 8, 8)
    pair = own.layers(float(own.worth[8]))
    low = (own.left[:, :8] * own.values[:8]) @ own.right[:8]
    slow = nn.functional.conv2d(z, low.float().reshape(own.layer.weight.shape), None, own.layer.stride, 1)
    torch.testing.assert_close(pair(z), slow, rtol=1e-4, atol=1e-5)
