"""From options to models, loaders, statistics and files that may be written."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tp_twoaxis.data import ArrayDataset, ImageDataset, make_loader, open_dataset
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.models import build_model, load_weights
from tp_twoaxis.pruning.checkpoint import FORMAT as PRUNED
from tp_twoaxis.pruning.checkpoint import load_pruned
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.store import FORMAT as STATISTICS
from tp_twoaxis.statistics.store import CalibrationStatistics

RANDOM_WEIGHTS = "the model has random weights; give --checkpoint or --pretrained"


def show_progress(json: bool) -> bool:
    """Bars are for people at a terminal."""
    return sys.stderr.isatty() and not json


def names(text: str | None) -> list[str] | None:
    """Split ``a,b`` at commas outside parentheses; None stays None.

    Example:
        >>> names("conv1, layer1.0.conv1"), names("l2,hull(strength=1.0, peers=4)")
        (['conv1', 'layer1.0.conv1'], ['l2', 'hull(strength=1.0, peers=4)'])
    """
    if text is None:
        return None
    return [name.strip() for name in re.split(r",(?![^()]*\))", text) if name.strip()]


def numbers(option: str, text: str | None) -> list[float] | None:
    """Split ``0.5,0.5,0.5``; None stays None.

    Raises:
        TwoAxisError: a part is no number.

    Example:
        >>> numbers("--mean", "0.5,0.25")
        [0.5, 0.25]
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise TwoAxisError(f"{option}: expected numbers such as 0.485,0.456,0.406, got {text!r}") from error


@dataclass(frozen=True)
class ModelOptions:
    """What the options say about the model."""

    spec: str
    checkpoint: Path | None
    num_classes: int | None
    pretrained: bool
    device: str

    def build(self) -> nn.Module:
        """Build the model in eval mode on its device, pruned as its checkpoint is.

        Raises:
            TwoAxisError: the model, its weights or the device do not fit.
        """
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise TwoAxisError(f"--device: expected one that is there, got {self.device!r}: {error}") from error
        if self.checkpoint is None:
            return self._dense(self.pretrained).to(self.device).eval()
        if self.pretrained:
            raise TwoAxisError("expected --checkpoint or --pretrained, got both; leave one out")
        kind = _format(self.checkpoint)
        if kind == STATISTICS:
            raise TwoAxisError(f"--checkpoint: {self.checkpoint} holds statistics, no weights; give it to --stats")
        if kind == PRUNED:
            return load_pruned(self.checkpoint, self._dense).to(self.device)
        model = self._dense()
        load_weights(model, self.checkpoint)
        return model.to(self.device).eval()

    def _dense(self, pretrained: bool = False) -> nn.Module:
        return build_model(self.spec, num_classes=self.num_classes, pretrained=pretrained)

    @property
    def pruned(self) -> bool:
        """Whether the checkpoint holds a pruned network, whose shapes the model's factory does not know."""
        return self.checkpoint is not None and _format(self.checkpoint) == PRUNED

    def notes(self) -> list[str]:
        """Say what a user may have overlooked; ``module:factory`` may load weights itself."""
        library, colon, _ = self.spec.partition(":")
        from_factory = bool(colon) and library not in ("torchvision", "timm")
        return [] if self.checkpoint or self.pretrained or from_factory else [RANDOM_WEIGHTS]


@dataclass(frozen=True)
class DataOptions:
    """What the options say about the images."""

    spec: str
    split: str
    images: int | None
    batch_size: int
    workers: int
    seed: int
    image_size: int | None
    mean: str | None
    std: str | None
    label_column: str | None

    def open(self) -> ArrayDataset | ImageDataset:
        """Open the data and draw the images.

        Raises:
            TwoAxisError: there is no such data, or the numbers do not fit.
        """
        return open_dataset(
            self.spec,
            split=self.split,
            image_size=self.image_size,
            mean=numbers("--mean", self.mean),
            std=numbers("--std", self.std),
            label_column=self.label_column,
            num_images=self.images,
            seed=self.seed,
        )

    def loader(self) -> Any:
        """Open the data and cut it into batches; see :meth:`open`."""
        return make_loader(self.open(), self.batch_size, workers=self.workers)


def evaluation_options(
    source: DataOptions, split: str | None, spec: str | None, images: int | None
) -> DataOptions | None:
    """Options of the evaluation's images, or None without them.

    Raises:
        TwoAxisError: the images would be those of the calibration or the training.
    """
    if split is None and spec is None:
        if images is not None:
            raise TwoAxisError("--eval-images: expected --eval-split or --eval-data with it, got neither; add one")
        return None
    if spec is None and not Path(source.spec).is_dir() and not source.spec.startswith(("cifar10:", "cifar100:")):
        raise TwoAxisError(f"--eval-split: {source.spec} has no splits; name the files for it with --eval-data")
    return replace(source, spec=spec or source.spec, split=split or "test", images=images)


def _format(path: Path) -> str | None:
    """Read what a safetensors file says it is; None for plain weights and for what load_weights refuses."""
    try:
        with safe_open(str(path), framework="pt") as file:
            kind: str | None = (file.metadata() or {}).get("format")
            return kind
    except (SafetensorError, OSError):
        return None


def statistics(
    model: nn.Module | None, stats: Path | None, data: DataOptions | None, progress: bool, **options: Any
) -> CalibrationStatistics:
    """Load statistics and check them against the model, or calibrate.

    Raises:
        TwoAxisError: neither or both sources are given, or they do not fit the model.
    """
    if (stats is None) == (data is None):
        raise TwoAxisError("expected --stats or --data, got " + ("neither" if data is None else "both") + "; give one")
    if stats is not None:
        loaded = CalibrationStatistics.load(stats)
        if model is not None:
            loaded.verify(model)
        return loaded
    if model is None or data is None:
        raise TwoAxisError("--data: expected a MODEL to calibrate, got none; name it first")
    return calibrate(model, data.loader(), max_images=None, progress=progress, **options)


def check_outputs(force: bool, *files: Path | None, folder: Path | None = None) -> None:
    """Refuse outputs that could not be written, or that would replace something, before anything is computed.

    Args:
        force: replace existing files.
        files: files to be written; None ones are skipped.
        folder: a folder to be filled, made if it does not exist.

    Raises:
        TwoAxisError: saying which and why.

    Example:
        >>> check_outputs(False, Path("stats.safetensors"), None)
    """
    paths = [path for path in (*files, folder) if path is not None]
    if len({path.absolute() for path in paths}) < len(paths):
        raise TwoAxisError(f"expected a name for each output, got {', '.join(map(str, paths))}; rename one")
    for path in paths:
        if not path.absolute().parent.is_dir():
            raise TwoAxisError(f"{path}: the folder {path.parent} does not exist; create it first")
        if not os.access(path if path.is_dir() else path.absolute().parent, os.W_OK):
            raise TwoAxisError(f"{path}: the folder cannot be written; choose another")
    for path in paths:
        if path is folder:
            if path.exists() and not path.is_dir():
                raise TwoAxisError(f"{path}: expected a folder, got a file; choose another name")
            if path.is_dir() and not force and any(path.iterdir()):
                raise TwoAxisError(f"{path}: the folder is not empty; choose another, or --force to write into it")
        elif path.is_dir():
            raise TwoAxisError(f"{path}: expected a file name, got a folder; add a name to it")
        elif path.exists() and not force:
            raise TwoAxisError(f"{path}: the file exists; choose another name, or --force to replace it")
