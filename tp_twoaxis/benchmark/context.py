"""What the cells of one network, and those of one network and seed, have in common; made once, when first needed."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from tp_twoaxis._image_sources import find_source
from tp_twoaxis.batches import split_batch
from tp_twoaxis.benchmark.cells import Cell
from tp_twoaxis.benchmark.config import BenchmarkConfig, DataConfig, NetworkConfig, expand, seeded
from tp_twoaxis.benchmark.methods import Criterion
from tp_twoaxis.data import ArrayDataset, ImageDataset, open_dataset
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.evaluation import accuracy
from tp_twoaxis.importance.entry import Importance, Need, requires
from tp_twoaxis.models import build_model, load_weights
from tp_twoaxis.pruning.macs import count_macs, host_macs, thop_macs
from tp_twoaxis.ranks import rank, ranks, total
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.store import CalibrationStatistics

# the selection images are the same for all seeds, and no seed of the protocol
SELECTION_SEED = 20_000
# what calibration gathers only where a criterion asks for it
RICHER: dict[str, Need] = {"gradients": "gradient-stats", "consumers": "consumer-stats"}


@dataclass(frozen=True)
class Sizes:
    """One network by three MACs counters, and its parameters; thop's is None where thop is missing."""

    macs: int
    host: int
    thop: int | None
    params: int


def measure_sizes(model: nn.Module, example: Tensor) -> Sizes:
    """Count a network's MACs for one example: ours, the host's, thop's.

    Example:
        >>> measure_sizes(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)), torch.zeros(1, 3, 8, 8)).macs
        7776
    """
    count = count_macs(model, example)
    return Sizes(count.total, host_macs(model, example), thop_macs(model, example), count.params)


def split_rows(size: int, data: DataConfig, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Share the rows of a training split out.

    Args:
        size: how many there are.
        data: how many to take for what.
        seed: of the calibration images; the selection images do not depend on it.

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
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[: data.calibration_images]
    return rest[drawn.sort().values], selection, rest


class Images:
    """A network's images, opened when first needed; small ones stay on the device.

    Args:
        entry: the network.
        data: how they are split.
        device: where the network runs.
    """

    def __init__(self, entry: NetworkConfig, data: DataConfig, device: str) -> None:
        self.entry = entry
        self.data = data
        self.device = device

    @cached_property
    def train(self) -> ArrayDataset | ImageDataset:
        """All images of the training split."""
        return _open(self.entry, self.data, self.device, test=False)

    @cached_property
    def evaluation(self) -> tuple[Any, int]:
        """A loader of the images that accuracies are measured on, and their number.

        With several ranks it has this rank's share of them.
        """
        if self.data.evaluate_on == "selection":
            images, rows = self.train, split_rows(len(self.train), self.data, seed=0)[1]
        else:
            images = _open(self.entry, self.data, self.device, test=True)
            rows = torch.arange(len(images))
        return _loader(images, self.data.test_batch_size, _share(rows), self.data), len(rows)


class LoadedNetwork:
    """A dense network and its images.

    Args:
        config: the sweep.
        name: of the network.
        seed: of the weights, where they differ by seed.
        device: where to run.
        images: those of the same network with other weights, if they are in memory.
    """

    def __init__(
        self, config: BenchmarkConfig, name: str, seed: int, device: str, images: Images | None = None
    ) -> None:
        self.config = config
        self.entry = seeded(config.network(name), seed)
        self.device = device
        self.images = images or Images(self.entry, config.data, device)

    @cached_property
    def model(self) -> nn.Module:
        """The trained network in eval mode on its device."""
        return self.laid_out(load_network(self.entry).to(self.device).eval())

    def laid_out(self, model: nn.Module) -> nn.Module:
        """Put convolution weights into the sweep's memory layout, which activations then follow."""
        return model.to(memory_format=torch.channels_last) if self.config.channels_last else model

    def accuracy(self, model: nn.Module) -> float:
        """Accuracy of a model on the evaluation images, all ranks' together, in [0, 1]."""
        share, count = accuracy(model, self.images.evaluation[0], progress=False)
        right, images = total(share * count, count)
        return round(right) / images

    @cached_property
    def example(self) -> Tensor:
        """One image ``[1, C, H, W]`` on the device."""
        images, _ = split_batch(next(iter(self.images.evaluation[0])))
        return images[:1].to(self.device)

    @cached_property
    def dense_sizes(self) -> Sizes:
        """MACs and parameters before pruning."""
        return measure_sizes(self.model, self.example)

    @cached_property
    def dense_accuracy(self) -> float:
        """Accuracy before pruning, in [0, 1]."""
        return self.accuracy(self.model)

    @cached_property
    def weights(self) -> str:
        """Hash of all parameters and buffers: cells of different weights are not comparable."""
        digest = hashlib.blake2b(digest_size=12)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


class Shared:
    """What the cells of one network and one seed have in common.

    Attributes:
        network: the dense network.
        seed: of the calibration images.
        seconds: what was made -> wall-clock seconds it took.
    """

    def __init__(self, network: LoadedNetwork, seed: int) -> None:
        self.network = network
        self.seed = seed
        self.seconds: dict[str, float] = {}
        self._statistics: dict[str, CalibrationStatistics] = {}
        self._prepared: dict[str, tuple[nn.Module, Importance]] = {}

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the training split: calibration, selection, fine-tuning."""
        return split_rows(len(self.network.images.train), self.network.config.data, self.seed)

    @cached_property
    def calibration(self) -> Any:
        """A re-iterable loader of the calibration images, on every rank all of them."""
        data = self.network.config.data
        return _loader(self.network.images.train, data.batch_size, self.rows[0], data)

    def statistics(self, *, gradients: bool = False, consumers: bool = False) -> CalibrationStatistics:
        """Calibration statistics of the dense network, each rank's share of the images merged; gathered once."""
        what = _kind(gradients, consumers)
        if what not in self._statistics:
            data = self.network.config.data
            start = time.perf_counter()
            images = _loader(self.network.images.train, data.batch_size, _share(self.rows[0]), data)
            stats = calibrate(
                self.network.model, images, max_images=None, gradients=gradients, consumers=consumers, progress=False
            )
            self._statistics[what] = stats.all_reduce()
            self.seconds[what] = time.perf_counter() - start
        return self._statistics[what]

    def training_loader(self) -> Any:
        """Make a loader of fresh order: shuffled, small images cropped and mirrored at random.

        With several ranks each has its share of the images and of every batch.

        Raises:
            TwoAxisError: the batch does not divide by the number of ranks.
        """
        data = self.network.config.data
        if data.batch_size % ranks():
            raise TwoAxisError(f"batch_size: expected a multiple of {ranks()} ranks, got {data.batch_size}")
        generator = torch.Generator().manual_seed(self.seed + rank())
        images = self.network.images.train
        return _loader(images, data.batch_size // ranks(), _share(self.rows[2]), data, generator)

    def prepare(self, criterion: Criterion) -> tuple[nn.Module, Importance, dict[str, float]]:
        """Copy the dense network and build an importance for the copy.

        Statistics, and what criteria gather from images or labels, are made once and shared.

        Returns:
            The copy, the importance, and seconds by phase; those of shared work are what it took once.
        """
        seconds: dict[str, float] = {}
        options: dict[str, Any] = {"stats": None, "loader": self.calibration, "seed": self.seed}
        if requires(criterion.needs, "stats"):
            more = {what: requires(criterion.needs, need) for what, need in RICHER.items()}
            options["stats"] = self.statistics(**more)
            seconds["statistics"] = self.seconds[_kind(**more)]
        if requires(criterion.needs, "labels") or requires(criterion.needs, "images"):
            if criterion.name not in self._prepared:
                start = time.perf_counter()
                template = copy.deepcopy(self.network.model)
                importance = criterion.build(model=template, **options)
                self._prepared[criterion.name] = template, importance
                self.seconds[criterion.name] = time.perf_counter() - start
            template, importance = self._prepared[criterion.name]
            # together, so that an importance that refers to the model's tensors refers to the copy's; statistics are
            # only read, so they stay shared
            shared = {} if options["stats"] is None else {id(options["stats"]): options["stats"]}
            model, importance = copy.deepcopy((template, importance), shared)
            for parameter, source in zip(model.parameters(), template.parameters(), strict=True):
                parameter.grad = None if source.grad is None else source.grad.clone()
            phase = "gradients" if requires(criterion.needs, "labels") else "activations"
            return model, importance, seconds | {phase: self.seconds[criterion.name]}
        model = copy.deepcopy(self.network.model)
        start = time.perf_counter()
        importance = criterion.build(model=model, **options)
        seconds["importance"] = time.perf_counter() - start
        return model, importance, seconds


def _kind(gradients: bool, consumers: bool) -> str:
    return " ".join(["gradient"] * gradients + ["consumer"] * consumers + ["statistics"])


def _share(rows: Tensor) -> Tensor:
    """Take the part of the rows that this rank works on."""
    return rows[rank() :: ranks()]


def load_network(entry: NetworkConfig) -> nn.Module:
    """Build a network with its weights.

    Raises:
        TwoAxisError: the name, the file or a number does not fit.
    """
    if entry.checkpoint is not None and entry.pretrained:
        raise TwoAxisError(f"{entry.name}: expected checkpoint or pretrained, got both; leave one out")
    model = build_model(entry.model, num_classes=entry.num_classes, pretrained=entry.pretrained)
    if entry.checkpoint is not None:
        load_weights(model, expand(entry.checkpoint))
    return model


def check_inputs(config: BenchmarkConfig, cells: Iterable[Cell]) -> None:
    """Open what cells need, without decoding images, so that a wrong path fails before hours of work.

    Raises:
        TwoAxisError: a network or its images do not fit, or training and test images are the same.
    """
    needed = dict.fromkeys((cell.network, cell.seed) for cell in cells)
    for entry in dict.fromkeys(seeded(config.network(name), seed) for name, seed in needed):
        load_network(entry)
    for entry in (config.network(name) for name in dict.fromkeys(name for name, _ in needed)):
        places = [(expand(entry.data), config.data.train_split)]
        if config.data.evaluate_on == "test":
            places.append((expand(entry.test_data or entry.data), config.data.test_split))
        for spec, split in places:
            _refuse_unlabelled(entry, split, open_dataset(spec, split=split, num_images=1, **_options(entry)))
        if len(places) == 2 and _same(places[0], places[1], entry.label_column):
            raise TwoAxisError(
                f"{entry.name}: expected test images apart from the training images, got the same ones from "
                f"{places[0][0]}; name others with test_data, or a folder with splits"
            )


def _same(train: tuple[str, str], test: tuple[str, str], label_column: str | None) -> bool:
    if train[0].startswith(("cifar10:", "cifar100:")) or test[0].startswith(("cifar10:", "cifar100:")):
        return train == test
    if not Path(train[0]).is_dir() and train[0] == test[0]:
        return True  # files and globs are taken whole, whatever the split
    first, second = (find_source(spec, split, label_column)[1] for spec, split in (train, test))
    return first.name(0) == second.name(0)


def _options(entry: NetworkConfig) -> dict[str, Any]:
    return {
        "image_size": entry.image_size,
        "mean": entry.mean,
        "std": entry.std,
        "label_column": entry.label_column,
    }


def _open(entry: NetworkConfig, data: DataConfig, device: str, *, test: bool) -> ArrayDataset | ImageDataset:
    spec = expand((entry.test_data or entry.data) if test else entry.data)
    split = data.test_split if test else data.train_split
    number = {"num_images": data.test_images} if test else {}
    dataset = open_dataset(spec, split=split, **number, **_options(entry))  # type: ignore[arg-type]
    _refuse_unlabelled(entry, split, dataset)
    return dataset.to(device) if isinstance(dataset, ArrayDataset) else dataset


def _refuse_unlabelled(entry: NetworkConfig, split: str, dataset: ArrayDataset | ImageDataset) -> None:
    if dataset.labels is None:
        raise TwoAxisError(f"{entry.name}: expected labels in {entry.data} ({split}), there are none; name other data")


def _loader(
    dataset: ArrayDataset | ImageDataset,
    batch_size: int,
    rows: Tensor,
    data: DataConfig,
    training: torch.Generator | None = None,
) -> Any:
    if isinstance(dataset, ArrayDataset):
        return dataset.loader(batch_size, rows, training is not None, training, augment=training is not None)
    part = Subset(dataset, rows.tolist())
    return DataLoader(part, batch_size, shuffle=training is not None, num_workers=data.decoders, generator=training)
