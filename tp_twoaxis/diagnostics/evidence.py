"""What a section of evidence is: a question, tables, claims with their verdicts, and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import bootstrap
from torch import Tensor, nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.store import CalibrationStatistics

RESAMPLES = 10_000
Verdict = Literal["HOLDS", "DOES NOT", "UNDECIDED"]


class NotApplicableError(TwoAxisError):
    """A section cannot be computed on this network or from these images; the message says why."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: the estimate; NaN where there is nothing to estimate from.
        lower: of the interval, or NaN where none can be given.
        upper: of the interval, or NaN.
    """

    value: float
    lower: float = math.nan
    upper: float = math.nan

    def __str__(self) -> str:
        if math.isnan(self.lower):
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.lower:.3f}, {self.upper:.3f}]"


def mean_estimate(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Mean of cells with a percentile bootstrap interval (Efron 1979; 10,000 resamples).

    Args:
        values: one number a cell; NaN is left out. Of a single network the cells are its layers, and the interval says
            how much the mean depends on which layers a network has, not what another training would give.
        level: of the interval, in (0, 1).
        seed: of the resamples.

    Returns:
        The estimate; without an interval below three cells or where all cells are equal.

    Example:
        >>> estimate = mean_estimate([0.1, 0.2, 0.3, float("nan")])
        >>> round(estimate.value, 3), estimate.lower < 0.2 < estimate.upper
        (0.2, True)
    """
    cells = np.asarray(values, dtype=np.float64)
    cells = cells[~np.isnan(cells)]
    if not len(cells):
        return Estimate(math.nan)
    if len(cells) < 3 or float(np.ptp(cells)) == 0.0:
        return Estimate(float(cells.mean()))
    found = bootstrap(
        (cells,), np.mean, n_resamples=RESAMPLES, confidence_level=level, method="percentile", rng=seed
    ).confidence_interval
    return Estimate(float(cells.mean()), float(found.low), float(found.high))


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, the paper's number, and ours.

    Attributes:
        sentence: what is claimed, in words, for example "input capture and task information are unrelated".
        paper: the paper's number as text, or "" where it gives none.
        estimate: ours.
        above: the claim holds where the estimate is above this; None for no lower bound.
        below: the claim holds where the estimate is below this; None for no upper bound. Of an absolute value, give
            both.
        note: what a reader must know, for example that a bound is ours.

    Example:
        >>> Claim("unrelated", "0.03", Estimate(0.01, -0.05, 0.07), above=-0.2, below=0.2).verdict
        'HOLDS'
        >>> Claim("unrelated", "0.03", Estimate(0.15, 0.05, 0.25), above=-0.2, below=0.2).verdict
        'UNDECIDED'
    """

    sentence: str
    paper: str
    estimate: Estimate
    above: float | None = None
    below: float | None = None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """HOLDS where the whole interval lies within the bounds, DOES NOT where it lies outside, else UNDECIDED."""
        lower, upper = self.estimate.lower, self.estimate.upper
        if math.isnan(self.estimate.value) or math.isnan(lower) or math.isnan(upper):
            return "UNDECIDED"
        least = -math.inf if self.above is None else self.above
        most = math.inf if self.below is None else self.below
        if lower > least and upper < most:
            return "HOLDS"
        return "DOES NOT" if upper <= least or lower >= most else "UNDECIDED"


@dataclass(frozen=True)
class Drawing:
    """A figure of a section.

    Attributes:
        name: of its file, without an ending.
        draw: makes the figure.
        caption: what it shows, in words; also its description for readers who do not see it.
    """

    name: str
    draw: Callable[[], Figure]
    caption: str


@dataclass
class Section:
    """The answer to one question.

    Attributes:
        name: short, as on the command line, for example "alignment".
        question: one sentence that ends with a question mark.
        tables: name -> frame; names become file names.
        claims: what the paper says, and what came out here.
        drawings: the figures.
        follows: what follows for pruning, in a sentence or two.
        fails: where this evidence does not reach, in a sentence or two.
    """

    name: str
    question: str
    tables: dict[str, pd.DataFrame]
    claims: list[Claim] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    follows: str = ""
    fails: str = ""


@dataclass
class EvidenceInputs:
    """What sections are computed from; a section raises :class:`NotApplicableError` where it needs what is missing.

    Attributes:
        model: the network; it is run, and left as it was.
        statistics: of its calibration, with labels.
        calibration: batches ``(images, labels)`` that the statistics are of, a list or a loader that gives the same at
            every pass.
        held_out: batches that the calibration did not see, or None.
        snapshots: state dicts of a training by epoch, ascending; empty where none were kept.
        removal: what stands in the place of a removed channel, its mean or zero.
        seed: of all draws.
        progress: show bars on stderr.
    """

    model: nn.Module
    statistics: CalibrationStatistics
    calibration: Iterable[tuple[Any, Tensor]]
    held_out: Iterable[tuple[Any, Tensor]] | None = None
    snapshots: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    removal: Literal["mean", "zero"] = "mean"
    seed: int = 0
    progress: bool = True

    def cells(self) -> list[str]:
        """Name the convolutions of the statistics, the cells of the paper's averages (its classifiers are none).

        Raises:
            NotApplicableError: there is none.
        """
        names = [name for name, layer in self.statistics.layers.items() if layer.kind.startswith("Conv")]
        if not names:
            raise NotApplicableError("the network has no convolution; expected at least one calibrated Conv2d")
        return names
