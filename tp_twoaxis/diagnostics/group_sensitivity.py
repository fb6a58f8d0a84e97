"""Which groups of channels can go, and at what price: curves of the repaired network's distortion, for every group."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tp_twoaxis.dependency.attention import AttentionUnit
from tp_twoaxis.dependency.flops import ExampleInputs
from tp_twoaxis.dependency.graph import build_graph
from tp_twoaxis.dependency.validation import verified_groups
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance import AnticipatingImportance, DistortionCurve, DistortionCurves, PruningState
from tp_twoaxis.importance.distortion_curves import interpolated
from tp_twoaxis.pruning.config import PruningConfig
from tp_twoaxis.pruning.ranking import score_groups
from tp_twoaxis.runtime.model_state import ModelSnapshot, fork_rng, unwrap
from tp_twoaxis.statistics.store import CalibrationStatistics

PRICE = 0.01
"""Distortion that a summary lets each group cost: a hundredth of the logits' variance."""
NOISE = 2.0
"""Standard errors up to which a measured distortion cannot be told from none."""
NEGLIGIBLE = 1e-3
"""Distortion below which a curve is flat, whatever its standard error."""


def sensitivity(
    model: nn.Module,
    example_inputs: ExampleInputs,
    loader: Iterable[Any],
    *,
    stats: CalibrationStatistics | None = None,
    levels: int = 8,
    images: int = 128,
    passes: float = 4000,
    price: float = PRICE,
    ignored_layers: Iterable[nn.Module | str] = (),
    attention: AttentionUnit = "heads",
    max_images: int | None = 5000,
    progress: bool = True,
) -> SensitivityReport:
    """Measure how sensitive each group of coupled channels is to pruning; nothing is pruned.

    For every group by itself: its channels are put in the order in which the ``anticipating`` criterion would remove
    them, the first eighth, two eighths, ... are left out, the layers that read them are refitted to those that stay,
    and the distance of the logits from the dense network's is measured on images that no fit saw
    (:func:`~tp_twoaxis.importance.curve_measurement.measure_curves`). A curve says nothing of what several groups cost
    together: errors of different groups add up at best.

    Args:
        model: a trained classifier; wrappers are looked through, and it is left as it was.
        example_inputs: as for :func:`~tp_twoaxis.prune_to_flops`.
        loader: yields ``(images, labels)`` or images; labels are not used. Re-iterable unless ``stats`` are given.
        stats: of ``calibrate(model, loader, consumers=True)``; default gathered here.
        levels: points of each curve beside all but one channel, at least 1.
        images: how many to measure on at most; up to three times as many others serve the fits.
        passes: bound on the cost, in passes of one image through the whole network.
        price: distortion that :meth:`SensitivityReport.summary` lets a group cost, above 0.
        ignored_layers: layers or their names that keep their output channels.
        attention: what attention loses, as for ``prune_to_flops``.
        max_images: read no more than that for the statistics and the fits.
        progress: show progress bars on stderr.

    Raises:
        TwoAxisError: bad arguments, a model that cannot be traced, no group that could lose channels, or no images that
            the network tells apart.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        ...                     nn.Linear(128, 4))
        >>> report = sensitivity(net, torch.randn(1, 3, 8, 8), [torch.randn(32, 3, 8, 8)], progress=False)
        >>> list(report.summary().group)
        ['0', '2']
    """
    _check_price(price)
    config = PruningConfig(ignored_layers=ignored_layers, attention=attention)
    network = unwrap(model)
    ignored = config.ignored_in(network)
    parameter = next(network.parameters(), None)
    if parameter is None:
        raise TwoAxisError(f"{type(network).__name__} has no parameters, so no channel could leave")
    inputs = tree_map(lambda x: x.to(parameter.device) if isinstance(x, Tensor) else x, example_inputs)
    state = PruningState(network, loader, stats, max_images=max_images, progress=progress)
    importance = AnticipatingImportance(
        state.statistics("consumers", target=False),
        loader=loader,
        model=network,
        levels=levels,
        images=images,
        passes=passes,
        max_images=max_images,
        progress=progress,
    )
    snapshot = ModelSnapshot(network)
    try:
        with fork_rng():
            groups, notes = verified_groups(build_graph(network, inputs), network, inputs, ignored, attention)
            _, declined = score_groups(groups, importance)
    finally:
        snapshot.restore()
    if not importance.curves:
        raise TwoAxisError("; ".join(["expected groups whose channels could leave, got none", *notes, *declined]))
    curves = importance.curves.in_order_of(name for name, _ in network.named_modules())
    return SensitivityReport(curves, price, [*notes, *declined])


@dataclass(frozen=True)
class SensitivityReport:
    """Measured curves of a network's groups, as tables, and what they say.

    Of a pruning by a criterion that measures curves, they are in the report:
    ``SensitivityReport(DistortionCurves(report.sensitivity))``.

    Attributes:
        curves: of the groups, in the network's order.
        price: distortion that :meth:`summary` lets each group cost.
        notes: which channels cannot leave, and why.

    Example:
        >>> curve = DistortionCurve("conv1", 8, (0, 4, 7), (0.0, 0.01, 0.5), (0.0, 0.001, 0.1), (0.0, 0.2, 0.35), 32)
        >>> report = SensitivityReport(DistortionCurves([curve]))
        >>> report.summary()[["group", "share_removable", "half_macs", "flat"]].values.tolist()
        [['conv1', 0.5, 0.2, False]]
    """

    curves: DistortionCurves
    price: float = PRICE
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_price(self.price)

    def table(self) -> pd.DataFrame:
        """List all measured points.

        Returns:
            A row for each: ``group``; ``size``, its channels; ``removed`` and ``share_removed`` of these;
            ``distortion``, the logits' mean squared distance from the dense network's over their variance, and its
            ``standard_error`` over the images; ``macs_saved``, share of the network's MACs; ``images`` that it was
            measured on; ``within_noise``, whether the distortion is at most two standard errors.
        """
        table = pd.DataFrame(self.curves.to_rows())
        return table.assign(within_noise=table.distortion <= NOISE * table.standard_error)

    def summary(self) -> pd.DataFrame:
        """Say for each group how much of it can go at the price.

        Returns:
            A row for each group: ``group`` and ``size``; ``share_removable``, of its channels, with a distortion of at
            most :attr:`price` (between measured points the curve is interpolated, see
            :func:`~tp_twoaxis.importance.distortion_curves.interpolated`); ``macs_freed`` by these, share of the
            network's; ``half_distortion`` with half of the channels gone, ``half_error``, its standard error, and
            ``half_macs`` that these free; ``last_distortion`` with all but one gone; ``flat``, where even that is
            within noise or below a thousandth: on these images nothing depends on the group.
        """
        return pd.DataFrame([self._summarized(name, curve) for name, curve in self.curves.items()])

    def _summarized(self, name: str, curve: DistortionCurve) -> dict[str, Any]:
        distortion = interpolated(curve.removed, curve.distortion)
        removable = int(np.searchsorted(distortion, self.price * (1 + 1e-9), side="right")) - 1
        half = min(curve.size // 2, curve.removed[-1])
        last, error = curve.distortion[-1], curve.standard_error[-1]
        return {
            "group": name,
            "size": curve.size,
            "share_removable": removable / curve.size,
            "macs_freed": float(np.interp(removable, curve.removed, curve.macs_saved)),
            "half_distortion": float(distortion[half]),
            "half_error": float(np.interp(half, curve.removed, curve.standard_error)),
            "half_macs": float(np.interp(half, curve.removed, curve.macs_saved)),
            "last_distortion": last,
            "flat": last <= max(NOISE * error, NEGLIGIBLE),
        }

    def to_json(self) -> str:
        """Serialise the price, the summary, all points and the notes; one JSON object."""
        tables = {"summary": self.summary(), "points": self.table()}
        rows = {
            name: json.loads(table.to_json(orient="records", double_precision=15)) for name, table in tables.items()
        }
        return json.dumps({"price": self.price, **rows, "notes": self.notes})

    def __str__(self) -> str:
        summary = self.summary()
        rows = [
            f"distortion of the repaired logits, share of their variance; can go: what costs at most {self.price:g}",
            f"{'group (root layer)':30}{'channels':>9}{'can go':>8}{'MACs':>7}{'half costs':>12}{'+-':>9}{'MACs':>7}",
            *(
                f"{row.group:30.30}{row.size:9}{row.share_removable:8.0%}{row.macs_freed:7.1%}"
                f"{row.half_distortion:12.2g}{row.half_error:9.1g}{row.half_macs:7.1%}" + "  flat" * row.flat
                for row in summary.itertuples()
            ),
        ]
        if summary.flat.any():
            rows.append("flat: within noise, or below a thousandth, even with one channel left")
        return "\n".join(rows + [f"note: {note}" for note in self.notes])


def _check_price(price: float) -> None:
    if not price > 0.0:
        raise TwoAxisError(f"price: expected a distortion above 0, got {price!r}; {PRICE} is usual")
