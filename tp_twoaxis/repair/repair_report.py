"""How well each consumer of removed channels was repaired."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tp_twoaxis.reconstruction.affine import AffineReconstruction

PEERS = 3
HELD_BACK = "on images that no fit saw it did harm"


@dataclass(frozen=True)
class RemovedChannel:
    """A removed channel among the inputs of one consumer.

    Attributes:
        channel: its index among the dense consumer's inputs.
        explained: share of its variance that the kept inputs predict linearly, in [0, 1]; None where it is unknown.
        peers: the kept inputs with the largest weights in that prediction, at most three, as (index in the dense
            layer, weight for unit variances).
    """

    channel: int
    explained: float | None
    peers: list[tuple[int, float]]


@dataclass(frozen=True)
class ConsumerRepair:
    """One consumer of removed channels.

    Errors are variances of the difference to the dense layer's output, over the variance of that output, both
    summed over the outputs that stay: 0 is as before, 1 is as bad as a constant. A constant difference is not
    counted: BatchNorm removes it, and biases account for it.

    Attributes:
        layer: its name.
        repair: what repaired it: ``bias``, ``ridge``, ``patch``, ``sequential``, ``joint``, or ``none``.
        reason: why it was not repaired as requested, or "".
        rows: (image, position) rows behind the covariance of its inputs; 0 without.
        kept: inputs that stay.
        removed: the others.
        predicted: error expected from that covariance after ``bias`` or ``ridge``; None without. For kernels of
            several taps it is too small, as if errors at neighbouring positions were uncorrelated; the later repairs
            do better than the reconstruction by channels that it describes.
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
class Distance:
    """How far the network's outputs are from the dense network's on images that no fit saw.

    Attributes:
        repaired: mean squared distance over variance after the repair; 0 is no change, 1 as bad as a constant.
        simple: the same after the repair without refits.
        held_back: whether the network was left with the latter, because it was nearer.
    """

    repaired: float
    simple: float
    held_back: bool


@dataclass(frozen=True)
class RepairReport:
    """The outcome of :func:`~tp_twoaxis.repair.repair.repair_network`.

    Attributes:
        repair: the repairs that ran, in their order.
        consumers: every consumer of removed channels, in the model's order.
        images: images behind the measured errors; no fit used them.
        seconds: phase -> wall-clock seconds.
        notes: what users should know: layers that were skipped, too few rows, new biases.
        distance: of the network's outputs; None where nothing was held out or refitted.
    """

    repair: list[str]
    consumers: list[ConsumerRepair] = field(default_factory=list)
    images: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    distance: Distance | None = None

    def __str__(self) -> str:
        return "\n".join(consumer_table(self.consumers) + [f"note: {note}" for note in self.notes])


def removed_channels_of(reconstruction: AffineReconstruction, variance: Tensor, first: int = 0) -> list[RemovedChannel]:
    """List removed channels, each with the share that the kept ones explain and the peers that do so.

    Args:
        reconstruction: of the consumer's inputs, or of one block of them.
        variance: [C] of those.
        first: index of the block's first channel.
    """
    kept, removed = reconstruction.kept, reconstruction.removed
    deviation = variance.clamp_min(0.0).sqrt()
    scaled = reconstruction.weights * deviation[kept, None] / deviation[removed].clamp_min(1e-300)
    order = scaled.abs().topk(min(PEERS, len(scaled)), dim=0).indices.T
    return [
        RemovedChannel(
            first + int(channel),
            round(float(explained), 6),
            [(first + int(kept[k]), round(float(scaled[k, d]), 6)) for k in peers if scaled[k, d] != 0],
        )
        for d, (channel, explained, peers) in enumerate(zip(removed, reconstruction.explained, order, strict=True))
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
