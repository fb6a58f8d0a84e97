"""What a repair could supply and what it could not, consumer by consumer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tp_twoaxis.pruning.repair.fold import Fold

PEERS = 3


@dataclass(frozen=True)
class RemovedChannel:
    """A removed channel as one consumer saw it.

    Attributes:
        channel: its number among the dense consumer's inputs.
        explained: share of its variance that the kept inputs predict linearly, in [0, 1]; None where it is unknown.
        peers: the kept inputs that weigh most, at most three, as (dense number, weight for unit variances).
    """

    channel: int
    explained: float | None
    peers: list[tuple[int, float]]


@dataclass(frozen=True)
class ConsumerRepair:
    """One layer that read removed channels.

    Errors are variances of the difference to the dense layer's output, over the variance of that output, both
    summed over the outputs that stay: 0 is as before, 1 is as bad as a constant. A constant difference is not
    counted: BatchNorm takes it away, and biases account for it.

    Attributes:
        layer: its name.
        repair: what mended it: ``bias``, ``ridge``, ``patch``, ``sequential``, ``joint``, or ``none``.
        reason: why it is not what was asked for, or "".
        rows: (image, position) rows behind the covariance of its inputs; 0 without.
        kept: inputs that stay.
        removed: the others.
        predicted: error expected from that covariance after ``bias`` or ``ridge``; None without. For kernels of
            several taps it is too small, as if the errors of neighbouring positions had nothing in common; the
            later repairs do better than the channel fold that it describes.
        measured: error on held-out images, the layer alone, given the dense network's kept channels; large where
            ``joint`` changed the layer, or the one before it, to suit the other.
        in_network: the same inside the pruned and repaired network, where everything before it changed too.
    """

    layer: str
    repair: str
    reason: str
    rows: int
    kept: int
    removed: list[RemovedChannel]
    predicted: float | None = None
    measured: float | None = None
    in_network: float | None = None

    @property
    def explained(self) -> float:
        """Mean explained share of the removed channels; nan when nothing is known."""
        known = [channel.explained for channel in self.removed if channel.explained is not None]
        return sum(known) / len(known) if known else float("nan")


@dataclass(frozen=True)
class RepairReport:
    """The outcome of :func:`~tp_twoaxis.pruning.repair.repair_network`.

    Attributes:
        repair: the repairs that ran, in their order.
        consumers: every layer that read removed channels, in the model's order.
        images: images behind the measured errors; no fit used them, unless they are in statistics that were handed
            over, or the loader has a single batch.
        seconds: phase -> wall-clock seconds.
        notes: what a reader must know: layers that were skipped, too few rows, new biases.
    """

    repair: list[str]
    consumers: list[ConsumerRepair] = field(default_factory=list)
    images: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(consumer_table(self.consumers) + [f"note: {note}" for note in self.notes])


def removed_channels_of(fold: Fold, variance: Tensor, first: int = 0) -> list[RemovedChannel]:
    """Say for every removed channel how much of it is explained and by whom.

    Args:
        fold: of the consumer's inputs, or of one block of them.
        variance: [C] of those.
        first: number of the block's first channel.
    """
    spread = variance.clamp_min(0.0).sqrt()
    scaled = fold.weights * spread[fold.kept, None] / spread[fold.removed].clamp_min(1e-300)
    order = scaled.abs().topk(min(PEERS, len(scaled)), dim=0).indices.T
    return [
        RemovedChannel(
            first + int(channel),
            round(float(explained), 6),
            [(first + int(fold.kept[k]), round(float(scaled[k, d]), 6)) for k in peers if scaled[k, d] != 0],
        )
        for d, (channel, explained, peers) in enumerate(zip(fold.removed, fold.explained, order, strict=True))
    ]


def relative(error: Tensor, power: Tensor) -> float:
    """Summed error over summed power; 0 for a layer whose outputs are constant and unchanged."""
    total = float(power.sum())
    return float(error.sum()) / total if total > 0 else float(torch.count_nonzero(error) > 0)


def consumer_table(consumers: list[ConsumerRepair]) -> list[str]:
    """Lines of a table for people; none when there are no consumers."""
    if not consumers:
        return []
    heads = ("inputs kept", 14), ("by", 11), ("explained", 10), ("predicted", 10), ("measured", 9), ("in net", 8)
    rows = [f"{'repaired layer':30}" + "".join(f"{head:>{width}}" for head, width in heads)]
    for c in consumers:
        kept = f"{c.kept} of {c.kept + len(c.removed)}" if c.removed else f"{c.kept}"
        numbers = "".join(
            f"{'-' if value is None or value != value else f'{value:.3f}':>{width}}"
            for value, width in ((c.explained, 10), (c.predicted, 10), (c.measured, 9), (c.in_network, 8))
        )
        rows.append(f"{c.layer:30.30}{kept:>14}{c.repair:>11}{numbers}")
    return rows
