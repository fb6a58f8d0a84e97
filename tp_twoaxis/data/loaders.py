"""Loaders: batches of a data set or of a part of it, and batches to train on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from tp_twoaxis.data.array_dataset import ArrayDataset, ArrayLoader
from tp_twoaxis.data.augmentation import crop_and_flip
from tp_twoaxis.errors import TwoAxisError, check_count
from tp_twoaxis.runtime.batches import split_batch


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    num_images: int | None = None,
    seed: int = 0,
    shuffle: bool = False,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> ArrayLoader | DataLoader[Any]:
    """Batches of a data set or of a fixed random part of it, or of one process's share of these.

    Args:
        dataset: of this package, or any map-style data set.
        batch_size: images a batch, at least 1.
        num_images: how many images to draw without replacement; None, or more than there are, takes all.
        seed: of the draw and of the order when shuffled. Equal seeds draw equal images.
        shuffle: a new order for each pass; otherwise the data set's own order, which reads files in sequence.
        workers: processes that decode; unused for data in memory.
        rank: which share of the images, from 0; the shares' lengths differ by one at most.
        ranks: shares in all.

    Returns:
        A re-iterable loader of ``(images [B, C, H, W], labels [B])`` or of images alone, with a length.

    Raises:
        TwoAxisError: if a number is out of range.

    Example:
        >>> from tp_twoaxis.data import digits
        >>> loader = make_loader(digits("test"), batch_size=64, num_images=100)
        >>> len(loader), [len(labels) for images, labels in loader]
        (2, [64, 36])
    """
    check_count("batch_size", batch_size)
    generator = torch.Generator().manual_seed(seed)
    size = _length(dataset)
    rows = torch.arange(size) if num_images is None else draw_rows(size, num_images, generator)
    rows = rows[rank::ranks]
    if isinstance(dataset, ArrayDataset):
        return dataset.loader(batch_size, rows, shuffle, generator)
    part = dataset if len(rows) == size else Subset(dataset, rows.tolist())
    return DataLoader(part, batch_size, shuffle=shuffle, num_workers=workers, generator=generator)


def draw_rows(size: int, num_images: int, generator: torch.Generator) -> Tensor:
    """Draw rows of a data set without replacement, in ascending order.

    Example:
        >>> draw_rows(3, 5, torch.Generator())
        tensor([0, 1, 2])
    """
    check_count("num_images", num_images)
    return torch.randperm(size, generator=generator)[:num_images].sort().values


class AugmentedBatches:
    """A loader's batches, each image cropped at a random offset and half of them mirrored.

    The crop is that of :class:`~tp_twoaxis.data.ArrayLoader`, with padding of the data's mean instead of black.

    Args:
        loader: yields float images [n, C, H, W], alone or with labels.
        generator: a CPU generator of the loader's order and of offsets and mirrors.

    Example:
        >>> batch = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
        >>> images, labels = next(iter(AugmentedBatches([batch], torch.Generator().manual_seed(0))))
        >>> images.shape, labels.tolist()
        (torch.Size([2, 3, 8, 8]), [0, 1])
    """

    def __init__(self, loader: Any, generator: torch.Generator) -> None:
        self.loader = loader
        self.generator = generator

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for index, batch in enumerate(self.loader):
            images, labels = split_batch(batch, index)
            yield crop_and_flip(images, self.generator), labels


def training_batches(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    augment: bool = True,
    seed: int = 0,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Any:
    """Batches to train on, in a new order for each pass.

    Images in memory (:class:`~tp_twoaxis.data.ArrayDataset`) move to the device once, as bytes, and are shuffled,
    augmented and normalised there: CIFAR takes 0.15 GB, and no worker process has to keep up with the GPU.

    Args:
        dataset: of :mod:`tp_twoaxis.data`, or any map-style data set.
        batch_size: images a batch over all ranks.
        device: where the network is trained.
        augment: crop at a random offset (pad an eighth of the side) and mirror at random.
        seed: of order and augmentation.
        workers: processes that decode larger images.
        rank: which shard this process takes: every ``ranks``-th image, and equally many for every rank.
        ranks: number of processes.

    Returns:
        A re-iterable loader with a length and with the ``generator`` that all its randomness comes from.

    Raises:
        TwoAxisError: the batch size is no multiple of the number of ranks, or there are fewer images than ranks.

    Example:
        >>> from tp_twoaxis.data import digits
        >>> loader = training_batches(digits("train"), 100, augment=False, rank=1, ranks=2)
        >>> len(loader), next(iter(loader))[0].shape
        (11, torch.Size([50, 1, 8, 8]))
    """
    if batch_size < 1 or batch_size % ranks:
        raise TwoAxisError(f"batch_size: expected a multiple of {ranks} ranks, got {batch_size}; choose another")
    size = _length(dataset)
    if size < ranks:
        raise TwoAxisError(f"data: expected at least an image for each of {ranks} ranks, got {size}")
    rows = range(rank, size - size % ranks, ranks)
    generator = torch.Generator().manual_seed(seed + rank)
    if isinstance(dataset, ArrayDataset):
        return dataset.to(device).loader(batch_size // ranks, rows, shuffle=True, generator=generator, augment=augment)
    part = dataset if ranks == 1 else Subset(dataset, rows)
    loader = make_loader(part, batch_size // ranks, seed=seed + rank, shuffle=True, workers=workers)
    return AugmentedBatches(loader, loader.generator) if augment else loader  # type: ignore[arg-type]


def _length(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]  # map-style data sets have a length, their base class none
