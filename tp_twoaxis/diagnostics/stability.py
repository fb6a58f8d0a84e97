"""How much scores and ranks would move with other calibration images: the bootstrap over shards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tp_twoaxis.diagnostics.rank_agreement import FEWEST_CHANNELS, chosen, lowest_overlap, rank_correlation, scores_of
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.progress_bar import progress_bar
from tp_twoaxis.scores.named_scores import Score
from tp_twoaxis.statistics.resampling import LayerMixture
from tp_twoaxis.statistics.store import CalibrationStatistics

LOWEST_SHARE = 0.3


@dataclass(frozen=True)
class LayerStability:
    """One layer.

    Attributes:
        name: the layer.
        scores: [C] of all images.
        lower: [C] lower ends of the intervals.
        upper: [C] upper ends.
        rank_correlation: mean Spearman correlation of the resamples' ranks with those of all images, over the
            channels that vary; None where fewer than three do, or all score alike.
        overlap: mean share of the 30 % lowest channels that are so in a resample too; None like the above.
    """

    name: str
    scores: list[float]
    lower: list[float]
    upper: list[float]
    rank_correlation: float | None
    overlap: float | None


@dataclass(frozen=True)
class StabilityReport:
    """The outcome of :func:`score_stability`.

    Attributes:
        score: the score's name.
        level: of the intervals.
        resamples: how many were drawn.
        shards: how many there are.
        images: in all shards together.
        layers: one entry a layer.
    """

    score: str
    level: float
    resamples: int
    shards: int
    images: int
    layers: list[LayerStability]

    def to_json(self) -> str:
        """Serialise everything; one JSON object."""
        return json.dumps(dataclasses.asdict(self))

    def __str__(self) -> str:
        rows = [
            f"{self.score}: {self.resamples} resamples of {self.shards} shards, {self.images} images",
            f"{'layer':30}{'channels':>10}{'rank corr':>11}{'lowest 30 %':>13}{'interval':>10}",
        ]
        for layer in self.layers:
            # the typical width of an interval, in units of what the channels differ by
            scores, width = torch.tensor(layer.scores), torch.tensor(layer.upper) - torch.tensor(layer.lower)
            spread = float(scores.std(correction=0))
            relative = f"{float(width.quantile(0.5)) / spread:10.2f}" if spread > 0 else f"{'-':>10}"
            rows.append(
                f"{layer.name:30.30}{len(layer.scores):10}{_number(layer.rank_correlation, 11)}"
                f"{_number(layer.overlap, 13)}{relative}"
            )
        rows.append(
            f"rank corr and lowest 30 %: agreement of a resample with all images; interval: median width of the "
            f"{self.level:.0%} intervals over the standard deviation of the scores"
        )
        return "\n".join(rows)


def score_stability(
    shards: Sequence[CalibrationStatistics],
    score: str | Score,
    *,
    layers: Iterable[str] | None = None,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> StabilityReport:
    """Bootstrap a score over calibration shards (Efron 1979; percentile intervals).

    A resample takes as many shards as there are, with replacement, and scores the merged statistics; nothing is
    run through the model again. The intervals show what the images decide: the model, its weights and the target
    are taken as given. Few shards make them too narrow: with S shards the bootstrap's variance is ``(S - 1) / S``
    of the right one, and its tails are a normal's.

    Args:
        shards: of :func:`~tp_twoaxis.statistics.calibrate_shards`, at least two.
        score: a name in ``tp_twoaxis.scores.SCORES`` or a function ``LayerStatistics -> [C]``.
        layers: restrict to these.
        resamples: how many to draw; each scores every layer once.
        level: of the per-channel intervals, in (0, 1).
        seed: of the draws.
        progress: show a progress bar on stderr.

    Returns:
        Intervals for every channel, and how stable the ranks of each layer are.

    Raises:
        TwoAxisError: fewer than two shards or shards of different models; an unknown score or layer; numbers
            out of range.

    Example:
        >>> from tp_twoaxis.statistics import calibrate_shards
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> shards = calibrate_shards(net, [torch.randn(400, 8)], progress=False)
        >>> layer = score_stability(shards, "capture", resamples=20, progress=False).layers[0]
        >>> all(a <= b for a, b in zip(layer.lower, layer.upper))
        True
    """
    name, function, names = chosen(shards, score, layers)
    if not 0.0 < level < 1.0:
        raise TwoAxisError(f"level: expected a number between 0 and 1, got {level}; 0.95 is usual")
    if resamples < 2:
        raise TwoAxisError(f"resamples: expected at least 2, got {resamples}; 200 is usual")
    # the first row is the set as it is
    weights = torch.cat([torch.ones(1, len(shards), dtype=torch.long), _multiplicities(len(shards), resamples, seed)])
    entries = []
    for layer in progress_bar(names, desc=f"bootstrap {name}", unit="layer", show=progress):
        scores = scores_of(function, LayerMixture(shards, layer), weights)
        varies = torch.stack([shard[layer].variance > 0 for shard in shards]).any(0)
        entries.append(_layer_stability(layer, scores[:1], scores[1:], varies, level))
    images = sum(shard.num_images for shard in shards)
    return StabilityReport(name, level, resamples, len(shards), images, entries)


def _multiplicities(shards: int, resamples: int, seed: int) -> Tensor:
    """How often each shard is in each resample, [resamples, shards]; rows sum to the number of shards."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(shards, (resamples, shards), generator=generator)
    return torch.zeros(resamples, shards, dtype=torch.long).scatter_add_(1, drawn, torch.ones_like(drawn))


def _layer_stability(name: str, full: Tensor, resampled: Tensor, varies: Tensor, level: float) -> LayerStability:
    tails = torch.tensor([(1.0 - level) / 2.0, (1.0 + level) / 2.0], dtype=torch.float64)
    lower, upper = resampled.quantile(tails, dim=0)
    correlation = overlap = None
    if int(varies.sum()) >= FEWEST_CHANNELS:
        rho = rank_correlation(resampled[:, varies], full[:, varies])
        if not bool(rho.isnan().all()):
            correlation = float(rho.nanmean())
            overlap = float(lowest_overlap(resampled[:, varies], full[:, varies], LOWEST_SHARE).mean())
    return LayerStability(name, full[0].tolist(), lower.tolist(), upper.tolist(), correlation, overlap)


def _number(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.3f}"
