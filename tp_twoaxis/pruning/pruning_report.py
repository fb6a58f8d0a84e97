"""What a pruning did, for people (``str``) and for programs (``to_json``)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from tp_twoaxis.dependency.latency_table import GroupLatency
from tp_twoaxis.dependency.removal import GroupReport
from tp_twoaxis.importance import DistortionCurve
from tp_twoaxis.repair.repair_report import ConsumerRepair, consumer_table

if TYPE_CHECKING:
    import pandas as pd

UNITS = {"macs": "MACs", "channels": "channels", "latency": "latency"}
COLUMNS = [
    "group",
    "channels_before",
    "channels_after",
    "removed",
    "share_removed",
    "macs_saved",
    "explained",
    "repair_error",
]
SHOWN_ROWS = 12  # in a notebook


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


@dataclass(frozen=True, repr=False)
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

    def to_frame(self) -> pd.DataFrame:
        """Tabulate the groups, a row each; needs pandas.

        Returns:
            Columns ``group`` (its root layer), ``channels_before``, ``channels_after``, ``removed``, ``share_removed``
            in [0, 1]; ``macs_saved``, the share of the dense network's MACs that would go with these channels alone,
            where the criterion measures it; ``explained``, the mean share of the removed inputs' variance that those
            that stay predict, over the layers that read the group; ``repair_error``, the largest error of those layers
            in the repaired network (:class:`~tp_twoaxis.repair.repair_report.ConsumerRepair`). What is unknown is NaN.

        Example:
            >>> group = GroupReport("conv1", ["conv1 (producer)", "conv2 (consumer)"], [0, 2, 3], [1])
            >>> report = PruningReport("l2", 0.5, 0.5, Size(20, 8), Size(10, 5), [group], {"conv1": [1]}, ["bn"], {})
            >>> report.to_frame()[["group", "channels_before", "channels_after", "share_removed"]].values.tolist()
            [['conv1', 4, 3, 0.25]]
        """
        import pandas as pd

        return pd.DataFrame([self._row(group) for group in self.groups], columns=COLUMNS)

    def _row(self, group: GroupReport) -> list[Any]:
        size, removed = len(group.kept) + len(group.removed), len(group.removed)
        readers = [reader for reader in self.consumers if f"{reader.layer} (consumer)" in group.layers]
        known = [c.explained for reader in readers for c in reader.removed if c.explained is not None]
        errors = [reader.in_network for reader in readers if reader.in_network is not None]
        curves = [curve for curve in self.sensitivity if (curve.name, curve.size) == (group.name, size)]
        saved = float(np.interp(removed, curves[0].removed, curves[0].macs_saved)) if len(curves) == 1 else np.nan
        explained, error = float(np.mean(known)) if known else np.nan, max(errors, default=np.nan)
        return [group.name, size, size - removed, removed, removed / max(size, 1), saved, explained, error]

    def __repr__(self) -> str:
        removed, size = (sum(len(g.removed) + full * len(g.kept) for g in self.groups) for full in (False, True))
        return (
            f"PruningReport({self.importance}, repair {'+'.join(self.repair) or 'none'}: kept {self.achieved:.2%} of "
            f"the {UNITS[self.budget]};\n"
            f"  MACs {self.before.macs:,} -> {self.after.macs:,}, parameters {self.before.params:,} -> "
            f"{self.after.params:,};\n"
            f"  {removed} of {size} channels in {len(self.groups)} groups removed, {len(self.notes)} notes)"
        )

    def _repr_html_(self) -> str | None:
        """What a notebook shows: the size, and groups as a table, of many the first and last; None without pandas."""
        try:
            frame = self.to_frame().dropna(axis=1, how="all")
        except ImportError:
            return None
        named = frame.rename(columns=lambda name: name.replace("_", " "))
        shown = named.to_html(index=False, border=0, max_rows=SHOWN_ROWS, na_rep="", float_format="{:.3f}".format)
        return f"<p>{escape(repr(self).removeprefix('PruningReport(').removesuffix(')'))}</p>{shown}"

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
