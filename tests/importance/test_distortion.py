"""Measured distortion, against whole passes and against networks that lost channels and were repaired."""

import copy

import pytest
import torch
from cases import batches, conv_net
from repair_cases import remove_channels
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.importance.distortion import Distortion
from tp_twoaxis.importance.layer_refits import LayerRefits
from tp_twoaxis.repair import repair_network

X = torch.zeros(1, 3, 8, 8)
LOADER = batches(images=64, batch_size=24)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))


class Residual(nn.Module):
    """Blocks that share a ReLU in place and add in place, a concatenation, and attention on top."""

    class Block(nn.Module):
        def __init__(self, relu):
            super().__init__()
            self.conv1, self.conv2, self.relu = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 1), relu

        def forward(self, x):
            y = self.conv2(self.relu(self.conv1(x)))
            y += x
            return self.relu(y)

    def __init__(self):
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.stem, self.block1, self.block2 = nn.Conv2d(3, 6, 3, padding=1), self.Block(relu), self.Block(relu)
        self.merge = nn.Conv2d(12, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.block1(self.stem(x))
        x = self.merge(torch.cat([x, self.block2(x)], 1)).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Counting(nn.Module):
    """A network whose output depends on how often a layer was called: nothing may be replayed."""

    class Layer(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (1 + self.calls % 7)

    def __init__(self):
        super().__init__()
        self.first, self.second = self.Layer(192, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)))


def measured_slowly(distortion, changes):
    """Squared distances from whole passes over single images."""
    found = []
    with torch.no_grad():
        for image in distortion.images:
            dense = distortion.network(image[None]).double()
            applied = [change.applied() for change in changes.values()]
            for one in applied:
                one.__enter__()
            found.append((distortion.network(image[None]).double() - dense).square().sum())
            for one in applied:
                one.__exit__(None, None, None)
    return torch.stack(found)


@pytest.mark.parametrize("make", [conv_net, Residual, mlp])
def test_trials_are_those_of_whole_passes(make, monkeypatch):
    torch.manual_seed(0)
    net = make().eval()
    stats = calibrate(net, LOADER, target=None, consumers=True, progress=False)
    monkeypatch.setattr("tp_twoaxis.importance.distortion.BATCH", 10)
    distortion = Distortion(net, stats, LOADER, images=25, progress=False)
    names = [n for n, m in distortion.layers.items() if isinstance(m, (nn.Conv2d, nn.Linear, nn.MultiheadAttention))]
    names = [name for name in names if name != "attention.out_proj"]
    trials = {}
    for name in reversed(names):
        width = distortion.layers[name].embed_dim if name == "attention" else stats[name].input_mean.shape[0]
        for share in (2, 3):
            missing = torch.arange(width) % share == 0
            trials[name, share] = {name: distortion.refits.change(name, missing)}
    trials["both"] = trials[names[1], 2] | trials[names[2], 2]
    got = distortion.measure(trials, range(25))
    assert list(distortion._replayable.values()) == [True] * (len(names) + 1)
    for key, changes in trials.items():
        torch.testing.assert_close(got[key], measured_slowly(distortion, changes), rtol=1e-4, atol=1e-10)
    parts = [distortion.measure(trials, images)["both"] for images in (range(3), range(3, 25))]
    torch.testing.assert_close(torch.cat(parts), got["both"], rtol=1e-4, atol=1e-10)


def test_networks_that_cannot_be_replayed_are_run_as_a_whole():
    torch.manual_seed(0)
    net = Counting().eval()
    loader = [x for x, _ in LOADER]
    stats = calibrate(net, loader, target=None, consumers=True, progress=False)
    distortion = Distortion(net, stats, loader, progress=False)
    assert distortion({"second": torch.arange(6) < 3}) > 0.0
    assert list(distortion._replayable.values()) == [False]


def test_distortion_is_that_of_a_network_that_lost_the_channels_and_was_repaired(monkeypatch):
    net = mlp()
    loader = [x for x, _ in LOADER]
    stats = calibrate(net, loader, target=None, consumers=True, progress=False)
    monkeypatch.setattr("tp_twoaxis.importance.layer_refits.LARGEST_FITTED_PATCH", 0)  # by channels, as ridge does it
    distortion = Distortion(net, stats, loader, progress=False)
    missing = torch.zeros(12, dtype=torch.bool)
    missing[[1, 5, 6]] = True
    got = distortion({"3": missing})
    pruned = copy.deepcopy(net)
    dense, masks = remove_channels(pruned, X, {"1": [1, 5, 6]})
    repair_network(pruned, dense, masks, ("ridge",), stats=stats, progress=False)
    with torch.no_grad():
        before, after = dense(distortion.images).double(), pruned(distortion.images).double()
    expected = (after - before).square().sum(1).mean() / before.var(0, correction=0).sum()
    assert got == pytest.approx(float(expected), rel=1e-3)


def test_a_wide_last_layer_does_not_look_free_because_its_images_were_fitted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 96), nn.ReLU(), nn.Linear(96, 5)).eval()
    loader = [x for x, _ in batches(images=60, batch_size=20)]
    stats = calibrate(net, loader, target=None, consumers=True, progress=False)
    missing = {"3": torch.arange(96) % 3 == 0}
    apart, together = (Distortion(net, stats, loader, progress=False) for _ in range(2))
    seen = {tuple(image.flatten().tolist()) for batch in apart.refits.batches for image in batch}
    judged = {tuple(image.flatten().tolist()) for image in apart.images}
    assert (len(seen), len(judged), len(seen & judged)) == (36, 24, 0)
    together.refits = LayerRefits(together.network, stats, [together.images])
    assert apart(missing) > 1.5 * together(missing)


def test_the_repeated_share_is_what_runs_from_the_layer_on():
    net = conv_net()
    stats = calibrate(net, LOADER, target=None, consumers=True, progress=False)
    distortion = Distortion(net, stats, LOADER, progress=False)
    macs = distortion.macs.by_module
    assert distortion.repeated_share(["conv1", "fc"]) == 1.0
    assert distortion.repeated_share(["reduce"]) == pytest.approx((macs["reduce"] + macs["fc"]) / distortion.macs.total)


def test_logits_that_are_no_numbers_count_as_a_large_distortion():
    net = mlp()
    stats = calibrate(net, LOADER, target=None, consumers=True, progress=False)
    distortion = Distortion(net, stats, LOADER, progress=False)
    change = distortion.refits.change("3", torch.arange(12) < 3)
    change.parameters[0].data[0, 5] = torch.inf
    found = distortion.measure({"": {"3": change}}, range(len(distortion.images)))[""]
    assert bool(torch.isfinite(found).all())
    assert float(found.max()) == pytest.approx(1e6 * distortion.power(len(distortion.images)))


def test_images_that_look_alike_are_refused():
    net = mlp()
    stats = calibrate(net, LOADER, target=None, consumers=True, progress=False)
    with pytest.raises(TwoAxisError, match="images that the network tells apart, got 25 with the same logits"):
        Distortion(net, stats, [torch.zeros(64, 3, 8, 8)], progress=False)
