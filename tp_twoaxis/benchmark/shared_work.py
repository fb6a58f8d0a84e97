"""What the trials of one network, and those of one network and seed, have in common; made once, when first needed."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.benchmark.methods import Trial
from tp_twoaxis.benchmark.sweep import BenchmarkConfig, NetworkConfig, expand, seeded
from tp_twoaxis.benchmark.sweep_images import SweepImages, check_images, rank_rows, split_rows
from tp_twoaxis.dependency.flops import count_macs
from tp_twoaxis.dependency.other_counters import thop_macs, tp_macs
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance import Criterion, Importance, PruningState
from tp_twoaxis.importance.pruning_state import EXTRAS, Need
from tp_twoaxis.models import build_model, load_weights
from tp_twoaxis.runtime.batches import split_batch
from tp_twoaxis.runtime.distributed import rank, sum_over_ranks, world_size
from tp_twoaxis.statistics.store import CalibrationStatistics
from tp_twoaxis.training.evaluation import accuracy


@dataclass(frozen=True)
class Sizes:
    """One network by three MACs counters, and its parameters; thop's is None where thop is missing."""

    macs: int
    tp: int
    thop: int | None
    params: int


def measure_sizes(model: nn.Module, example: Tensor) -> Sizes:
    """Count a network's MACs for one example: ours, Torch-Pruning's, thop's.

    Example:
        >>> measure_sizes(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)), torch.zeros(1, 3, 8, 8)).macs
        7776
    """
    count = count_macs(model, example)
    return Sizes(count.total, tp_macs(model, example), thop_macs(model, example), count.params)


class LoadedNetwork:
    """A dense network and its images.

    Args:
        config: the sweep.
        name: of the network.
        seed: of the weights and images, where they differ by seed.
        device: where to run.
        images: those of the same network with other weights, if they are in memory.
    """

    def __init__(
        self, config: BenchmarkConfig, name: str, seed: int, device: str, images: SweepImages | None = None
    ) -> None:
        self.config = config
        self.entry = seeded(config.network(name), seed)
        self.device = device
        self.images = images or SweepImages(self.entry, config.data, device, seed)

    def for_seed(self, seed: int) -> LoadedNetwork:
        """Give the network of another seed: this one, where neither weights nor images differ by seed."""
        images = self.images.for_seed(seed)
        if images is self.images and seeded(self.config.network(self.entry.name), seed) == self.entry:
            return self
        return LoadedNetwork(self.config, self.entry.name, seed, self.device, images)

    @cached_property
    def model(self) -> nn.Module:
        """The trained network in eval mode on its device."""
        return self.laid_out(load_network(self.entry).to(self.device).eval())

    def laid_out(self, model: nn.Module) -> nn.Module:
        """Put convolution weights into the sweep's memory layout, which activations then follow."""
        return model.to(memory_format=torch.channels_last) if self.config.channels_last else model

    def accuracy(self, model: nn.Module, *, selection: bool = False) -> float:
        """Accuracy of a model on the evaluation or the selection images, all ranks' together, in [0, 1]."""
        loader, _ = self.images.selection if selection else self.images.evaluation
        share, count = accuracy(model, loader, progress=False)
        right, images = sum_over_ranks(share * count, count)
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
        """Hash of all parameters and buffers: trials of different weights are not comparable."""
        digest = hashlib.blake2b(digest_size=12)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


class Shared:
    """What the trials of one network and one seed have in common.

    Attributes:
        network: the dense network.
        seed: of the trials.
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
        return self._loader(self.rows[0])

    def statistics(self, *extras: Need) -> CalibrationStatistics:
        """Calibration statistics of the dense network, each rank's share of the images merged; gathered once.

        Args:
            extras: what they must hold besides: ``"gradients"``, ``"consumers"``.
        """
        kind = _kind(extras)
        if kind not in self._statistics:
            start = time.perf_counter()
            images = self._loader(rank_rows(self.rows[0]))
            state = PruningState(self.network.model, images, max_images=None, progress=False)
            self._statistics[kind] = state.statistics(*extras).all_reduce()
            self.seconds[kind] = time.perf_counter() - start
        return self._statistics[kind]

    def training_loader(self) -> Any:
        """Make a loader of fresh order: shuffled, small images cropped and mirrored at random.

        With several ranks each has its share of the images and of every batch.

        Raises:
            TwoAxisError: the batch does not divide by the number of ranks.
        """
        images, batch_size = self.network.images, self.network.config.data.batch_size
        if batch_size % world_size():
            raise TwoAxisError(f"batch_size: expected a multiple of {world_size()} ranks, got {batch_size}")
        generator = torch.Generator().manual_seed(self.seed + rank())
        return images.loader(images.train, batch_size // world_size(), rank_rows(self.rows[2]), generator)

    def prepare(self, criterion: Criterion) -> tuple[nn.Module, Importance, dict[str, float]]:
        """Copy the dense network and build an importance for the copy.

        Statistics, and what criteria gather from images or labels, are made once and shared.

        Returns:
            The copy, the importance, and seconds by phase; those of shared work are what it took once.
        """
        seconds: dict[str, float] = {}
        stats = None
        if "statistics" in criterion.needs:
            stats = self.statistics(*criterion.extras)
            seconds["statistics"] = self.seconds[_kind(criterion.extras)]
        if criterion.reads_images:
            model, importance = self._prepared_once(criterion, stats)
            phase = "gradients" if "labels" in criterion.needs else "activations"
            return model, importance, seconds | {phase: self.seconds[criterion.name]}
        model = copy.deepcopy(self.network.model)
        start = time.perf_counter()
        importance = criterion.build(self._state(model, stats))
        seconds["importance"] = time.perf_counter() - start
        return model, importance, seconds

    def _prepared_once(self, criterion: Criterion, stats: CalibrationStatistics | None) -> tuple[nn.Module, Importance]:
        """Copy a network and an importance that was built from its images, gradients on the network included."""
        if criterion.name not in self._prepared:
            start = time.perf_counter()
            template = copy.deepcopy(self.network.model)
            self._prepared[criterion.name] = template, criterion.build(self._state(template, stats))
            self.seconds[criterion.name] = time.perf_counter() - start
        template, importance = self._prepared[criterion.name]
        # together, so that an importance that refers to the model's tensors refers to the copy's; statistics are
        # only read, so they stay shared
        shared = {} if stats is None else {id(stats): stats}
        model, importance = copy.deepcopy((template, importance), shared)
        for parameter, source in zip(model.parameters(), template.parameters(), strict=True):
            parameter.grad = None if source.grad is None else source.grad.clone()
        return model, importance

    def _state(self, model: nn.Module, stats: CalibrationStatistics | None) -> PruningState:
        # the loader yields the calibration images and no others, so all of them are read
        return PruningState(model, self.calibration, stats, max_images=None, seed=self.seed, progress=False)

    def _loader(self, rows: Tensor) -> Any:
        images = self.network.images
        return images.loader(images.train, self.network.config.data.batch_size, rows)


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


def check_inputs(config: BenchmarkConfig, trials: Iterable[Trial]) -> None:
    """Open what trials need, without decoding images, so that a wrong path fails before hours of work.

    Raises:
        TwoAxisError: a network or its images do not fit, or training and test images are the same.
    """
    needed = dict.fromkeys((trial.network, trial.seed) for trial in trials)
    for entry in dict.fromkeys(seeded(config.network(name), seed) for name, seed in needed):
        load_network(entry)
    for name in dict.fromkeys(name for name, _ in needed):
        seed = next(seed for other, seed in needed if other == name)
        check_images(config.network(name), config.data, seed)


def _kind(extras: Iterable[Need]) -> str:
    """Name a kind of statistics in timings: ``"statistics"``, ``"gradient consumer statistics"``."""
    wanted = set(extras)
    return " ".join([*(extra.removesuffix("s") for extra in EXTRAS if extra in wanted), "statistics"])
