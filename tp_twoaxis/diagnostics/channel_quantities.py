"""The quantities of both axes that the evidence follows over depth and training, of a layer's varying channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

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
