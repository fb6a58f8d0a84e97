"""Moments of any multiset of shards, many at once: what resampling needs in the place of repeated merging."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.layer_statistics import LayerStatistics
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.store import CalibrationStatistics

# scatters of this many numbers are mixed in one matrix product: 64 MiB
BLOCK_NUMBERS = 2**23


class MomentMixture:
    """Moments of a multiset of parts, in which a part may occur several times or not at all.

    With multiplicities ``w_s`` of parts of ``n_s`` rows, the count is ``N = sum w_s n_s``, the mean
    ``m = sum w_s n_s m_s / N`` and the scatter ``sum w_s (S_s + n_s (m_s - m)(m_s - m)')``: the same as merging
    one part after the other, as one matrix product for a whole block of multisets.

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
        for block in torch.split(weights, max(1, BLOCK_NUMBERS // self._scatters.shape[1])):
            rows = (block * self._counts).double()
            counts = rows.sum(1, keepdim=True)
            means, other_means = rows @ self._means / counts, rows @ self._other_means / counts
            scatters = (block.double() @ self._scatters).view(len(block), self._means.shape[1], -1)
            shifts = (self._means - means[:, None]) * rows[..., None]
            scatters.baddbmm_(shifts.transpose(1, 2), self._other_means - other_means[:, None])
            for count, mean, scatter, other_mean in zip(counts, means, scatters, other_means, strict=True):
                yield CoMoments.from_parts(int(count), mean, scatter, other_mean if self._paired else None)


class LayerMixture:
    """Statistics of one layer over multisets of shards.

    Args:
        shards: of :func:`~tp_twoaxis.statistics.shards.calibrate_shards`, or calibrations of one model on
            disjoint images.
        name: which layer.

    Example:
        >>> from tp_twoaxis.statistics import calibrate_shards
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 4))
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
