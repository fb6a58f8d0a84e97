"""What decides how many channels each layer loses: not its width, nor one extreme channel, but how weak channels are.

Each normaliser against the four properties of its module's table, and the scores on networks that compute the same.
"""

import math

import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_twoaxis import HybridImportance, TwoAxisImportance, calibrate, prune_to_flops
from tp_twoaxis.importance.normalize import normalize
from tp_twoaxis.scores import SCORES

# normaliser -> which of scale, width, one channel and spread it has
PROPERTIES = {
    "median": "scale width one spread",
    "sentinel_0.5": "scale width one spread",
    "mean": "scale width spread",
    "max": "scale width spread",
    "sum": "scale spread",
    "lamp": "scale",
    "standarization": "scale width",
    "gaussian": "scale",
    "softmax": "width spread",
    None: "width one spread",
}
ORDERED = [name for name, entry in SCORES.items() if entry.allocation]


def scores(n=9):
    return torch.linspace(0.5, 2.0, n, dtype=torch.float64)


def keeps_scale(name):
    return torch.allclose(normalize(8.0 * scores(), name), normalize(scores(), name), rtol=1e-6)


def keeps_width(name):
    once, twice = normalize(scores(), name), normalize(scores().repeat(2), name)
    return torch.allclose(twice[:9], once, rtol=1e-6) and torch.allclose(twice[9:], once, rtol=1e-6)


def withstands_one_channel(name):
    extreme = scores()
    extreme[-1] = 1e3
    before, after = normalize(scores(), name)[:-1], normalize(extreme, name)[:-1]
    return bool(((after - before).abs() <= 0.5 * before.abs().max()).all())


def keeps_spread(name):
    close = 1.0 + 1e-4 * scores()
    got = normalize(close, name)
    return bool(got.max() - got.min() <= 1e-3 * (1.0 + got.abs().max()))


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize(
    ("held", "which"),
    [
        (keeps_scale, "scale"),
        (keeps_width, "width"),
        (withstands_one_channel, "one"),
        (keeps_spread, "spread"),
    ],
)
def test_properties_of_normalizers(name, held, which):
    assert held(name) == (which in PROPERTIES[name].split())


class Net(nn.Module):
    """A convolution whose channels are scaled, BatchNorm behind it, and a second convolution."""

    def __init__(self, width=12):
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width, eps=1e-12)
        self.second, self.fc = nn.Conv2d(width, 10, 1), nn.Linear(10, 4)

    def forward(self, x):
        return self.fc(self.second(self.bn(self.first(x)).relu()).relu().mean((2, 3)))


def images():
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(64, 3, 7, 7, generator=generator).double(), torch.randint(4, (64,), generator=generator))]


def network():
    torch.manual_seed(0)
    net = Net().double()
    with torch.no_grad():
        net.first.weight *= torch.linspace(0.5, 2.0, 12).double()[torch.randperm(12)][:, None, None, None]
    net.train()(images()[0][0])
    return net.eval()


def doubled(net):
    """The same function with every channel of the first layer there twice, halves behind it."""
    wide = Net(24).double()
    state = net.state_dict()
    for name, tensor in state.items():
        if tensor.ndim and name.startswith(("first", "bn")):
            state[name] = tensor.repeat(2, *[1] * (tensor.ndim - 1))
    wide.load_state_dict({**state, "second.weight": net.second.weight.detach().repeat(1, 2, 1, 1) / 2})
    return wide.eval()


def louder(net, channel, factor):
    """The same function with one channel of the first layer larger, which BatchNorm takes back."""
    with torch.no_grad():
        net.first.weight[channel] *= factor
        net.bn.running_mean[channel] *= factor
        net.bn.running_var[channel] *= factor**2
    return net


def importance_of(net, score, **options):
    stats = calibrate(net, images(), positions="all", gradients=True, progress=False)
    group = (
        tp.DependencyGraph()
        .build_dependency(net, images()[0][0][:1], verbose=False)
        .get_pruning_group(net.first, tp.prune_conv_out_channels, list(range(net.first.out_channels)))
    )
    return TwoAxisImportance(stats, score, **options)(group)


# redundant copies make a channel more replaceable, which hulls and clusters are there to see
@pytest.mark.parametrize("score", ["capture", "variance", "task-mi", "low-overlap", "composite-local", "norm-local"])
def test_a_layer_twice_as_wide_has_the_same_importances(score):
    net = network()
    wide = doubled(net)
    torch.testing.assert_close(wide(images()[0][0]), net(images()[0][0]))
    once, twice = importance_of(net, score), importance_of(wide, score)
    torch.testing.assert_close(twice, once.repeat(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "score", ["capture", "variance", "hull", "composite-local", "norm-local", "cap-a", "spectral-rs"]
)
def test_one_extreme_channel_leaves_the_others_where_they_were(score):
    others = torch.arange(12) != 7
    before = importance_of(network(), score)
    net = louder(network(), 7, 1e4)
    torch.testing.assert_close(net(images()[0][0]), network()(images()[0][0]))
    after = importance_of(net, score)
    assert int(after.argmax()) == 7
    # the median moves by one place of twelve, z-scores and clusters may order others anew
    ratio = after[others].sort().values / before[others].sort().values
    assert ratio.min() > 0.6
    assert ratio.max() < 1.0 / 0.6


@pytest.mark.parametrize("normalizer", ["mean", "softmax"])
def test_which_the_other_normalizers_do_not(normalizer):
    others = torch.arange(12) != 7
    score = "variance" if normalizer == "mean" else "norm-local"
    before = importance_of(network(), score, normalizer=normalizer)
    after = importance_of(louder(network(), 7, 1e4), score, normalizer=normalizer)
    assert (after[others] / before[others]).median() < 0.6


# powers, which differ here, say nothing of the target
POWERS = [name for name in ("capture", "variance", *ORDERED) if SCORES[name].axis == "local"]


@pytest.mark.parametrize("score", POWERS)
def test_a_layer_without_weak_channels_keeps_them(score):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 20, bias=False), nn.Linear(20, 20, bias=False), nn.Linear(20, 4)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.linalg.qr(torch.randn(40, 20).double()).Q.T)  # all of about the same power
        net[1].weight.copy_(torch.linalg.qr(torch.randn(20, 20).double()).Q * torch.logspace(-1, 1, 20)[:, None])
    x = torch.randn(4000, 40).double()
    importance = TwoAxisImportance(calibrate(net, [x], target=None, progress=False), score)
    report = prune_to_flops(net, x[:1], importance, flops=0.75, repair=(), progress=False)
    kept = {group.name: len(group.kept) for group in report.groups}
    assert kept["0"] >= 19  # one may fill a gap
    assert kept["1"] < 16


@pytest.mark.parametrize("score", ORDERED)
def test_scores_that_only_order_take_their_allocation_from_another(score):
    net, entry = network(), SCORES[score]
    stats = calibrate(net, images(), positions="all", progress=False)
    group = (
        tp.DependencyGraph()
        .build_dependency(net, images()[0][0][:1], verbose=False)
        .get_pruning_group(net.first, tp.prune_conv_out_channels, list(range(12)))
    )
    raw = TwoAxisImportance(stats, score, normalizer=None)
    slow = HybridImportance(TwoAxisImportance(stats, entry.allocation), raw)(group)
    torch.testing.assert_close(TwoAxisImportance(stats, score)(group), slow)
    assert raw(group).argsort().tolist() == TwoAxisImportance(stats, score)(group).argsort().tolist()
    assert not math.isclose(float(slow.min()), float(raw(group).min()))
