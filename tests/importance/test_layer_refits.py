"""Layers that lose inputs: changed while a change is applied, refitted by patches or by channels."""

import pytest
import torch
from cases import batches
from torch import nn

from tp_twoaxis import calibrate
from tp_twoaxis.importance import layer_refits
from tp_twoaxis.importance.layer_refits import LayerRefits

LOADER = batches(images=64, batch_size=24)
IMAGES = [x for x, _ in LOADER]


@torch.no_grad()
def shifted():
    """Channel 3 of the first layer is channel 0, one pixel to the right; the second layer can do without it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    net[0].weight[0, :, :, 2] = 0.0
    net[0].weight[3, :, :, 1:], net[0].weight[3, :, :, 0] = net[0].weight[0, :, :, :2], 0.0
    net[0].bias[3] = net[0].bias[0]
    net[2].weight[:, 3, :, 2] = 0.0  # reads no further than channel 0 is read
    return net.eval()


@pytest.fixture(scope="module")
def net():
    return shifted()


@pytest.fixture(scope="module")
def stats(net):
    return calibrate(net, LOADER, target=None, consumers=True, progress=False)


def moved(net, change):
    x = IMAGES[0]
    with torch.no_grad():
        before = net(x)
        with change.applied():
            after = net(x)
        torch.testing.assert_close(net(x), before, rtol=0, atol=0)  # the layer is as it was
    return float((after - before).square().mean() / before.var())


def test_patches_supply_what_a_shifted_channel_held(net, stats, monkeypatch):
    missing = torch.tensor([False, False, False, True])
    refits = LayerRefits(net, stats, IMAGES)
    assert list(refits.patches(["2", "5"])) == ["2", "5"]
    assert moved(net, refits.change("2", missing)) < 1e-6
    monkeypatch.setattr(layer_refits, "LARGEST_FITTED_PATCH", 35)  # then channels are predicted
    by_channels = LayerRefits(net, stats, IMAGES)
    assert list(by_channels.patches(["2"])) == []
    assert moved(net, by_channels.change("2", missing)) > 1e-3


def test_moments_of_several_layers_come_from_one_pass(net, stats):
    passes = []
    handle = net.register_forward_hook(lambda *_: passes.append(1))
    refits = LayerRefits(net, stats, IMAGES)
    together = refits.patches(["2", "5"])
    assert len(passes) == len(IMAGES)
    refits.patches(["5", "2"])
    assert len(passes) == len(IMAGES)
    refits.forget()
    alone = refits.patches(["2"])
    handle.remove()
    for got, expected in zip(alone["2"].fitted, together["2"].fitted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_layer_without_statistics_reads_zeros(net, stats):
    unknown = calibrate(net, LOADER, layers=["0"], target=None, consumers=True, progress=False)
    grouped = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1, groups=2)).eval()
    change = LayerRefits(grouped, unknown, IMAGES).change("1", torch.tensor([True, False, False, False]))
    x = IMAGES[0]
    with torch.no_grad(), change.applied():
        got = grouped(x)
    inputs = grouped[0](x).clone()
    inputs[:, 0] = 0.0
    torch.testing.assert_close(got, grouped[1](inputs))


def test_the_layer_comes_back_when_the_block_raises(net, stats):
    refits = LayerRefits(net, stats, IMAGES)
    own = net[2].weight, net[2].bias
    with pytest.raises(RuntimeError), refits.change("2", torch.tensor([True, False, False, False])).applied():
        raise RuntimeError
    assert net[2].weight is own[0]
    assert net[2].bias is own[1]
