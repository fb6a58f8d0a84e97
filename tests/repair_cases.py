"""Networks in which a channel is an affine function of others, and a way to remove chosen channels."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.channel_masks import pruned_channels
from tp_twoaxis.dependency.graph import build_graph, group_key, prunable_groups
from tp_twoaxis.dependency.removal import remove


def remove_channels(net: nn.Module, x: Tensor, removed: dict[str, list[int]]):
    """Remove output channels, producer -> channels; return the dense copy, and the channels that each layer lost."""
    dense = copy.deepcopy(net)
    graph = build_graph(net, x)
    groups, _ = prunable_groups(graph, net, [])
    leaving = {}
    for group in groups:
        for part in group.parts:
            for name, channels in removed.items():
                if part.is_producer and part.module is net.get_submodule(name):
                    roots = part.roots[torch.isin(part.channels, torch.tensor(channels))].numpy()
                    leaving[group_key(group)] = np.isin(np.arange(len(group.channels)), roots)
    assert len(leaving) == len(removed)
    masks = pruned_channels(groups, leaving, net)
    remove(graph, groups, leaving)
    return dense, masks


def double(layer: nn.Module, channel: int, source: int) -> None:
    """Make an output channel of a layer twice another one."""
    with torch.no_grad():
        layer.weight[channel] = 2 * layer.weight[source]
        if layer.bias is not None:
            layer.bias[channel] = 2 * layer.bias[source]


def settle(net: nn.Module, x: Tensor) -> None:
    """Give every BatchNorm the mean and variance of its inputs in eval mode."""

    def hook(norm, inputs):
        rows = inputs[0].transpose(0, 1).flatten(1)
        norm.running_mean, norm.running_var = rows.mean(1), rows.var(1)

    handles = [m.register_forward_pre_hook(hook) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()


def same_norm(norm: nn.Module, channel: int, source: int, factor: float = 2.0) -> None:
    """Let BatchNorm scale two proportional channels so that they stay proportional."""
    with torch.no_grad():
        norm.weight[channel] = norm.weight[source] * factor
        norm.bias[channel] = norm.bias[source] * factor


class Residual(nn.Module):
    """A residual stream with two blocks: the last channel of each producer is twice its first."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a, self.b = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.c, self.d = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 1)
        self.head = nn.Linear(6, 4)
        for producer in (self.stem, self.b, self.d):
            double(producer, 5, 0)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        x = torch.relu(x + self.d(torch.relu(self.c(x))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """One head of self-attention; value channel 3 is affine in 0 and 1, and the weights of attention sum to 1.

    Torch-Pruning couples query, key and value, so channel 3 leaves all of them; the query is 0 there.
    """

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(*shape) for shape in ((6, 5), (6, 5), (6, 5), (5, 6)))
        self.head = nn.Linear(6, 4)
        with torch.no_grad():
            self.q.weight[3], self.q.bias[3] = 0, 0
            self.v.weight[3] = 2 * self.v.weight[0] - self.v.weight[1]
            self.v.bias[3] = 2 * self.v.bias[0] - self.v.bias[1] + 0.5

    def forward(self, x):
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.head((x + self.proj(weights @ self.v(x))).mean(1))


class ConvNeXt(nn.Module):
    """A stem and one block with LayerNorm and layer scale; hidden channel 3 of the block equals channel 0."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, stride=2)
        self.dw, self.norm = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.LayerNorm(6)
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)
        self.gamma = nn.Parameter(torch.full((6,), 0.5))
        self.head = nn.Linear(6, 4)
        with torch.no_grad():
            self.fc1.weight[3], self.fc1.bias[3] = self.fc1.weight[0], self.fc1.bias[0]

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.fc2(nn.functional.gelu(self.fc1(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


def conv_bn_relu_conv():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)
    )
    double(net[0], 5, 0)
    same_norm(net[1], 5, 0)
    return net


def expand_depthwise_project():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
    )
    double(net[0], 5, 0)
    same_norm(net[1], 5, 0)
    with torch.no_grad():
        net[3].weight[5] = net[3].weight[0]
    same_norm(net[4], 5, 0)
    return net


def flatten_linear():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 4))
    double(net[0], 4, 1)
    return net


def mlp():
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), nn.Linear(6, 4))
    with torch.no_grad():
        net[0].weight[3], net[0].bias[3] = net[0].weight[0], net[0].bias[0]
    return net


IMAGE, TOKENS = (64, 3, 10, 10), (64, 7, 6)
CASES = {
    "conv-BN-ReLU-conv": (conv_bn_relu_conv, IMAGE, {"0": [5]}),
    "residual stream": (Residual, IMAGE, {"stem": [5]}),
    "expand-depthwise-project": (expand_depthwise_project, IMAGE, {"0": [5]}),
    "flatten-linear": (flatten_linear, IMAGE, {"0": [4]}),
    "transformer MLP": (mlp, TOKENS, {"0": [3]}),
    "attention value-proj": (Attention, TOKENS, {"v": [3]}),
    "ConvNeXt": (ConvNeXt, IMAGE, {"fc1": [3]}),
}


def case(name: str):
    """A float64 network in eval mode whose BatchNorms agree with the images, the images, and what to remove."""
    make, shape, removed = CASES[name]
    torch.manual_seed(0)
    net = make().double().eval()
    x = torch.randn(*shape, dtype=torch.float64)
    settle(net, x)
    return net, x, removed
