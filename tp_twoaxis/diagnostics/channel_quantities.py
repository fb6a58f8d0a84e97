"""The quantities of both axes that the evidence follows over depth and training, of a layer's varying channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.diagnostics.rank_agreement import FEWEST_CHANNELS, rank_correlation
from tp_twoaxis.scores import local
from tp_twoaxis.scores.named_scores import capture, target_excess, task_mi
from tp_twoaxis.statistics.layer_statistics import LayerStatistics


def overlap(layer: LayerStatistics) -> Tensor:
    """Mean overlap of each channel with its varying peers ``R_k`` in nats (equation 2)."""
    return local.peer_overlap(layer.correlation, layer.variance > 0)


QUANTITIES: dict[str, Callable[[LayerStatistics], Tensor]] = {
    "I": capture,
    "R": overlap,
    "M": task_mi,
    "X": target_excess,
}
"""Symbol -> [C] nats of a layer; 0 for constant channels."""
LOCAL = ("I", "R")
TARGET = ("M", "X")
WORDS = {"I": "input capture", "R": "peer overlap", "M": "task information", "X": "target excess"}


def quantities_of(layer: LayerStatistics, symbols: Sequence[str]) -> dict[str, Tensor]:
    """Compute quantities of all channels; NaN for constant ones, which no rank or mean counts.

    Returns:
        Symbol -> [C] float64.
    """
    constant = layer.variance == 0
    return {symbol: QUANTITIES[symbol](layer).double().masked_fill(constant, math.nan) for symbol in symbols}


def rho(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation over the channels that have both; NaN with fewer than 3, or equal ones.

    Args:
        a: [C], NaN for channels to leave out.
        b: [C].

    Example:
        >>> import torch
        >>> rho(torch.tensor([1.0, 2.0, 3.0, math.nan]), torch.tensor([2.0, 4.0, 9.0, 1.0]))
        1.0
    """
    both = ~(a.isnan() | b.isnan())
    if int(both.sum()) < FEWEST_CHANNELS:
        return math.nan
    return float(rank_correlation(a[both][None], b[both][None]))


def measurable_cells(inputs: EvidenceInputs) -> list[str]:
    """Name the convolutions with no more channels than images: pooled correlations of others are of a singular matrix.

    Raises:
        NotApplicableError: there is none, the statistics have no target, or all images are of one class.
    """
    names, statistics = inputs.cells(), inputs.statistics
    if statistics.target is None:
        raise NotApplicableError("the statistics have no target; calibrate with labels and a target")
    first = statistics[names[0]]
    if "one_vs_rest" in first.columns and not bool(first.target_correlation("one_vs_rest").any()):
        raise NotApplicableError("all images are of one class; expected images of at least two")
    able = [name for name in names if statistics[name].num_channels <= statistics.num_images]
    if not able:
        raise NotApplicableError(
            f"every convolution has more channels than there are images ({statistics.num_images}); give more images"
        )
    return able


def relative_depths(names: Sequence[str]) -> dict[str, float]:
    """Depth of each layer, 0 for the first and 1 for the last.

    Example:
        >>> relative_depths(["a", "b", "c"]), relative_depths(["a"])
        ({'a': 0.0, 'b': 0.5, 'c': 1.0}, {'a': 0.0})
    """
    return {name: i / max(len(names) - 1, 1) for i, name in enumerate(names)}
