"""Low-rank factors of convolutions that keep their outputs best: truncated SVD of the weight times its inputs' spread.

A convolution with weight W, [O, P], reads patches of covariance S = L L'. Of all matrices of rank r, the one nearest to
W in the outputs' mean square is the truncated SVD of W L, times L^-1: a convolution to r channels and one of 1 x 1 to
O. A component's share of the layer's output variance over what it costs decides which stay, over all layers alike.
"""

from __future__ import annotations

import copy
import math

import torch
from cifar_resnets import patch_covariances
from model_folding import nearest
from torch import Tensor, nn

from tp_twoaxis.dependency.flops import count_macs

IMAGES = 512  # for the covariances, at all positions
RIDGE = 1e-6  # of the mean variance


class Factors:
    """The two factors of one convolution's weight, for every rank.

    Args:
        layer: a convolution of one group.
        covariance: [P, P] float64, of the patches that it reads.
        positions: output positions of an image.
    """

    def __init__(self, layer: nn.Conv2d, covariance: Tensor, positions: int) -> None:
        ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        root = torch.linalg.cholesky(covariance + ridge)
        self.layer, self.positions = layer, positions
        self.outputs, self.patch = layer.out_channels, len(covariance)
        self.left, self.values, right = torch.linalg.svd(layer.weight.detach().double().flatten(1) @ root)
        right = right[: len(self.values)]
        self.right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
        cost = positions * (self.patch + self.outputs)
        self.worth = self.values.square() / self.values.square().sum() / cost

    def rank(self, least: float) -> int | None:
        """Count the components that are worth so much a MAC, at least one; None where the layer as it is costs less."""
        rank = max(1, int((self.worth > least).sum()))
        return rank if rank * (self.patch + self.outputs) < self.patch * self.outputs else None

    def saved(self, least: float) -> float:
        """Count the MACs that two layers save."""
        rank = self.rank(least)
        if rank is None:
            return 0.0
        return float(self.positions * (self.patch * self.outputs - rank * (self.patch + self.outputs)))

    def layers(self, least: float) -> nn.Module:
        """Build the two layers, or give the one as it is."""
        rank, old = self.rank(least), self.layer
        if rank is None:
            return copy.deepcopy(old)
        first = copy.deepcopy(old)
        first.out_channels, first.bias = rank, None
        scale = self.values[:rank].sqrt()
        rows = (scale[:, None] * self.right[:rank]).reshape(rank, *old.weight.shape[1:])
        first.weight = nn.Parameter(rows.to(old.weight))
        second = nn.Conv2d(rank, old.out_channels, 1, bias=old.bias is not None)
        second.weight = nn.Parameter((self.left[:, :rank] * scale)[:, :, None, None].to(old.weight))
        second.bias = copy.deepcopy(old.bias)
        return nn.Sequential(first, second)


def factors_of(dense: nn.Module, images: list[tuple[Tensor, Tensor]]) -> dict[str, Factors]:
    """Factorise every convolution but the first."""
    names = [name for name, layer in dense.named_modules() if isinstance(layer, nn.Conv2d)][1:]
    covariances = patch_covariances(dense, names, images, IMAGES)
    found = {}
    for name in names:
        layer = dense.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        found[name] = Factors(layer, *covariances[name])
    return found


def truncate(dense: nn.Module, example: Tensor, share: float, factors: dict[str, Factors]) -> nn.Module:
    """Replace convolutions of a copy by their factors, to a share of its MACs."""
    worth = torch.cat([own.worth for own in factors.values()]).log()
    target = (1 - share) * count_macs(dense, example).total

    def reached(least: float) -> float:
        return sum(own.saved(math.exp(least)) for own in factors.values())

    least = math.exp(nearest(reached, target, float(worth.min()), float(worth.max()), rounds=60))
    network = copy.deepcopy(dense)
    for name, own in factors.items():
        network.set_submodule(name, own.layers(least))
    return network.to(memory_format=torch.channels_last)
