"""Other calibration sets without other images: disjoint shards of one pass, and any multiset of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.calibration import CalibrationRequest, gather
from tp_twoaxis.statistics.layer_statistics import LayerStatistics
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.pooling import Pooling
from tp_twoaxis.statistics.recorder import Positions
from tp_twoaxis.statistics.store import CalibrationStatistics

# scatters of this many numbers are mixed in one matrix product: 64 MiB
BLOCK_NUMBERS = 2**23


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
    max_memory: float | None = None,
    pooling: Pooling = "mean",
    progress: bool = True,
) -> list[CalibrationStatistics]:
    """Calibrate in disjoint shards of equally many images, in one pass over the loader.

    Merged, the shards are what :func:`~tp_twoaxis.calibrate` would give on the same images, up to rounding. They
    differ from each other as calibration sets of that size do, which is what the diagnostics of stability need
    for. Of every ``shards`` images in a row each shard gets one, at random, whatever the batch size.

    It takes the time of one calibration and ``shards`` times its memory: 8 bytes for each pair of channels of a
    layer and each of its three kinds of moments.

    Args:
        model: as for :func:`~tp_twoaxis.calibrate`, as for all that is not named here.
        loader: yields ``(images, labels)`` or images.
        shards: at least 2.
        seed: of the assignment of images to shards.
        target: default task variable.
        layers: names of the layers to record; default all.
        device: where to run; default where the model is.
        max_images: of all shards together.
        positions: which positions enter the row covariance; ``"auto"`` decides for the set as a whole.
        gradients: also record saliencies; needs labels.
        consumers: also record what each layer reads.
        max_memory: GiB that the statistics of all shards may take while they are gathered.
        pooling: what correlates with the task.
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
    request = CalibrationRequest(
        target, layers, device, max_images, positions, gradients, consumers, progress, max_memory, pooling
    )
    return gather(model, loader, request, shards=shards, seed=seed)


class MomentMixture:
    """Moments of a multiset of parts, in which a part may occur several times or not at all.

    With multiplicities ``w_s`` of parts of weight ``n_s`` (the rows, or what they stand for), the weight is
    ``N = sum w_s n_s``, the mean ``m = sum w_s n_s m_s / N`` and the scatter
    ``sum w_s (S_s + n_s (m_s - m)(m_s - m)')``: the same as merging one part after the other, as one matrix product for
    a whole block of multisets.

    Args:
        parts: moments of the same widths; left as they are.

    Example:
        >>> low, high = CoMoments(1), CoMoments(1)
        >>> low.update(torch.zeros(1, 1)); high.update(torch.ones(3, 1))
        >>> [(m.count, m.mean.tolist()) for m in MomentMixture([low, high]).draw(torch.tensor([[3, 1], [0, 2]]))]
        [(6, [0.5]), (6, [1.0])]
    """

    def __init__(self, parts: Sequence[CoMoments]) -> None:
        self._paired = parts[0].paired
        self._counts = torch.tensor([part.count for part in parts])
        self._weights = torch.tensor([part.weight for part in parts], dtype=torch.float64)
        self._means = torch.stack([part.mean for part in parts])
        self._other_means = torch.stack([part.other_mean for part in parts])
        self._scatters = torch.stack([part.scatter for part in parts]).flatten(1)

    def draw(self, weights: Tensor) -> Iterator[CoMoments]:
        """Mix.

        Args:
            weights: [B, S] multiplicities, whole numbers; each row of at least one part.

        Yields:
            Moments of each row's multiset; they share nothing with the parts.
        """
        for block in torch.split(weights, max(1, BLOCK_NUMBERS // max(1, self._scatters.shape[1]))):
            counts = (block * self._counts).sum(1)
            parts = block * self._weights
            totals = parts.sum(1, keepdim=True)
            means, other_means = parts @ self._means / totals, parts @ self._other_means / totals
            scatters = (block.double() @ self._scatters).view(
                len(block), self._means.shape[1], self._other_means.shape[1]
            )
            shifts = (self._means - means[:, None]) * parts[..., None]
            scatters.baddbmm_(shifts.transpose(1, 2), self._other_means - other_means[:, None])
            for count, total, mean, scatter, other_mean in zip(
                counts, totals, means, scatters, other_means, strict=True
            ):
                other = other_mean if self._paired else None
                yield CoMoments.from_parts(int(count), mean, scatter, other, weight=float(total))


class LayerMixture:
    """Statistics of one layer over multisets of shards.

    Args:
        shards: of :func:`~tp_twoaxis.statistics.calibrate_shards`, or calibrations of one model on
            disjoint images.
        name: which layer.

    Example:
        >>> from tp_twoaxis.statistics import calibrate_shards
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
        >>> shards = calibrate_shards(net, [torch.randn(64, 8)], shards=4, progress=False)
        >>> [layer.num_images for layer in LayerMixture(shards, "1").draw(torch.tensor([[1, 1, 1, 1], [2, 0, 0, 0]]))]
        [64, 32]
    """

    def __init__(self, shards: Sequence[CalibrationStatistics], name: str) -> None:
        check_shards(shards)
        entries = [shard[name] for shard in shards]
        self._entry = entries[0]
        # every kind of moments that a layer has, whichever they are
        self._fields = {
            field.name: MomentMixture([getattr(entry, field.name) for entry in entries])
            for field in dataclasses.fields(LayerStatistics)
            if isinstance(getattr(self._entry, field.name), CoMoments)
        }

    def draw(self, weights: Tensor) -> Iterator[LayerStatistics]:
        """Mix; see :meth:`MomentMixture.draw`.

        Args:
            weights: [B, S] multiplicities.

        Yields:
            The layer's statistics for each row.
        """
        drawn = [mixture.draw(weights) for mixture in self._fields.values()]
        for moments in zip(*drawn, strict=True):
            yield dataclasses.replace(self._entry, **dict(zip(self._fields, moments, strict=True)))


def check_shards(shards: Sequence[CalibrationStatistics]) -> None:
    """Refuse what cannot be resampled: fewer than two shards, or shards of different models.

    Raises:
        TwoAxisError: saying which.

    Example:
        >>> check_shards([])
        Traceback (most recent call last):
        tp_twoaxis.errors.TwoAxisError: shards: expected a list with the statistics of at least 2 shards, got []; ...
    """
    if not isinstance(shards, Sequence) or len(shards) < 2:
        raise TwoAxisError(
            f"shards: expected a list with the statistics of at least 2 shards, got {shards!r}; "
            "call calibrate_shards(model, loader, shards=8)"
        )
    for shard in shards[1:]:
        shards[0].check_mergeable(shard)
