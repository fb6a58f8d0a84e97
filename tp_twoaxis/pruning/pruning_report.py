"""What a pruning did, for people (``str``) and for programs (``to_json``)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from tp_twoaxis.dependency.latency_table import GroupLatency
from tp_twoaxis.dependency.removal import GroupReport
from tp_twoaxis.importance import DistortionCurve
from tp_twoaxis.repair.repair_report import ConsumerRepair, consumer_table

UNITS = {"macs": "MACs", "channels": "channels", "latency": "latency"}


@dataclass(frozen=True)
class Size:
    """A network's size.

    Attributes:
        macs: multiply-adds of one example by our counter.
        params: parameters.
        tp_macs: by Torch-Pruning's counter, or None when it was not asked for.
        thop_macs: by thop, or None where it is not installed or was not asked for.
    """

    macs: int
    params: int
    tp_macs: int | None = None
    thop_macs: int | None = None


@dataclass(frozen=True)
class PruningReport:
    """The outcome of :func:`~tp_twoaxis.prune_to_flops`.

    Attributes:
        importance: what ranked the channels.
        flops: share of the budget that was asked for.
        achieved: share of it that is left.
        before: size of the dense network.
        after: size of the pruned one.
        groups: what happened to each group.
        removed_channels: layer -> output channels that left it, as numbered in the dense layer.
        repair: the repairs that ran.
        seconds: phase -> wall-clock seconds.
        latency_ms: ``"batch 1"`` and ``"batch 64"`` -> (before, after) in milliseconds, where asked for; ``"example"``,
            of the example inputs, where the budget is a latency.
        notes: what a reader must know: which groups stay whole, why a target was missed.
        budget: what the shares are of, ``macs``, ``channels`` or ``latency``.
        consumers: every layer that read removed channels, what repaired it, and how far it is from the dense one;
            empty when nothing but BatchNorm was repaired.
        steps: in how many the channels were removed; all of the above is of all steps together.
        sensitivity: where the criterion measures curves, those of the dense network's groups, in the network's order:
            how far the repaired logits move for each number of missing channels. As tables and figure:
            ``diagnostics.SensitivityReport(DistortionCurves(report.sensitivity))``.
        latency_table: where the budget is a latency, how long each group's layers took at each of its widths.
    """

    importance: str
    flops: float
    achieved: float
    before: Size
    after: Size
    groups: list[GroupReport]
    removed_channels: dict[str, list[int]]
    repair: list[str]
    seconds: dict[str, float]
    latency_ms: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    budget: str = "macs"
    consumers: list[ConsumerRepair] = field(default_factory=list)
    steps: int = 1
    sensitivity: list[DistortionCurve] = field(default_factory=list)
    latency_table: list[GroupLatency] = field(default_factory=list)

    def to_json(self) -> str:
        """Serialise everything; one JSON object."""
        return json.dumps(dataclasses.asdict(self))

    def __str__(self) -> str:
        asked = f"asked for {self.flops:.2%}" + (f", in {self.steps} steps" if self.steps > 1 else "")
        rows = [
            f"{self.importance}: kept {self.achieved:.2%} of the {UNITS[self.budget]} ({asked})",
            f"{'':12}{'before':>14}{'after':>14}{'kept':>8}",
        ]
        sizes = [
            ("MACs", self.before.macs, self.after.macs),
            ("parameters", self.before.params, self.after.params),
            ("TP's MACs", self.before.tp_macs, self.after.tp_macs),
            ("thop's MACs", self.before.thop_macs, self.after.thop_macs),
        ]
        for name, before, after in sizes:
            if before is not None and after is not None:
                rows.append(f"{name:12}{before:14,}{after:14,}{after / max(before, 1):8.1%}")
        for batch, (before_ms, after_ms) in self.latency_ms.items():
            rows.append(f"{batch + ', ms':12}{before_ms:14.2f}{after_ms:14.2f}{after_ms / before_ms:8.1%}")
        rows.append("group (root layer)" + "channels kept".rjust(26))
        for group in self.groups:
            size = len(group.kept) + len(group.removed)
            share = len(group.kept) / size
            rows.append(f"{group.name:30.30}{len(group.kept):6} of {size:<6}{'#' * round(20 * share):<20}")
        rows += consumer_table(self.consumers)
        if self.seconds:
            rows.append("seconds: " + ", ".join(f"{phase} {time:.2f}" for phase, time in self.seconds.items()))
        return "\n".join(rows + [f"note: {note}" for note in self.notes])
