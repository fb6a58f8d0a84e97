"""Open image data by name or path.

Two kinds of data set: an :class:`~tp_twoaxis.data.ArrayDataset` holds small images of one size in memory and
normalises whole batches; an :class:`~tp_twoaxis.data.ImageDataset` reads, resizes and crops larger ones one by one.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tp_twoaxis.data.array_dataset import ArrayDataset
from tp_twoaxis.data.catalog import CATALOG, DATASETS, Normalisation, normalisation_of, open_by_name, split_spec
from tp_twoaxis.data.image_dataset import ImageDataset, read_pixels
from tp_twoaxis.data.loaders import draw_rows
from tp_twoaxis.data.sources import DrawnSource, FolderSource, ParquetSource, Source
from tp_twoaxis.errors import TwoAxisError, check_count, check_name, listing
from tp_twoaxis.runtime.progress_bar import progress_bar

T = TypeVar("T")

# how files and folders of a split may be called
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "validation": ("validation", "val", "valid"),
    "test": ("test",),
}
SMALL = 64  # pixels a side up to which a data set is held in memory


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
            - ``cifar10:/root`` or ``cifar100:/root``, a root of torchvision's data sets, already downloaded; see
              :data:`~tp_twoaxis.data.catalog.CATALOG`.
        split: ``train``, ``val`` (or ``validation``) or ``test``.
        image_size: side of the images. None: the own size of sets of up to 64 pixels a side, 224 otherwise.
        mean: three numbers in 0..1. None: CIFAR's where the file or its folder is named after it, otherwise
            ImageNet's; see ``DATASETS``.
        std: three positive numbers, like ``mean``.
        label_column: Parquet's label column. None: ``label``, ``fine_label``, ``labels`` or the only integer
            column; without one, or with -1 in all its rows, the data has images only.
        crop_fraction: side of the centre crop as a part of the resized shorter side, in (0, 1]; used for
            images that are not ``image_size`` already.
        num_images: open only this many, drawn without replacement as :func:`~tp_twoaxis.data.make_loader` draws them;
            the others are not decoded. None, or more than there are, takes all.
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
    if image_size is not None:
        check_count("image_size", image_size)
    if not 0 < crop_fraction <= 1:
        raise TwoAxisError(f"crop_fraction: expected a number in (0, 1], got {crop_fraction}; 0.875 is usual")
    normalisation, source = _find_source(spec, split, label_column)
    if num_images is not None:
        source = DrawnSource(source, draw_rows(len(source), num_images, torch.Generator().manual_seed(seed)))
    mean = normalisation.mean if mean is None else mean
    std = normalisation.std if std is None else std
    if max(source.image(0).size) <= SMALL and (image_size is None or image_size <= SMALL):
        return ArrayDataset(_decode_all(source, image_size, crop_fraction), source.labels, mean, std, source.rows)
    return ImageDataset(source, image_size or 224, mean, std, crop_fraction)


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
    check_name("split", split, parts)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TwoAxisError("digits: needs scikit-learn, it is missing; install tp-twoaxis[cli]") from error
    bunch = load_digits()
    rows = np.random.default_rng(seed).permutation(len(bunch.target))[parts[split]]
    images = np.rint(bunch.images[rows, None] * (255 / 16)).astype(np.uint8)
    labels = bunch.target[rows].astype(np.int64)
    return ArrayDataset(
        torch.from_numpy(images), torch.from_numpy(labels), *DATASETS["digits"], rows=torch.from_numpy(rows)
    )


def has_splits(spec: str) -> bool:
    """Whether the images of a spec depend on the split; files, globs and folders of classes are taken whole.

    Args:
        spec: as in :func:`open_dataset`.

    Example:
        >>> has_splits("cifar10:/data"), has_splits("test-00000-of-00001.parquet")
        (True, False)
    """
    folder = Path(spec).expanduser()
    return split_spec(spec) is not None or (folder.is_dir() and bool(_shards(folder) or _split_folders(folder)))


def same_images(first: tuple[str, str], second: tuple[str, str], label_column: str | None = None) -> bool:
    """Whether two pairs of spec and split, as in :func:`open_dataset`, lead to the same images; none is decoded.

    Raises:
        TwoAxisError: if there is no such data, split or column.

    Example:
        >>> same_images(("cifar10:/data", "train"), ("cifar10:/data", "test"))
        False
    """
    if split_spec(first[0]) is not None or split_spec(second[0]) is not None:
        return first == second
    if first[0] == second[0] and not has_splits(first[0]):
        return True
    one, other = (_find_source(spec, split, label_column)[1] for spec, split in (first, second))
    return one.name(0) == other.name(0)


def _decode_all(source: Source, image_size: int | None, crop_fraction: float) -> Tensor:
    """Decode every image to uint8 ``[N, 3, H, W]``."""
    first = read_pixels(source, 0, image_size, crop_fraction)
    images = torch.empty((len(source), *first.shape), dtype=torch.uint8)
    for index in progress_bar(range(len(source)), desc="decoding", unit="image", show=len(source) > 5000):
        pixels = read_pixels(source, index, image_size, crop_fraction)
        if pixels.shape != first.shape:
            raise TwoAxisError(
                f"{source.name(index)}: expected {list(first.shape)} like the first image, "
                f"got {list(pixels.shape)}; set image_size to resize and crop them"
            )
        images[index] = pixels
    return images


def _find_source(spec: str, split: str, label_column: str | None) -> tuple[Normalisation, Source]:
    """Find the images of a name, path or glob, and the normalisation that they take."""
    named = split_spec(spec)
    if named is not None:
        return CATALOG[named[0]].normalisation, open_by_name(*named, split)
    check_name("split", split, SPLITS)
    path = Path(spec).expanduser()
    if path.is_dir():
        return normalisation_of(path.resolve().name), _folder_source(path, split, label_column)
    files = [path] if path.exists() else sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not files:
        opened = [name for name, entry in CATALOG.items() if entry.source is not None]
        roots = " or ".join(f"{name}:/root" for name in opened)
        name, colon, _ = spec.partition(":")
        near = difflib.get_close_matches(name, opened, n=1) if colon else []
        hint = f"did you mean {near[0]!r}?" if near else "check the path"
        raise TwoAxisError(f"data: expected a file, folder, glob, {roots}, found no {spec!r}; {hint}")
    resolved = files[0].resolve()
    return normalisation_of(f"{resolved.parent.name}/{resolved.name}"), ParquetSource(files, label_column)


def _folder_source(folder: Path, split: str, label_column: str | None) -> Source:
    if shards := _shards(folder):
        by_split: dict[str, list[Path]] = {}
        for shard in shards:
            by_split.setdefault(re.split(r"[-_.\d]", shard.name, maxsplit=1)[0], []).append(shard)
        return ParquetSource(_choose(folder, split, by_split), label_column)
    folders = _split_folders(folder)
    return FolderSource(_choose(folder, split, folders) if folders else folder)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def _split_folders(folder: Path) -> dict[str, Path]:
    """Find the folders in a folder by name; none where no name is that of a split, for then they are the classes."""
    folders = {path.name: path for path in folder.iterdir() if path.is_dir()}
    return folders if any(name in names for name in folders for names in SPLITS.values()) else {}


def _choose(path: Path, split: str, by_split: dict[str, T]) -> T:
    for name in SPLITS[split]:
        if name in by_split:
            return by_split[name]
    raise TwoAxisError(
        f"{path}: expected a split called {' or '.join(SPLITS[split])}, got {listing(sorted(by_split))}; "
        "choose one of these, or name the files with a glob"
    )
