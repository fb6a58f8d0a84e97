"""Passes that begin at a layer, against whole passes."""

import pytest
import torch
from cases import conv_net
from torch import nn
from torch.nn import functional as F

from tp_twoaxis.runtime.replay import PrefixReplay

X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class InPlaceBlock(nn.Module):
    """Adds to its shortcut in place, as torchvision's blocks do."""

    def __init__(self, relu):
        super().__init__()
        self.conv1, self.conv2, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu = relu

    def forward(self, x):
        y = self.conv2(self.relu(self.conv1(x)))
        y = self.norm(y)
        y += x
        return self.relu(y)


class SharedRelu(nn.Module):
    """One ReLU, in place, in all blocks; the network itself adds in place between them."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.stem = nn.Conv2d(3, 4, 1)
        self.first, self.second = InPlaceBlock(self.relu), InPlaceBlock(self.relu)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.stem(x))
        y = self.first(x)
        y += 0.5 * x
        y *= 2
        return self.fc(self.second(y).mean((2, 3)))


class Dense(nn.Module):
    """Concatenates what all layers before wrote; one of them returns a tuple and a dict."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(6, 4, 3, padding=1)

        def forward(self, x, scale=1.0):
            y = self.conv(x) * scale
            return y.relu(), {"mean": y.mean((2, 3), keepdim=True)}

    def __init__(self):
        super().__init__()
        self.conv1, self.two, self.conv3 = nn.Conv2d(3, 3, 3, padding=1), self.Two(), nn.Conv2d(10, 2, 1)

    def forward(self, x):
        x = torch.cat([x, self.conv1(x)], 1)
        y, more = self.two(x, scale=0.5)
        return self.conv3(torch.cat([x, y + more["mean"]], 1)).flatten(1)


class InvertedBottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.project, self.head = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 2, 8)

    def forward(self, x):
        for _ in range(2):  # the same layers twice
            x = x + self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))
        return self.head(x).flatten(1)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp, self.head = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x)).mean(1))


NETWORKS = {kind.__name__: kind for kind in (SharedRelu, Dense, InvertedBottleneck, Transformer)} | {"conv": conv_net}


def made(name):
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def layers_of(net):
    return [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.MultiheadAttention))]


def called(net, layers):
    calls = []
    handles = [layer.register_forward_pre_hook(lambda layer, _: calls.append(layer)) for layer in layers]
    with torch.no_grad():
        net(X)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_replay_gives_what_a_whole_pass_gives_to_the_bit(name):
    net = made(name)
    replay = PrefixReplay(net, lambda: net(X.clone()))
    for layer in dict.fromkeys(called(net, layers_of(net))):
        assert replay.advance([layer])
        own = {key: value.clone() for key, value in layer.state_dict().items()}
        for scale in (1.0, 0.5, -2.0):
            for key, value in layer.named_parameters():
                value.copy_(scale * own[key])
            with replay.replaying():
                got = net(X.clone())
            torch.testing.assert_close(got, net(X.clone()), rtol=0, atol=0)
        layer.load_state_dict(own)
    assert not any("forward" in module.__dict__ for module in net.modules())


@torch.no_grad()
def test_outputs_that_no_pass_changes_are_handed_out_as_they_are():
    net = made("SharedRelu")
    replay = PrefixReplay(net, lambda: net(X.clone()))
    assert replay.advance([net.second.conv2])
    seen = []
    handles = [
        module.register_forward_hook(lambda module, _, output: seen.append((module, output)))
        for module in (net.first, net.second.conv1, net.stem)
    ]
    for _ in range(3):
        with replay.replaying():
            net(X.clone())
    for handle in handles:
        handle.remove()
    by_module = {module: [output.data_ptr() for owner, output in seen if owner is module] for module, _ in seen}
    assert by_module[net.first][1] != by_module[net.first][2]  # the network adds to it in place
    assert by_module[net.second.conv1][1] == by_module[net.second.conv1][2]  # its ReLU, which is replayed, did that


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_replay_from_behind_a_layer_lets_its_hooks_change_what_it_wrote(name):
    net = made(name)
    replay = PrefixReplay(net, lambda: net(X.clone()))
    for layer in dict.fromkeys(called(net, layers_of(net))):
        assert replay.advance([layer], including=True)
        original, runs = layer.forward, []
        layer.forward = lambda *args, original=original, runs=runs, **kwargs: (
            runs.append(1),
            original(*args, **kwargs),
        )[1]
        calls = called(net, [layer])
        runs.clear()
        for scale in (1.0, -2.0):
            handle = layer.register_forward_hook(
                lambda _, inputs, y, scale=scale: (scale * y[0], *y[1:]) if isinstance(y, tuple) else scale * y
            )
            with replay.replaying():
                got = net(X.clone())
            assert len(runs) == len(calls) - 1  # the first call is not made again
            torch.testing.assert_close(got, net(X.clone()), rtol=0, atol=0)
            runs.clear()
            handle.remove()
        del layer.forward


@torch.no_grad()
def test_a_walk_through_all_layers_costs_one_pass():
    net = made("conv")
    replay, runs = PrefixReplay(net, lambda: net(X)), []
    for layer in layers_of(net):
        original = layer.forward
        layer.forward = lambda x, layer=layer, original=original: (runs.append(layer), original(x))[1]
    for layer in layers_of(net):
        assert replay.advance([layer])
    assert runs == layers_of(net)[:-1]
    with replay.replaying():
        net(X)
    assert runs == layers_of(net)


@torch.no_grad()
def test_it_stops_at_the_first_of_several_layers():
    net = made("conv")
    replay, runs = PrefixReplay(net, lambda: net(X)), []
    assert replay.advance([net.fc, net.conv2])
    net.bn1.register_forward_hook(lambda *_: runs.append("hooks run"))
    net.conv2.register_forward_pre_hook(lambda *_: runs.append("second"))
    net.conv1.weight.zero_()
    with replay.replaying():
        got = net(X)
    assert runs == ["hooks run", "second"]
    assert float(got.std(0).sum()) > 1e-3  # not of the zeroed layer


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(192, 4), nn.Linear(4, 3)

    def forward(self, x):
        return F.linear(self.first(x.flatten(1)), self.second.weight, self.second.bias)


@torch.no_grad()
def test_a_layer_that_is_never_called_is_reported():
    net = Functional().eval()
    replay = PrefixReplay(net, lambda: net(X))
    assert not replay.advance([net.second])
    with replay.replaying():
        torch.testing.assert_close(net(X), net(X), rtol=0, atol=0)


def test_going_back_is_reported_and_starts_anew():
    net = made("SharedRelu")
    replay = PrefixReplay(net, lambda: net(X))
    assert replay.advance([net.second.conv1])
    assert not replay.advance([net.first.conv2])
    assert replay.advance([net.first.conv2])


def test_forwards_come_back_when_a_pass_raises():
    net = made("conv")
    replay = PrefixReplay(net, lambda: net(X[:, :2]))
    with pytest.raises(RuntimeError):
        replay.advance([net.fc])
    assert not any("forward" in module.__dict__ for module in net.modules())
