"""Small networks and loaders that the tests share; random weights, no downloads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Conv-BN-ReLU, a residual branch, depthwise, 1x1, pool, flatten, linear: [n, 3, 8, 8] -> [n, 5]."""

    def __init__(self, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.reduce = nn.Conv2d(width, width // 2, 1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(4 * (width // 2), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        x = torch.relu(self.depthwise(x))
        x = self.pool(torch.relu(self.reduce(x)))
        return self.fc(x.flatten(1))


def conv_net(seed: int = 0, **options: int) -> ConvNet:
    """A :class:`ConvNet` in eval mode with random BatchNorm statistics."""
    torch.manual_seed(seed)
    net = ConvNet(**options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.eval()


def batches(
    images: int = 48, batch_size: int = 16, *, size: int = 8, classes: int = 5, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Random normalised images with labels, cut into batches."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 3, size, size, generator=generator) + torch.randn(images, 3, 1, 1, generator=generator)
    y = torch.randint(classes, (images,), generator=generator)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))
