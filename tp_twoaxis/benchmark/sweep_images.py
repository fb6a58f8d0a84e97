"""A sweep's images: which of them calibrate, choose, train and judge, and loaders of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from tp_twoaxis.benchmark.sweep import DataConfig, NetworkConfig, expand
from tp_twoaxis.data import ArrayDataset, ImageDataset, open_dataset, same_images
from tp_twoaxis.data.catalog import split_spec
from tp_twoaxis.data.loaders import draw_rows
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.distributed import rank, world_size
from tp_twoaxis.runtime.factories import load_attribute

# the selection images are the same for all seeds, and so are calibration images unless each seed draws its own; no
# seeds of the protocol
SELECTION_SEED = 20_000
CALIBRATION_SEED = 0


def split_rows(size: int, data: DataConfig, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Share the rows of a training split out.

    Args:
        size: how many there are.
        data: how many to take for what.
        seed: of the trials, for calibration images that each seed draws anew.

    Returns:
        Rows for calibration, for selection (disjoint) and for fine-tuning (all but selection), each ascending.

    Raises:
        TwoAxisError: there are not enough.

    Example:
        >>> calibration, selection, rest = split_rows(100, DataConfig(calibration_images=30, selection_images=20), 1)
        >>> len(calibration), len(selection), len(rest), set(calibration.tolist()) & set(selection.tolist())
        (30, 20, 80, set())
    """
    if size < data.selection_images + 1:
        raise TwoAxisError(
            f"{data.train_split}: expected more than selection_images={data.selection_images} images, got {size}; "
            "hold out fewer"
        )
    order = torch.randperm(size, generator=torch.Generator().manual_seed(SELECTION_SEED))
    selection = order[: data.selection_images].sort().values
    rest = order[data.selection_images :].sort().values
    generator = torch.Generator().manual_seed(seed if data.calibration_draw == "seed" else CALIBRATION_SEED)
    drawn = torch.randperm(len(rest), generator=generator)[: data.calibration_images]
    return rest[drawn.sort().values], selection, rest


def rows_to_text(rows: Tensor) -> str:
    """Write ascending rows as a short text, the first one and the steps to each next one.

    Example:
        >>> rows_to_text(torch.tensor([3, 4, 9]))
        '3 1 5'
    """
    return " ".join(map(str, rows.diff(prepend=rows.new_zeros(1)).tolist()))


def rows_from_text(text: str) -> Tensor:
    """Read what :func:`rows_to_text` wrote.

    Example:
        >>> rows_from_text("3 1 5").tolist()
        [3, 4, 9]
    """
    return torch.tensor(list(map(int, text.split())), dtype=torch.int64).cumsum(0)


def rank_rows(rows: Tensor) -> Tensor:
    """Take the part of the rows that this rank works on."""
    return rows[rank() :: world_size()]


class SweepImages:
    """A network's images, opened when first needed; small ones stay on the device.

    Args:
        entry: the network.
        data: how they are split.
        device: where the network runs.
        seed: of the trials.
    """

    def __init__(self, entry: NetworkConfig, data: DataConfig, device: str, seed: int) -> None:
        self.entry = entry
        self.data = data
        self.device = device
        self.seed = seed

    def for_seed(self, seed: int) -> SweepImages:
        """Give the images of another seed: these, unless they are made by a factory that takes the seed."""
        specs = (self.entry.data, self.entry.test_data)
        if seed == self.seed or not any("seed" in _keywords(image_factory(expand(spec))) for spec in specs if spec):
            return self
        return SweepImages(self.entry, self.data, self.device, seed)

    @cached_property
    def train(self) -> ArrayDataset | ImageDataset:
        """All images of the training split."""
        return self._open(*training_place(self.entry, self.data))

    @cached_property
    def evaluation(self) -> tuple[Any, int]:
        """A loader of the images that accuracies are measured on, and their number.

        With several ranks it has this rank's share of them.
        """
        if self.data.evaluate_on == "selection":
            return self.selection
        number = self.data.test_images
        images = self._open(*evaluation_place(self.entry, self.data), number)
        rows = draw_rows(len(images), number or len(images), torch.Generator().manual_seed(0))
        return self.loader(images, self.data.test_batch_size, rank_rows(rows)), len(rows)

    @cached_property
    def selection(self) -> tuple[Any, int]:
        """The same of the images that choices are made on."""
        rows = split_rows(len(self.train), self.data, seed=0)[1]
        return self.loader(self.train, self.data.test_batch_size, rank_rows(rows)), len(rows)

    def loader(
        self,
        images: ArrayDataset | ImageDataset,
        batch_size: int,
        rows: Tensor,
        training: torch.Generator | None = None,
    ) -> Any:
        """Make a re-iterable loader of some rows.

        Args:
            images: :attr:`train`, or those that judge.
            batch_size: images a batch.
            rows: which images, in their order.
            training: of a new order for each pass, small images cropped and mirrored; None: as they come.
        """
        shuffle = training is not None
        if isinstance(images, ArrayDataset):
            return images.loader(batch_size, rows, shuffle, training, augment=shuffle)
        part = Subset(images, rows.tolist())
        return DataLoader(part, batch_size, shuffle=shuffle, num_workers=self.data.decoders, generator=training)

    def _open(self, spec: str, split: str, number: int | None = None) -> ArrayDataset | ImageDataset:
        images = open_images(self.entry, spec, split, self.seed, number)
        return images.to(self.device) if isinstance(images, ArrayDataset) else images


def training_place(entry: NetworkConfig, data: DataConfig) -> tuple[str, str]:
    """Name where calibration, selection and fine-tuning images come from: data and split."""
    return expand(entry.data), data.train_split


def evaluation_place(entry: NetworkConfig, data: DataConfig) -> tuple[str, str]:
    """Name where test images come from: data and split."""
    return expand(entry.test_data or entry.data), data.test_split


def image_factory(spec: str) -> Callable[..., Any] | None:
    """Find the function that data names as ``module:factory``; None for what ``open_dataset`` opens.

    Raises:
        TwoAxisError: there is no such module or function.

    Example:
        >>> image_factory("tp_twoaxis.data:digits").__name__, image_factory("cifar10:/data"), image_factory("images/")
        ('digits', None, None)
    """
    module, _, name = spec.partition(":")
    names_function = all(part.isidentifier() for part in (*module.split("."), name))
    if not names_function or split_spec(spec) is not None or Path(spec).exists():
        return None
    factory: Callable[..., Any] = load_attribute(spec, "data")
    return factory


def open_images(
    entry: NetworkConfig, spec: str, split: str, seed: int, number: int | None = None
) -> ArrayDataset | ImageDataset:
    """Open labelled images of a network.

    Args:
        entry: the network, which says how they are read.
        spec: as in :func:`~tp_twoaxis.data.open_dataset`; or ``module:factory``, a function that is called with those
            of the keywords ``split``, ``seed``, ``image_size``, ``mean``, ``std`` and ``label_column`` that it has, and
            returns a data set of :mod:`tp_twoaxis.data`. Images of a factory with ``seed`` are other ones for each.
        split: which images.
        seed: of the trials.
        number: how many to draw, without decoding the others; a factory gives all.

    Raises:
        TwoAxisError: there are no such images, or they have no labels.

    Example:
        >>> len(open_images(NetworkConfig("net", "resnet18", "x"), "tp_twoaxis.data:digits", "test", seed=1))
        400
    """
    options = {name: getattr(entry, name) for name in ("image_size", "mean", "std", "label_column")}
    factory = image_factory(spec)
    if factory is None:
        images: Any = open_dataset(spec, split=split, num_images=number, **options)
    else:
        takes = _keywords(factory)
        if unused := [name for name, value in options.items() if value is not None and name not in takes]:
            raise TwoAxisError(f"{entry.name}: {unused[0]} is set, but {spec} does not take it; remove it")
        given = {"split": split, "seed": seed, **options}
        images = factory(**{name: value for name, value in given.items() if name in takes})
    if not isinstance(images, (ArrayDataset, ImageDataset)):
        raise TwoAxisError(f"{spec}: expected an ArrayDataset or ImageDataset, got {type(images).__name__}; return one")
    if images.labels is None:
        raise TwoAxisError(f"{entry.name}: expected labels in {entry.data} ({split}), there are none; name other data")
    return images


def check_images(entry: NetworkConfig, data: DataConfig, seed: int) -> None:
    """Open a network's images without decoding them all.

    Raises:
        TwoAxisError: they cannot be opened, or training and test images are the same.
    """
    places = [training_place(entry, data)]
    if data.evaluate_on == "test":
        places.append(evaluation_place(entry, data))
    for spec, split in places:
        open_images(entry, spec, split, seed, number=1)
    if len(places) == 2 and _same(places[0], places[1], entry.label_column):
        raise TwoAxisError(
            f"{entry.name}: expected test images apart from the training images, got the same ones from "
            f"{places[0][0]}; name others with test_data, or a folder with splits"
        )


def _same(train: tuple[str, str], test: tuple[str, str], label_column: str | None) -> bool:
    if image_factory(train[0]) is not None or image_factory(test[0]) is not None:
        return train == test
    return same_images(train, test, label_column)


def _keywords(function: Callable[..., Any] | None) -> set[str]:
    return set() if function is None else set(inspect.signature(function).parameters)
