"""What a repair works on, and what it has done to each consumer of removed channels so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.repair.images import RepairImages
from tp_twoaxis.repair.repair_report import RemovedChannel
from tp_twoaxis.statistics.store import CalibrationStatistics

TRAINING_STEPS = 1000
"""Steps of ``distill`` where nothing else is said."""
NO_GAIN = "because no fit lowered their error on images held out"


@dataclass(frozen=True)
class ChannelReconstruction:
    """How far the lost inputs of one layer can be told from its kept ones, channel by channel.

    Attributes:
        removed: lost inputs of the blocks that stay.
        predicted: expected error of the outputs, relative to their variance.
        rows: behind the statistics.
    """

    removed: list[RemovedChannel]
    predicted: float
    rows: int


@dataclass
class ConsumerState:
    """A consumer of removed channels during repair.

    Attributes:
        reason: why it was not refitted, or not as usual; or "".
        repair: the last repair that refitted it, or ``none``.
        channels: the reconstruction of its inputs by ``bias`` or ``ridge``, if they ran.
    """

    reason: str
    repair: str = "none"
    channels: ChannelReconstruction | None = None


class Outcome(NamedTuple):
    """Whether a repair refitted a consumer, and why not or why not as usual, or ""."""

    refitted: bool
    reason: str = ""


@dataclass
class RepairTask:
    """What a repair works on.

    Attributes:
        network: the pruned network; its parameters and buffers are replaced, never written into.
        dense: a copy of it from before removal.
        masks: layer name -> channels that it lost.
        images: to fit on, or None.
        stats: statistics of the dense network, with what its layers read, until they were used; or None.
        held_out_stats: the same of images held out, or None.
        ridge: relative ridge of reconstructions by channel, or None for the default.
        whole: names of layers that keep their weights unless they lost inputs.
        consumers: name -> state of every layer that mixes a removed channel into its outputs.
        notes: for the report.
        training_steps: of ``distill``.
    """

    network: nn.Module
    dense: nn.Module
    masks: dict[str, PrunedChannels]
    images: RepairImages | None = None
    stats: CalibrationStatistics | None = None
    ridge: float | None = None
    whole: frozenset[str] = frozenset()
    consumers: dict[str, ConsumerState] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    held_out_stats: CalibrationStatistics | None = None
    training_steps: int = TRAINING_STEPS

    @property
    def refittable(self) -> list[str]:
        """Consumers that nothing speaks against refitting."""
        return [name for name, state in self.consumers.items() if not state.reason]

    def batch_norm_of(self, name: str) -> nn.Module | None:
        """The BatchNorm of the pruned network that alone reads a layer's outputs, or None."""
        norm = self.masks[name].batch_norm
        return None if norm is None else self.network.get_submodule(norm)

    def record(self, repair: str, outcomes: dict[str, Outcome]) -> None:
        """Note what a repair did to consumers; other layers among the outcomes are passed over."""
        for name, state in self.consumers.items():
            if name in outcomes:
                state.reason = outcomes[name].reason
                state.repair = repair if outcomes[name].refitted else state.repair
