"""The data sets that are known by name. To add one, add a row to :data:`CATALOG`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tp_twoaxis.data.sources import Source, TorchvisionSource
from tp_twoaxis.errors import check_name


class Normalisation(NamedTuple):
    """Mean and standard deviation of each channel, of pixels in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class CatalogEntry:
    """What is known about a data set.

    Attributes:
        normalisation: of its training images.
        by_name: whether files and folders whose name contains the data set's name take its normalisation.
        source: makes the images of ``NAME:/root`` from the root folder and a split; None if the data set is not
            opened by its name.
        splits: that ``source`` accepts.
    """

    normalisation: Normalisation
    by_name: bool = False
    source: Callable[[Path, str], Source] | None = None
    splits: tuple[str, ...] = ()


# cifar10 and cifar100: over the 50,000 training images; digits: over all 1,797 images
CATALOG = {
    "cifar10": CatalogEntry(
        Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        by_name=True,
        source=partial(TorchvisionSource, "CIFAR10"),
        splits=("train", "test"),
    ),
    "cifar100": CatalogEntry(
        Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        by_name=True,
        source=partial(TorchvisionSource, "CIFAR100"),
        splits=("train", "test"),
    ),
    "imagenet": CatalogEntry(Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    "digits": CatalogEntry(Normalisation((0.3053,), (0.3759,))),
}
DATASETS = {name: entry.normalisation for name, entry in CATALOG.items()}
"""The normalisation of every data set of the catalog."""
UNNAMED = "imagenet"  # its normalisation is that of files and folders without the name of a data set


def split_spec(spec: str) -> tuple[str, str] | None:
    """Split ``NAME:/root`` of a data set that is opened by its name; None for a path.

    Example:
        >>> split_spec("cifar10:/data"), split_spec("digits:/data"), split_spec("/data/cifar10")
        (('cifar10', '/data'), None, None)
    """
    name, colon, root = spec.partition(":")
    return (name, root) if colon and name in CATALOG and CATALOG[name].source is not None else None


def open_by_name(name: str, root: str, split: str) -> Source:
    """Open a data set of the catalog.

    Args:
        name: of a data set with a source.
        root: folder that holds it.
        split: one of its splits.

    Raises:
        TwoAxisError: it has no such split, or the files are missing.
    """
    entry = CATALOG[name]
    assert entry.source is not None
    check_name(f"{name}:{root}: split", split, entry.splits)
    return entry.source(Path(root).expanduser(), split)


def normalisation_of(path_name: str) -> Normalisation:
    """Find the normalisation of a file or folder by its name; the longest name of a data set in it decides.

    Example:
        >>> normalisation_of("CIFAR100-parquet") == DATASETS["cifar100"], normalisation_of("x") == DATASETS["imagenet"]
        (True, True)
    """
    contained = [name for name, entry in CATALOG.items() if entry.by_name and name in path_name.lower()]
    return CATALOG[max(contained, key=len, default=UNNAMED)].normalisation
