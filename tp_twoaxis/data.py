"""Image data by name for the command line, the benchmark and the examples.

Two kinds of data set: :class:`ArrayDataset` holds small images of one size as one uint8 tensor
``[N, C, H, W]`` and normalises whole batches; :class:`ImageDataset` reads, resizes and crops larger ones one
by one. Both yield ``(image, label)`` with a normalised float32 image ``[C, H, W]``, or the image alone where
labels are unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from tp_twoaxis._image_sources import SPLITS, DrawnSource, Source, TorchvisionSource, find_source, read_pixels
from tp_twoaxis.augmentation import crop_and_flip
from tp_twoaxis.errors import TwoAxisError


class Normalisation(NamedTuple):
    """Mean and standard deviation a channel, of pixels in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# cifar10 and cifar100: over the 50,000 training images; digits: over all 1,797 images
DATASETS = {
    "cifar10": Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": Normalisation((0.3053,), (0.3759,)),
}
SMALL = 64  # pixels a side up to which a data set is held in memory


class ArrayDataset(Dataset[Any]):
    """Images of one size in memory.

    Args:
        images: uint8 ``[N, C, H, W]``, on any device.
        labels: int64 ``[N]``, or None where they are unknown.
        mean: C numbers in 0..1, subtracted from pixels scaled to 0..1.
        std: C positive numbers, which the difference is divided by.

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

    def __init__(self, images: Tensor, labels: Tensor | None, mean: Sequence[float], std: Sequence[float]) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise TwoAxisError(
                f"images: expected uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}; convert them"
            )
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != images.shape[:1]):
            raise TwoAxisError(
                f"labels: expected int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}; convert them"
            )
        _check_normalisation(mean, std, images.shape[1])
        self.images = images
        self.labels = labels
        self.mean = tuple(mean)
        self.std = tuple(std)

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
        return ArrayDataset(self.images.to(device), labels, self.mean, self.std)

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
        _check_positive("batch_size", batch_size)
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
        """The rows of one pass, as a DataLoader's sampler has them: tells calibration how many images come."""
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


class ImageDataset(Dataset[Any]):
    """Images that are read one by one: shorter side to ``image_size / crop_fraction``, then a centre crop.

    An image that already is ``image_size`` on both sides is taken as it is. Made by :func:`open_dataset`.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        crop_fraction: float,
    ) -> None:
        _check_normalisation(mean, std, 3)
        self.source = source
        self.labels = source.labels
        self.image_size = image_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.crop_fraction = crop_fraction

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in 0..{len(self) - 1}")
        pixels = read_pixels(self.source, index, self.image_size, self.crop_fraction)
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        image = (pixels.float() / 255 - mean) / std
        return image if self.labels is None else (image, int(self.labels[index]))


def open_dataset(
    spec: str,
    *,
    split: str = "train",
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    label_column: str | None = None,
    crop_fraction: float = 0.875,
    num_images: int | None = None,
    seed: int = 0,
) -> ArrayDataset | ImageDataset:
    """Open images and labels.

    Args:
        spec: one of

            - a Parquet file or a glob of them in the Hugging Face image schema, taken whole,
            - a folder (or its ``data/``) of Parquet shards, chosen by split: ``train-*.parquet``,
            - a folder with a folder of images for each class, inside ``train/``, ``val/`` ... where they
              exist, otherwise taken whole; a flat folder of images has no labels; Tiny-ImageNet as it is unpacked,
            - ``cifar10:/root`` or ``cifar100:/root``, a root of torchvision's data sets, already downloaded.
        split: ``train``, ``val`` (or ``validation``) or ``test``.
        image_size: side of the images. None: the own size of sets of up to 64 pixels a side, 224 otherwise.
        mean: three numbers in 0..1. None: CIFAR's where the file or its folder is named after it, otherwise
            ImageNet's; see ``DATASETS``.
        std: three positive numbers, like ``mean``.
        label_column: Parquet's label column. None: ``label``, ``fine_label``, ``labels`` or the only integer
            column; without one, or with -1 in all its rows, the data has images only.
        crop_fraction: side of the centre crop as a part of the resized shorter side, in (0, 1]; used for
            images that are not ``image_size`` already.
        num_images: open only this many, drawn without replacement as :func:`make_loader` draws them; the
            others are not decoded. None, or more than there are, takes all.
        seed: of the draw.

    Returns:
        An :class:`ArrayDataset` if the images are (or shall be) at most 64 pixels a side, otherwise an
        :class:`ImageDataset`; items are ``(float32 [3, H, W], int)`` or the image alone.

    Raises:
        TwoAxisError: if there is no such data, split or column, or an image cannot be read.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cat", "dog"):
        ...         Path(folder, name).mkdir()
        ...         Image.new("RGB", (32, 32), "white").save(Path(folder, name, "0.png"))
        ...     data = open_dataset(folder, mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> len(data), data.labels, data[1][0].shape
        (2, tensor([0, 1]), torch.Size([3, 32, 32]))
    """
    if split not in SPLITS:
        raise TwoAxisError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}; choose one")
    if image_size is not None:
        _check_positive("image_size", image_size)
    if not 0 < crop_fraction <= 1:
        raise TwoAxisError(f"crop_fraction: expected a number in (0, 1], got {crop_fraction}; 0.875 is usual")
    kind, colon, root = spec.partition(":")
    source: Source
    if colon and kind in ("cifar10", "cifar100"):
        name, source = kind, TorchvisionSource(kind, Path(root).expanduser(), split)
    else:
        name, source = find_source(spec, split, label_column)
    if num_images is not None:
        source = DrawnSource(source, _draw(len(source), num_images, torch.Generator().manual_seed(seed)))
    mean = DATASETS[name].mean if mean is None else mean
    std = DATASETS[name].std if std is None else std
    if max(source.image(0).size) <= SMALL and (image_size is None or image_size <= SMALL):
        return ArrayDataset(_decode_all(source, image_size, crop_fraction), source.labels, mean, std)
    return ImageDataset(source, image_size or 224, mean, std, crop_fraction)


def _decode_all(source: Source, image_size: int | None, crop_fraction: float) -> Tensor:
    """Decode every image to uint8 ``[N, 3, H, W]``."""
    first = read_pixels(source, 0, image_size, crop_fraction)
    images = torch.empty((len(source), *first.shape), dtype=torch.uint8)
    # None: no bar where the output is not a terminal
    for index in tqdm(range(len(source)), desc="decoding", leave=False, disable=None if len(source) > 5000 else True):
        pixels = read_pixels(source, index, image_size, crop_fraction)
        if pixels.shape != first.shape:
            raise TwoAxisError(
                f"{source.name(index)}: expected {list(first.shape)} like the first image, "
                f"got {list(pixels.shape)}; set image_size to resize and crop them"
            )
        images[index] = pixels
    return images


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    num_images: int | None = None,
    seed: int = 0,
    shuffle: bool = False,
    workers: int = 0,
) -> ArrayLoader | DataLoader[Any]:
    """Batches of a data set or of a fixed random part of it.

    Args:
        dataset: of this module, or any map-style data set.
        batch_size: images a batch, at least 1.
        num_images: how many images to draw without replacement; None, or more than there are, takes all.
        seed: of the draw and of the order when shuffled. Equal seeds draw equal images.
        shuffle: a new order for each pass; otherwise the data set's own order, which reads files in sequence.
        workers: processes that decode; unused for data in memory.

    Returns:
        A re-iterable loader of ``(images [B, C, H, W], labels [B])`` or of images alone, with a length.

    Raises:
        TwoAxisError: if a number is out of range.

    Example:
        >>> loader = make_loader(digits("test"), batch_size=64, num_images=100)
        >>> len(loader), [len(labels) for images, labels in loader]
        (2, [64, 36])
    """
    _check_positive("batch_size", batch_size)
    generator = torch.Generator().manual_seed(seed)
    size = len(dataset)  # type: ignore[arg-type]  # map-style data sets have a length, their base class none
    indices = torch.arange(size) if num_images is None else _draw(size, num_images, generator)
    if isinstance(dataset, ArrayDataset):
        return dataset.loader(batch_size, indices, shuffle, generator)
    part = dataset if num_images is None else Subset(dataset, indices.tolist())
    return DataLoader(part, batch_size, shuffle=shuffle, num_workers=workers, generator=generator)


def digits(split: str, seed: int = 0) -> ArrayDataset:
    """Return scikit-learn's handwritten digits: 1,797 real 8x8 grey images inside the package, 10 classes.

    Args:
        split: ``train`` (1,097 images), ``calibration`` (300) or ``test`` (400); disjoint for equal seeds.
        seed: of the permutation that splits them.

    Returns:
        Images uint8 ``[N, 1, 8, 8]``, the original 0..16 scaled to 0..255.

    Raises:
        TwoAxisError: if the split is unknown or scikit-learn is missing.

    Example:
        >>> [len(digits(split)) for split in ("train", "calibration", "test")]
        [1097, 300, 400]
    """
    parts = {"train": slice(0, 1097), "calibration": slice(1097, 1397), "test": slice(1397, 1797)}
    if split not in parts:
        raise TwoAxisError(f"split: expected one of {', '.join(parts)}, got {split!r}; choose one")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TwoAxisError("digits: needs scikit-learn, it is missing; install tp-twoaxis[cli]") from error
    bunch = load_digits()
    rows = np.random.default_rng(seed).permutation(len(bunch.target))[parts[split]]
    images = np.rint(bunch.images[rows, None] * (255 / 16)).astype(np.uint8)
    labels = bunch.target[rows].astype(np.int64)
    return ArrayDataset(torch.from_numpy(images), torch.from_numpy(labels), *DATASETS["digits"])


def _draw(size: int, num_images: int, generator: torch.Generator) -> Tensor:
    _check_positive("num_images", num_images)
    return torch.randperm(size, generator=generator)[:num_images].sort().values


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise TwoAxisError(f"{name}: expected at least 1, got {value}; choose a positive number")


def _check_normalisation(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    if len(mean) != channels or len(std) != channels or not all(s > 0 for s in std):
        raise TwoAxisError(
            f"mean and std: expected {channels} numbers each, std positive, got {list(mean)} and "
            f"{list(std)}; give one for each channel"
        )
