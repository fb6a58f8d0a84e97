"""The demo's network: a residual network for 8x8 digits, small enough to train on a laptop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tp_twoaxis.data import ArrayDataset
from tp_twoaxis.models import BasicBlock
from tp_twoaxis.runtime.model_state import fork_rng

WIDTHS = (16, 24, 32)
BLOCKS = 2
BATCH_SIZE = 128
LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


class DigitsResNet(nn.Module):
    """Three residual stages of two blocks, 16, 24 and 32 channels wide, ``[N, 1, 8, 8] -> [N, 10]``.

    The blocks are those of :class:`~tp_twoaxis.models.CifarResNet`. The network is narrow on purpose: in a
    wide one for ten digits any criterion finds enough channels that nobody misses.

    Example:
        >>> DigitsResNet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        before = WIDTHS[0]
        stages = []
        for width in WIDTHS:
            stages.append(
                nn.Sequential(*(BasicBlock(before if i == 0 else width, width, "conv") for i in range(BLOCKS)))
            )
            before = width
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def train(data: ArrayDataset, *, epochs: int, seed: int, tick: Callable[[], object]) -> DigitsResNet:
    """Train a network from scratch: SGD with Nesterov momentum, a cosine schedule, random shifts.

    Args:
        data: training images.
        epochs: passes over them.
        seed: of initial weights, order and shifts; torch's global random state comes back as it was.
        tick: called after every epoch.

    Returns:
        The network in evaluation mode.
    """
    with fork_rng():
        torch.manual_seed(seed)
        network = DigitsResNet()
    generator = torch.Generator().manual_seed(seed)
    loader = data.loader(BATCH_SIZE, shuffle=True, generator=generator)
    optimizer = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(network(shifted(images, generator)), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        tick()
    optimizer.zero_grad()
    return network.eval()


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move every image by up to one pixel in each direction; the border that enters is background.

    The loaders' own augmentation also mirrors, and a mirrored digit is no digit.

    Args:
        images: [N, 1, H, W].
        generator: of the N shifts.

    Example:
        >>> shifted(torch.eye(4)[None, None], torch.Generator().manual_seed(0)).shape
        torch.Size([1, 1, 4, 4])
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(0, 3, (2, count), generator=generator)
    return windows[torch.arange(count), :, down, right]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block with a single torch thread.

    Layers of this size finish before a second thread has started, and threads that wait for each other on a
    busy machine cost ten times the work itself. Sums in one order also make the numbers the same on any
    number of cores.

    Example:
        >>> with one_thread():
        ...     torch.get_num_threads()
        1
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
