"""Networks and groups that the tests of the baselines share."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import nn

X = torch.zeros(1, 3, 8, 8)


def full_group(net, name, x=X):
    """The group of all output channels of a layer."""
    graph = tp.DependencyGraph().build_dependency(net, x, verbose=False)
    layer = net.get_submodule(name)
    pruner = graph.get_pruner_of_module(layer)
    return graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(pruner.get_out_channels(layer))))


class Residual(nn.Module):
    """Two producers of one stream; it is read by a convolution and, pooled and flattened, by a linear layer."""

    def __init__(self, width=6):
        super().__init__()
        self.first, self.bn_first = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second, self.bn_second = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(4 * width, 5)

    def forward(self, x):
        x = torch.relu(self.bn_first(self.first(x)))
        x = torch.relu(x + self.bn_second(self.second(x)))
        return self.fc(self.pool(x).flatten(1))


def residual(seed=0):
    torch.manual_seed(seed)
    net = Residual()
    for norm in (net.bn_first, net.bn_second):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.weight)
    return net.eval()


def reorder(net, order):
    """Permute the channels of a :class:`Residual` network's stream, in place; its function stays."""
    with torch.no_grad():
        for conv in (net.first, net.second):
            conv.weight.copy_(conv.weight[order].clone())
        net.second.weight.copy_(net.second.weight[:, order].clone())
        net.second.bias.copy_(net.second.bias[order].clone())
        for norm in (net.bn_first, net.bn_second):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.copy_(tensor[order].clone())
        columns = torch.cat([torch.arange(4) + 4 * int(k) for k in order])
        net.fc.weight.copy_(net.fc.weight[:, columns].clone())
    return net
