"""One pass over a calibration set, in parts that answer how much would differ with other images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.calibration import gather
from tp_twoaxis.statistics.recorder import Positions
from tp_twoaxis.statistics.store import CalibrationStatistics


def calibrate_shards(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    shards: int = 8,
    seed: int = 0,
    target: str | None = "margin",
    layers: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    max_images: int | None = 5000,
    positions: Positions = "auto",
    gradients: bool = False,
    consumers: bool = False,
    progress: bool = True,
) -> list[CalibrationStatistics]:
    """Calibrate in disjoint shards of equally many images, in one pass over the loader.

    Merged, the shards are what :func:`~tp_twoaxis.calibrate` would give on the same images, up to rounding. They
    differ from each other as calibration sets of that size do, which is what the diagnostics of stability ask
    for. Of every ``shards`` images in a row each shard gets one, at random, whatever the batch size.

    It takes the time of one calibration and ``shards`` times its memory: 8 bytes for each pair of channels of a
    layer and each of its three kinds of moments.

    Args:
        model: as for :func:`~tp_twoaxis.calibrate`, as for all that is not named here.
        loader: yields ``(images, labels)`` or images.
        shards: at least 2.
        seed: of the dealing.
        target: default task variable.
        layers: names of the layers to record; default all.
        device: where to run; default where the model is.
        max_images: of all shards together.
        positions: which positions enter the row covariance; ``"auto"`` decides for the set as a whole.
        gradients: also record saliencies; needs labels.
        consumers: also record what each layer reads.
        progress: show a progress bar on stderr.

    Returns:
        Statistics of each shard.

    Raises:
        TwoAxisError: fewer than two shards, or fewer images than shards; all that ``calibrate`` raises.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
        >>> parts = calibrate_shards(net, [torch.randn(50, 8)], shards=4, progress=False)
        >>> [part.num_images for part in parts]
        [12, 12, 13, 13]
    """
    if not (isinstance(shards, int) and shards >= 2):
        raise TwoAxisError(f"shards: expected a whole number of at least 2, got {shards!r}; calibrate() makes one")
    return gather(
        model,
        loader,
        target=target,
        layers=layers,
        device=device,
        max_images=max_images,
        positions=positions,
        gradients=gradients,
        consumers=consumers,
        progress=progress,
        shards=shards,
        seed=seed,
    )
