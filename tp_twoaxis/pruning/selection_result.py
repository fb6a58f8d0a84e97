"""What a selection of scores tried and found, for people (``str``) and for programs (``to_json``)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tp_twoaxis.errors import listing
from tp_twoaxis.importance import Criterion, Importance, PruningState
from tp_twoaxis.statistics.store import CalibrationStatistics

# differences below this many standard errors do not tell two candidates apart
STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class SelectionRow:
    """One candidate at one share.

    Attributes:
        candidate: its name.
        flops: share of the MACs that was asked for.
        achieved: share that is left, or None where it failed.
        accuracy: top-1 accuracy on the held-out images, or agreement with the dense network without labels.
        divergence: mean Kullback-Leibler divergence from the dense network's prediction, in nats.
        seconds: wall-clock time of pruning, repair and judging.
        error: why it failed, or None.
    """

    candidate: str
    flops: float
    achieved: float | None
    accuracy: float | None
    divergence: float | None
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class SelectionResult:
    """The outcome of :func:`~tp_twoaxis.select_score`.

    Attributes:
        best: the candidate that won.
        measure: what decided: ``"accuracy"``, or ``"agreement"`` where the images had no labels.
        table: every candidate at every share.
        tied: candidates that these images do not tell apart from the best: their mean is less than two standard
            errors of the difference, taken image by image, below it.
        dense: the dense network's accuracy on the held-out images.
        calibration_images: how many images the candidates saw.
        held_out_images: how many judged them.
        stats: statistics of the dense network on the calibration images, or None where no candidate needed them.
        winner: the criterion of that name; see :meth:`importance`.
    """

    best: str
    measure: str
    table: list[SelectionRow]
    tied: list[str]
    dense: float
    calibration_images: int
    held_out_images: int
    stats: CalibrationStatistics | None = field(repr=False)
    winner: Criterion = field(repr=False)

    def importance(
        self,
        *,
        stats: CalibrationStatistics | None = None,
        model: nn.Module | None = None,
        loader: Iterable[Any] | None = None,
        seed: int = 0,
    ) -> Importance:
        """Build the winner, to be handed to ``prune_to_flops`` or to Torch-Pruning.

        Args:
            stats: of more images than the selection's own, which are the default.
            model: the model to prune, for winners that look at it themselves (``taylor``, ``vbp``, ...).
            loader: images for those.
            seed: of ``random``.

        Raises:
            TwoAxisError: the winner needs the model and a loader, and they are not given.
        """
        known = self.stats if stats is None else stats
        state = PruningState(model, loader, known, max_images=None, seed=seed, progress=False)
        return self.winner.build(state)

    def ranking(self) -> list[tuple[str, float, float]]:
        """Candidates that were judged at every share, best first; see :func:`rank_candidates`."""
        return rank_candidates(self.table)

    def to_json(self) -> str:
        """Serialise everything but statistics; one JSON object."""
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("stats", "winner")}
        return json.dumps({**kept, "table": [dataclasses.asdict(row) for row in self.table]})

    def __str__(self) -> str:
        shares = list(dict.fromkeys(row.flops for row in self.table))
        cells = {(row.candidate, row.flops): row for row in self.table}
        width = max(len("candidate"), *(len(row.candidate) for row in self.table))
        head = "".join(f"{f'{share:.0%}':>9}" for share in shares)
        lines = [
            f"{self.measure} on {self.held_out_images} held-out images by share of MACs kept "
            f"({self.calibration_images} images calibrated; dense {self.dense:.2%})",
            f"{'candidate':{width}}{head}{'mean':>9}{'KL, nats':>10}{'seconds':>9}",
        ]
        for name, mean, divergence in self.ranking():
            rows = [cells[name, share] for share in shares]
            values = "".join(f"{row.accuracy:9.2%}" for row in rows)
            seconds = sum(row.seconds for row in rows)
            lines.append(f"{name:{width}}{values}{mean:9.2%}{divergence:10.3f}{seconds:9.1f}")
        lines += [f"{row.candidate:{width}} failed at {row.flops:.0%}: {row.error}" for row in self.table if row.error]
        lines.append(
            f"best: {self.best}" + (f"; these images do not tell it from {listing(self.tied)}" if self.tied else "")
        )
        return "\n".join(lines)


def rank_candidates(table: Iterable[SelectionRow]) -> list[tuple[str, float, float]]:
    """Order the candidates that were judged at every share by accuracy, then by divergence.

    Returns:
        Name, mean accuracy and mean divergence, the best first.

    Example:
        >>> rows = [SelectionRow("l1", 0.5, 0.5, 0.7, 0.4, 1.0), SelectionRow("l2", 0.5, 0.5, 0.8, 0.3, 1.0)]
        >>> rank_candidates(rows)
        [('l2', 0.8, 0.3), ('l1', 0.7, 0.4)]
    """
    rows: dict[str, list[SelectionRow]] = {}
    for row in table:
        rows.setdefault(row.candidate, []).append(row)
    means = []
    for name, own in rows.items():
        judged = [(r.accuracy, r.divergence) for r in own if r.accuracy is not None and r.divergence is not None]
        if len(judged) == len(own):
            accuracies, divergences = zip(*judged, strict=True)
            means.append((name, sum(accuracies) / len(own), sum(divergences) / len(own)))
    return sorted(means, key=lambda item: (-item[1], item[2]))


def tied_with_best(right: Mapping[str, Tensor], best: str) -> list[str]:
    """List the candidates that are less than two standard errors of the paired difference below the best.

    Args:
        right: candidate -> [n], how right it is on each held-out image, in [0, 1].
        best: one of them.

    Example:
        >>> import torch
        >>> one, other = torch.ones(100), torch.zeros(100)
        >>> tied_with_best({"a": one, "b": one.clone().index_fill_(0, torch.tensor([0]), 0.0), "c": other}, "a")
        ['b']
    """
    tied = []
    for name, values in right.items():
        difference = (right[best] - values).double()
        error = float(difference.std(correction=0)) / len(difference) ** 0.5
        if name != best and float(difference.mean()) <= STANDARD_ERRORS * error:
            tied.append(name)
    return tied
