"""Is a calibration set large enough? Rank correlation of disjoint halves, carried over to the whole set."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tp_twoaxis.diagnostics.rank_agreement import FEWEST_CHANNELS, chosen, rank_correlation, scores_of
from tp_twoaxis.errors import TwoAxisError, listing
from tp_twoaxis.runtime.progress_bar import progress_bar
from tp_twoaxis.scores.named_scores import Score
from tp_twoaxis.statistics.resampling import LayerMixture
from tp_twoaxis.statistics.store import CalibrationStatistics


@dataclass(frozen=True)
class LayerReliability:
    """One layer.

    Attributes:
        name: the layer.
        channels: those that vary, C.
        halves: mean Spearman correlation of the ranks from two disjoint halves of the images; None where fewer
            than three channels vary, or all score alike, so that there is nothing to rank.
        reliability: the same between two sets as large as this one, in [0, 1], by the Spearman-Brown formula;
            its square root is the correlation with a set without end.
        images_needed: images at which the reliability reaches the target; None where the halves do not agree at
            all, so that it is unknown.
        enough: whether it does with these.
    """

    name: str
    channels: int
    halves: float | None
    reliability: float | None
    images_needed: int | None
    enough: bool


@dataclass(frozen=True)
class CalibrationSize:
    """The outcome of :func:`calibration_is_enough`; true when all layers that have ranks have enough images.

    Attributes:
        score: the score's name.
        images: in all shards together.
        target: the reliability to reach.
        layers: one entry a layer.
    """

    score: str
    images: int
    target: float
    layers: list[LayerReliability]

    @property
    def judged(self) -> list[LayerReliability]:
        """The layers with something to rank."""
        return [layer for layer in self.layers if layer.reliability is not None]

    @property
    def enough(self) -> bool:
        """Whether every judged layer reaches the target; False when there is none."""
        return bool(self.judged) and all(layer.enough for layer in self.judged)

    def __bool__(self) -> bool:
        return self.enough

    @property
    def images_needed(self) -> int | None:
        """Images at which every judged layer would reach the target, or None where that is unknown."""
        needed = [layer.images_needed for layer in self.judged]
        known = [count for count in needed if count is not None]
        return max(known) if known and len(known) == len(needed) else None

    @property
    def verdict(self) -> str:
        """One sentence: enough or not, for which layers, and how many images would be.

        Example:
            >>> layers = [LayerReliability("conv1", 16, 0.8, 0.89, 214, False)]
            >>> CalibrationSize("capture", 100, 0.95, layers).verdict
            'not enough: 1 of 1 layers fall short of 0.95 with 100 images (conv1); about 214 images would do'
        """
        if not self.judged:
            return "cannot be told: no layer has three channels that vary and score differently"
        if self.enough:
            return f"enough: all {len(self.judged)} layers reach {self.target:g} with {self.images} images"
        short = [layer for layer in self.judged if not layer.enough]
        silent = [layer.name for layer in short if layer.images_needed is None]
        if self.images_needed is None:
            advice = f"halves of the images do not agree at all on {listing(silent, 3)}, so try several times as many"
        else:
            advice = f"about {self.images_needed} images would do"
        return (
            f"not enough: {len(short)} of {len(self.judged)} layers fall short of {self.target:g} with {self.images} "
            f"images ({listing([layer.name for layer in short], 3)}); {advice}"
        )

    def to_json(self) -> str:
        """Serialise everything and the verdict; one JSON object."""
        overall = {"enough": self.enough, "images_needed": self.images_needed, "verdict": self.verdict}
        return json.dumps({**dataclasses.asdict(self), **overall})

    def __str__(self) -> str:
        rows = [f"{'layer':30}{'channels':>10}{'halves':>9}{'reliability':>13}{'enough':>8}{'images needed':>15}"]
        for layer in self.layers:
            numbers = [
                f"{'-':>{width}}" if value is None else f"{value:{width}.3f}"
                for value, width in ((layer.halves, 9), (layer.reliability, 13))
            ]
            enough = "-" if layer.reliability is None else "yes" if layer.enough else "no"
            needed = "-" if layer.images_needed is None else str(layer.images_needed)
            rows.append(f"{layer.name:30.30}{layer.channels:10}{''.join(numbers)}{enough:>8}{needed:>15}")
        return "\n".join([*rows, f"{self.score}: {self.verdict}"])


def spearman_brown(correlation: float, times: float) -> float:
    """Reliability of a measurement ``times`` as long, ``t r / (1 + (t - 1) r)`` (Spearman 1910; Brown 1910).

    Args:
        correlation: r in [0, 1] between two measurements of the present length.
        times: t > 0.

    Example:
        >>> round(spearman_brown(0.8, 2.0), 4)
        0.8889
    """
    return times * correlation / (1.0 + (times - 1.0) * correlation)


def lengthening(correlation: float, target: float) -> float:
    """How many times as long a measurement must be, ``R (1 - r) / (r (1 - R))``: the inverse of the above.

    Args:
        correlation: r in (0, 1] at the present length.
        target: R in (0, 1).

    Example:
        >>> round(lengthening(0.8, spearman_brown(0.8, 2.0)), 4)
        2.0
    """
    return target * (1.0 - correlation) / (correlation * (1.0 - target))


def calibration_is_enough(
    shards: Sequence[CalibrationStatistics],
    score: str | Score,
    *,
    reliability: float = 0.95,
    layers: Iterable[str] | None = None,
    splits: int = 40,
    seed: int = 0,
    progress: bool = True,
) -> CalibrationSize:
    """Find out whether another calibration set of this size would rank the channels alike.

    The shards are split into two halves, each half is scored, and the channels' ranks are correlated; the mean over
    many splits is the reliability of half the images. The Spearman-Brown formula carries it over to all of them, and
    to the number at which the target is reached. It assumes that a score errs with a variance that falls as one over
    the images. What it does not see is an error that all images share: a biased score can be perfectly reliable, and
    positions that were sampled are the same in every shard (``positions="all"`` leaves that out).

    On a ResNet-20 with CIFAR-10, 256 images in 8 shards, 32 positions each, the mean forecast over 21 layers of the
    rank correlation with 768 other images was 0.990 for ``capture`` where 0.986 was measured (mean error of a layer
    0.005). With 64 positions against 16 of 1,024 other images the forecast of 0.993 met 0.977. Images count for more
    than positions: with the ranks of 2,048 other images, all positions, those of 512 images correlate at 0.994, with a
    quarter of each map's positions at 0.991, and those of 128 images, as many rows, at 0.987
    (``benchmarks/sampled_rows.py``, mean of four draws, each within 0.004).

    Args:
        shards: of :func:`~tp_twoaxis.statistics.calibrate_shards`, at least two; an even number uses all images.
        score: a name in ``tp_twoaxis.scores.SCORES`` or a function ``LayerStatistics -> [C]``.
        reliability: the target, in (0, 1): the rank correlation between two such sets.
        layers: restrict to these.
        splits: draws of two halves; those that repeat are left out.
        seed: of the draws.
        progress: show a progress bar on stderr.

    Returns:
        A verdict for each layer and for all of them; usable as a bool.

    Raises:
        TwoAxisError: fewer than two shards or shards of different models; an unknown score or layer; numbers
            out of range.

    Example:
        >>> from tp_twoaxis.statistics import calibrate_shards
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 16))
        >>> shards = calibrate_shards(net, [torch.randn(4000, 8)], progress=False)
        >>> bool(calibration_is_enough(shards, "capture", reliability=0.9, progress=False))
        True
    """
    name, function, names = chosen(shards, score, layers)
    if not 0.0 < reliability < 1.0:
        raise TwoAxisError(f"reliability: expected a number between 0 and 1, got {reliability}; 0.95 is strict")
    if splits < 1:
        raise TwoAxisError(f"splits: expected at least 1, got {splits}; 40 is usual")
    first, second = _halves(len(shards), splits, seed)
    images = torch.tensor([shard.num_images for shard in shards])
    total, in_half = int(images.sum()), float((first + second).double().mean(0) @ images.double()) / 2.0
    entries = []
    for layer in progress_bar(names, desc=f"reliability of {name}", unit="layer", show=progress):
        varies = torch.stack([shard[layer].variance > 0 for shard in shards]).any(0)
        count = int(varies.sum())
        mixture = LayerMixture(shards, layer)
        rho = torch.full((1,), torch.nan)
        if count >= FEWEST_CHANNELS:
            a, b = (scores_of(function, mixture, weights)[:, varies] for weights in (first, second))
            rho = rank_correlation(a, b)
        if bool(rho.isnan().all()):
            entries.append(LayerReliability(layer, count, None, None, None, False))
            continue
        halves = float(rho.nanmean())
        agreed = max(halves, 0.0)
        whole = spearman_brown(agreed, total / in_half)
        needed = None if agreed == 0.0 else max(1, math.ceil(in_half * lengthening(agreed, reliability)))
        entries.append(LayerReliability(layer, count, halves, whole, needed, whole >= reliability))
    return CalibrationSize(name, total, reliability, entries)


def _halves(shards: int, splits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw distinct pairs of disjoint halves, [splits, shards] each; of an odd number one shard sits out."""
    generator = torch.Generator().manual_seed(seed)
    half = shards // 2
    pairs = set()
    for _ in range(splits):
        order = torch.randperm(shards, generator=generator).tolist()
        one, other = tuple(sorted(order[:half])), tuple(sorted(order[half : 2 * half]))
        pairs.add((min(one, other), max(one, other)))
    first, second = torch.zeros(2, len(pairs), shards, dtype=torch.long)
    for row, (one, other) in enumerate(sorted(pairs)):
        first[row, list(one)] = 1
        second[row, list(other)] = 1
    return first, second
