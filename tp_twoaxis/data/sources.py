"""Where images come from: class folders, Parquet shards, torchvision's data sets; read one by one."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError, listing, reason

ANNOTATIONS = "val_annotations.txt"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}


class Source:
    """Images by index before they are resized, their labels ``[N]`` if there are any, and which rows were drawn."""

    labels: Tensor | None
    rows: Tensor | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Name the image in an error message."""
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        raise NotImplementedError

    def image(self, index: int) -> Any:
        """Return the decoded image, a Pillow image in RGB."""
        from PIL import Image

        data = self.read(index)
        try:
            return Image.open(io.BytesIO(data)).convert("RGB")
        except Exception as error:  # Pillow's decoders raise SyntaxError, OSError, ValueError and more
            raise TwoAxisError(
                f"{self.name(index)}: expected an image that Pillow reads, it says {reason(error)}; repair or remove it"
            ) from error


class DrawnSource(Source):
    """A fixed choice of another source's images, made before any of them is decoded."""

    def __init__(self, source: Source, indices: Tensor) -> None:
        self.source = source
        self.rows = indices
        self.indices = indices.tolist()
        self.labels = None if source.labels is None else source.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Name the image in an error message."""
        return self.source.name(self.indices[index])

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        return self.source.read(self.indices[index])

    def image(self, index: int) -> Any:
        """Return the decoded image."""
        return self.source.image(self.indices[index])


class TorchvisionSource(Source):
    """A small data set as torchvision stores it, checksums verified by torchvision before it reads.

    Args:
        class_name: of a class in ``torchvision.datasets`` that holds its images in ``data`` and its labels in
            ``targets``, such as ``CIFAR10``.
        root: folder that holds the data set.
        split: ``train`` or ``test``.

    Raises:
        TwoAxisError: torchvision or the files are missing.
    """

    def __init__(self, class_name: str, root: Path, split: str) -> None:
        try:
            from torchvision import datasets
        except ImportError as error:
            raise TwoAxisError(f"{class_name}: needs torchvision, it is missing; install tp-twoaxis[cli]") from error
        factory = getattr(datasets, class_name)
        try:
            data = factory(str(root), train=split == "train", download=False)
        except (RuntimeError, OSError) as error:
            raise TwoAxisError(
                f"{root}: expected {class_name} in {getattr(factory, 'base_folder', class_name)}/ there, torchvision "
                f"says: {error}; unpack {getattr(factory, 'url', 'it')} there or name the folder that holds it"
            ) from error
        self.place = f"{class_name} {split} in {root}"
        self.pixels = data.data
        self.labels = torch.as_tensor(data.targets, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        """Name the image in an error message."""
        return f"{self.place}, image {index}"

    def image(self, index: int) -> Any:
        """Return the decoded image."""
        from PIL import Image

        return Image.fromarray(np.asarray(self.pixels[index])).convert("RGB")


class FolderSource(Source):
    """Image files; labels are the index of the class folder in alphabetical order, as in torchvision.

    Tiny-ImageNet's validation images lie in one folder; their classes are in ``val_annotations.txt``.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / ANNOTATIONS).is_file():
            self.files, self.labels = _annotated(folder)
            return
        classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        parts = [_image_files(p) for p in classes]
        self.files = [file for part in parts for file in part]
        self.labels = torch.tensor([i for i, part in enumerate(parts) for _ in part], dtype=torch.int64)
        if not self.files:  # a flat folder: images only
            self.files, self.labels = _image_files(folder), None
        if not self.files:
            raise TwoAxisError(
                f"{folder}: expected Parquet shards, images, or a folder of images for each class, "
                "found none; check the path"
            )

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Name the image in an error message."""
        return str(self.files[index])

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        return self.files[index].read_bytes()


def _annotated(folder: Path) -> tuple[list[Path], Tensor]:
    """Read Tiny-ImageNet's list of validation images; classes are numbered like the folders of ``../train``."""
    lines = [line.split("\t") for line in (folder / ANNOTATIONS).read_text(encoding="utf-8").splitlines() if line]
    training = folder.parent / "train"
    names = [p.name for p in training.iterdir() if p.is_dir()] if training.is_dir() else [line[1] for line in lines]
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    unknown = [line for line in lines if len(line) < 2 or line[1] not in number]
    if unknown:
        raise TwoAxisError(
            f"{folder / ANNOTATIONS}: expected an image and a class of {training} a line, got {unknown[0]}; "
            "unpack the data set again"
        )
    return [folder / "images" / line[0] for line in lines], torch.tensor([number[line[1]] for line in lines])


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


class ParquetSource(Source):
    """Rows of Parquet shards in the Hugging Face image schema, a row group in memory at a time."""

    def __init__(self, files: list[Path], label_column: str | None) -> None:
        parquet = _parquet()
        self.groups: list[tuple[Path, int, int]] = []  # file, row group, its first row in the file
        self.starts = [0]
        labels: list[np.ndarray[Any, Any]] = []
        for path in files:
            try:
                file = parquet.ParquetFile(path)
            except Exception as error:  # pyarrow has its own hierarchy, and OSError
                raise TwoAxisError(
                    f"{path}: expected a Parquet file, reading it says {reason(error)}; copy it anew"
                ) from error
            image, label = _columns(path, file.schema_arrow, label_column)
            if path == files[0]:
                self.image_column, self.label_column = image, label
            elif (image, label) != (self.image_column, self.label_column):
                raise TwoAxisError(
                    f"{path}: expected columns {self.image_column} and {self.label_column} as in "
                    f"{files[0].name}, got {image} and {label}; choose shards of one data set"
                )
            first = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                self.groups.append((path, group, first))
                self.starts.append(self.starts[-1] + rows)
                first += rows
            if label is not None:
                column = file.read(columns=[label])[label]
                if column.null_count:
                    raise TwoAxisError(
                        f"{path}: expected a number in every row of {label!r}, {column.null_count} are null; "
                        "remove these rows or choose another label_column"
                    )
                labels.append(column.to_numpy())
        if len(self) == 0:
            raise TwoAxisError(f"{files[0]}: expected at least one row, got 0 in {len(files)} file(s); check the files")
        self.labels = torch.from_numpy(np.concatenate(labels).astype(np.int64)) if labels else None
        if self.labels is not None and bool((self.labels == -1).all()):
            self.labels = None  # the hub's sign for labels that are kept secret
        self._cached: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self.starts[-1]

    def _locate(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        return group, index - self.starts[group]

    def name(self, index: int) -> str:
        """Name the image in an error message."""
        group, row = self._locate(index)
        path, _, first = self.groups[group]
        return f"{path} row {first + row}"

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        group, row = self._locate(index)
        if self._cached[0] != group:
            path, number, _ = self.groups[group]
            table = _parquet().ParquetFile(path).read_row_group(number, columns=[self.image_column])
            self._cached = (group, table[self.image_column])
        value = (self._cached[1][row].as_py() or {}).get("bytes")
        if value is None:
            raise TwoAxisError(
                f"{self.name(index)}: expected image bytes in {self.image_column!r}, got none "
                "(a path only?); embed the images in the Parquet files"
            )
        return bytes(value)


def _parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise TwoAxisError("Parquet files need pyarrow, it is not installed; install tp-twoaxis[cli]") from error
    return parquet


def _columns(path: Path, schema: Any, label_column: str | None) -> tuple[str, str | None]:
    """Name the image column and the label column of a Parquet schema."""
    kinds = {field.name: str(field.type) for field in schema}
    images = [name for name, kind in kinds.items() if re.match(r"struct<.*\bbytes: (large_)?binary", kind)]
    integers = [name for name, kind in kinds.items() if re.fullmatch(r"u?int\d+", kind)]
    columns = listing(f"{name}: {kind}" for name, kind in kinds.items())
    if not images:
        raise TwoAxisError(f"{path}: expected a struct column with `bytes` (Hugging Face images), got {columns}")
    image = next((name for name in ("img", "image") if name in images), images[0])
    if label_column is not None:
        if label_column not in integers:
            raise TwoAxisError(
                f"{path}: expected an integer column {label_column!r}, got {columns}; name another label_column"
            )
        return image, label_column
    known = [name for name in ("label", "fine_label", "labels") if name in integers]
    if not known and len(integers) > 1:
        raise TwoAxisError(f"{path}: expected one label column, got {listing(integers)}; name it with label_column")
    return image, next(iter(known or integers), None)
