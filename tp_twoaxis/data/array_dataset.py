"""Small images of one size, held in memory as one uint8 tensor ``[N, C, H, W]`` and normalised by the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tp_twoaxis.data.augmentation import crop_and_flip
from tp_twoaxis.errors import TwoAxisError, check_count


class ArrayDataset(Dataset[Any]):
    """Images of one size in memory; items are ``(normalised float32 [C, H, W], label)``, or the image alone.

    Args:
        images: uint8 ``[N, C, H, W]``, on any device.
        labels: int64 ``[N]``, or None where they are unknown.
        mean: C numbers in 0..1, subtracted from pixels scaled to 0..1.
        std: C positive numbers, which the difference is divided by.
        rows: int64 ``[N]``, which rows of a larger set these are, where they were drawn from one.

    Raises:
        TwoAxisError: if a shape, a dtype or the normalisation does not fit.

    Example:
        >>> pixels = torch.full((3, 1, 2, 2), 255, dtype=torch.uint8)
        >>> data = ArrayDataset(pixels, torch.tensor([0, 1, 2]), mean=(0.5,), std=(0.5,))
        >>> data[2]
        (tensor([[[1., 1.], [1., 1.]]]), 2)
        >>> [tuple(images.shape) for images, labels in data.loader(batch_size=2)]
        [(2, 1, 2, 2), (1, 1, 2, 2)]
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        mean: Sequence[float],
        std: Sequence[float],
        rows: Tensor | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise TwoAxisError(
                f"images: expected uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}; convert them"
            )
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != images.shape[:1]):
            raise TwoAxisError(
                f"labels: expected int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}; convert them"
            )
        check_normalisation(mean, std, images.shape[1])
        self.images = images
        self.labels = labels
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Tensor:
        image = self.normalise(self.images[index])
        return image if self.labels is None else (image, int(self.labels[index]))

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 ``[..., C, H, W]`` into normalised float32 of the same shape."""
        mean = torch.tensor(self.mean, device=images.device)[:, None, None]
        std = torch.tensor(self.std, device=images.device)[:, None, None]
        return (images.float() / 255 - mean) / std

    def to(self, device: torch.device | str) -> ArrayDataset:
        """Return the data set with its images and labels on a device: CIFAR takes 0.15 GB there."""
        labels = None if self.labels is None else self.labels.to(device)
        return ArrayDataset(self.images.to(device), labels, self.mean, self.std, self.rows)

    def loader(
        self,
        batch_size: int,
        indices: Tensor | Sequence[int] | None = None,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        augment: bool = False,
    ) -> ArrayLoader:
        """Batches of this data; see :class:`ArrayLoader`."""
        return ArrayLoader(self, batch_size, indices, shuffle, generator, augment)


class ArrayLoader:
    """Batches of an :class:`ArrayDataset`, normalised at once; re-iterable, the last batch may be smaller.

    Args:
        dataset: where images and labels come from.
        batch_size: images a batch, at least 1.
        indices: rows to use, in this order; None uses all.
        shuffle: draw a new order for each pass.
        generator: a CPU generator of order and augmentation; None uses PyTorch's global one.
        augment: crop at a random offset after zero-padding by an eighth of the side (4 pixels of 32) and
            mirror every second image at random.

    Raises:
        TwoAxisError: if the batch size or an index is out of range.
    """

    def __init__(
        self,
        dataset: ArrayDataset,
        batch_size: int,
        indices: Tensor | Sequence[int] | None = None,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        augment: bool = False,
    ) -> None:
        check_count("batch_size", batch_size)
        rows = torch.arange(len(dataset)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= len(dataset)):
            raise TwoAxisError(
                f"indices: expected 0..{len(dataset) - 1}, got {int(rows.min())}..{int(rows.max())}; "
                "take them from range(len(dataset))"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.indices = rows.cpu()
        self.shuffle = shuffle
        self.generator = generator
        self.augment = augment

    @property
    def sampler(self) -> list[int]:
        """The rows of one pass, like the sampler of a DataLoader; calibration counts the images by it."""
        return [int(row) for row in self.indices]

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | Tensor]:
        rows = self.indices
        if self.shuffle:
            rows = rows[torch.randperm(len(rows), generator=self.generator)]
        rows = rows.to(self.dataset.images.device)
        for start in range(0, len(rows), self.batch_size):
            chosen = rows[start : start + self.batch_size]
            images = self.dataset.images[chosen]
            if self.augment:
                images = crop_and_flip(images, self.generator)
            images = self.dataset.normalise(images)
            yield images if self.dataset.labels is None else (images, self.dataset.labels[chosen])


def check_normalisation(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Refuse a mean and a standard deviation that do not have one number a channel.

    Raises:
        TwoAxisError: they do not fit, or a standard deviation is not positive.

    Example:
        >>> check_normalisation((0.5,), (0.25,), channels=1)
    """
    if len(mean) != channels or len(std) != channels or not all(s > 0 for s in std):
        raise TwoAxisError(
            f"mean and std: expected {channels} numbers each, std positive, got {list(mean)} and "
            f"{list(std)}; give one for each channel"
        )
