"""Repair of models with two inputs, without class logits, and with layers that see windows of an image."""

import copy

import pytest
import torch
from torch import nn

from tp_twoaxis import prune_to_flops
from tp_twoaxis.repair.guard import output_distance


class Pair(nn.Module):
    """Two branches, one for each input; returns features and a map, no logits."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 1))
        self.right = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 12))

    def forward(self, image, vector, scale=1.0):
        features = self.left(image)
        return {"map": features, "similarity": (features.mean((2, 3)) * self.right(vector)) * scale}


class Windows(nn.Module):
    """An image is cut into four windows, which its layers see along the first dimension."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 4)

    def forward(self, x):
        n = len(x)
        tokens = x.flatten(2).transpose(1, 2).reshape(4 * n, -1, 12)
        return self.fc(self.b(self.a(tokens).relu()).reshape(n, -1, 12).mean(1))


@pytest.mark.parametrize("items", ["flat", "nested", "named"])
@pytest.mark.parametrize("repair", ["ridge+bn", "patch+bn", "sequential", "joint", "distill"])
def test_two_inputs(items, repair):
    torch.manual_seed(0)
    dense, images, vectors = Pair(), torch.randn(80, 3, 6, 6), torch.randn(80, 5)
    for _ in range(40):
        dense(images, vectors)  # BatchNorm takes the statistics of the images
    dense.eval()
    pairs = list(zip(images.split(16), vectors.split(16), strict=True))
    loader = {"flat": pairs, "nested": [(pair, None) for pair in pairs],
              "named": [{"image": a, "vector": b} for a, b in pairs]}[items]  # fmt: skip
    net = copy.deepcopy(dense)
    example = (images[:1], vectors[:1])
    options = {"flops": 0.6, "loader": loader, "training_steps": 10, "progress": False}
    report = prune_to_flops(net, example, "capture", repair=repair, **options)
    plain = copy.deepcopy(dense)
    prune_to_flops(plain, example, "capture", repair="none", **options)
    fresh = [(torch.randn(200, 3, 6, 6), torch.randn(200, 5))]
    assert report.repair == repair.split("+")
    assert output_distance(net, dense, fresh) < 0.8 * output_distance(plain, dense, fresh)


@pytest.mark.parametrize("repair", ["patch", "sequential"])
def test_windows_of_an_image_are_held_out_together(repair):
    torch.manual_seed(0)
    dense, x = Windows().eval(), torch.randn(60, 12, 4, 4)
    net = copy.deepcopy(dense)
    options = {"loader": [x[:20], x[20:]], "flops": 0.7, "progress": False}
    prune_to_flops(net, x[:1], "l2", repair=repair, **options)
    plain = copy.deepcopy(dense)
    prune_to_flops(plain, x[:1], "l2", repair="none", **options)
    fresh = [torch.randn(200, 12, 4, 4)]
    assert output_distance(net, dense, fresh) < 0.9 * output_distance(plain, dense, fresh)
