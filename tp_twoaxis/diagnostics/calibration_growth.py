"""How much of what a calibration says fewer of its images say too (appendix D)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from tp_twoaxis.diagnostics.axis_coordinates import (
    cell_correlation,
    local_axis,
    relative_depths,
    target_axis,
    task_cells,
)
from tp_twoaxis.diagnostics.cell_figures import COLOURS, MARKERS, panels
from tp_twoaxis.diagnostics.channel_groups import Labels, group_channels, grouping_index, silhouette, standardised
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, EvidenceInputs, NotApplicableError, Section
from tp_twoaxis.diagnostics.run_aggregates import RUN, best_estimate, with_runs
from tp_twoaxis.runtime.batches import read_batch
from tp_twoaxis.runtime.inputs import CallSignature, Inputs
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.runtime.progress_bar import progress_bar
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.layer_statistics import LayerStatistics
from tp_twoaxis.statistics.store import CalibrationStatistics

SIZES = (100, 500, 1000, 2000)
DRAWS = 3
RANKINGS = {"rho_capture": "capture", "rho_overlap": "overlap", "rho_task_mi": "task information"}
STABLE, PARTLY = 0.9, 0.6


def growth_table(inputs: EvidenceInputs, sizes: Sequence[int] = SIZES, draws: int = DRAWS) -> pd.DataFrame:
    """Calibrate on nested parts of the calibration set and compare with the whole.

    Each draw puts the images into a random order; its part of n images is the first n, so that a larger part holds the
    smaller ones. Of the images that a part adds, positions are sampled as of a calibration of these alone.

    Args:
        inputs: with the images of the calibration.
        sizes: numbers of images; those that are not less than the whole are left out.
        draws: how many orders.

    Returns:
        A row for each draw, size and cell, and one for the whole, whose draw is -1, with the columns ``draw``,
        ``images``, ``layer``, ``depth``, ``ari`` (adjusted Rand index of the groups on (z I, z R), k = 3, with those of
        the whole), ``silhouette`` of these groups, and the rank correlations with the whole ``rho_capture``,
        ``rho_overlap`` and ``rho_task_mi``.

    Raises:
        NotApplicableError: no size is less than the whole; see also
            :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = [(torch.randn(128, 3, 6, 6), torch.randint(8, (128,)))]
        >>> inputs = EvidenceInputs(net, calibrate(net, images, progress=False), images, progress=False)
        >>> growth_table(inputs, [32, 64, 128], draws=1)[["draw", "images"]].values.tolist()
        [[-1, 128], [0, 32], [0, 64]]
    """
    cells, total = task_cells(inputs), inputs.statistics.num_images
    smaller = sorted(size for size in sizes if size < total)
    if not smaller:
        raise NotApplicableError(f"expected more than {min(sizes)} images to take a part of, got {total}")
    depths = relative_depths(inputs.cells())
    whole = {name: _Cell.of(inputs.statistics[name], inputs.seed) for name in cells}
    rows = [{"draw": -1, "images": total, **whole[name].compared(whole[name], depths[name])} for name in cells]
    with progress_bar(total=draws * len(smaller), desc="parts", unit="part", show=inputs.progress) as bar:
        for draw in range(draws):
            for size, statistics in _nested(inputs, cells, smaller, draw):
                for name in cells:
                    part = _Cell.of(statistics[name], inputs.seed)
                    rows.append({"draw": draw, "images": size, **part.compared(whole[name], depths[name])})
                bar.update()
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Cell:
    """What a calibration says about a cell; quantities are of its varying channels.

    Attributes:
        layer: its name.
        active: [C] bool.
        coordinates: capture, overlap and task information.
        groups: on the local axis.
        silhouette: of the groups.
    """

    layer: str
    active: Tensor
    coordinates: tuple[Tensor, Tensor, Tensor]
    groups: Labels | None
    silhouette: float

    @classmethod
    def of(cls, layer: LayerStatistics, seed: int) -> _Cell:
        here = local_axis(layer)
        features = standardised(*here)
        groups = group_channels(features, seed=seed)
        coordinates = (*here, target_axis(layer).task_mi)
        return cls(layer.name, layer.variance > 0, coordinates, groups, silhouette(features, groups))

    def compared(self, whole: _Cell, depth: float) -> dict[str, Any]:
        """Compare with the whole calibration over the channels that vary in both."""
        mine, its = whole.active[self.active], self.active[whole.active]
        both = zip(RANKINGS, self.coordinates, whole.coordinates, strict=True)
        index = math.nan
        if self.groups is not None and whole.groups is not None:
            index = grouping_index(self.groups[mine.numpy()], whole.groups[its.numpy()])
        return {
            "layer": self.layer,
            "depth": depth,
            "ari": index,
            "silhouette": self.silhouette,
            **{column: cell_correlation(a[mine], b[its]) for column, a, b in both},
        }


def _nested(
    inputs: EvidenceInputs, cells: Sequence[str], sizes: Sequence[int], draw: int
) -> Iterator[tuple[int, CalibrationStatistics]]:
    """Calibrate on the first images of a random order, more and more of them."""
    generator = torch.Generator().manual_seed(inputs.seed + draw)
    order = torch.randperm(inputs.statistics.num_images, generator=generator)
    call = CallSignature.of(unwrap(inputs.model))
    so_far: CalibrationStatistics | None = None
    for before, size in itertools.pairwise((0, *sizes)):
        batches = choose_images(inputs.calibration, order[before:size], call)
        target = inputs.statistics.target
        added = calibrate(inputs.model, batches, target=target, layers=cells, max_images=None, progress=False)
        so_far = added if so_far is None else so_far.merge(added)
        yield size, so_far


def choose_images(
    batches: Iterable[tuple[Any, Tensor]], rows: Tensor, call: CallSignature | None = None
) -> list[tuple[Inputs, Tensor] | Inputs]:
    """Choose images of batches, in the batches' order.

    Args:
        batches: ``(images, labels)`` or images.
        rows: [n] int64 numbers of the images, counted through all batches; their order does not matter.
        call: of the model that the batches are for; default one of a single input.

    Returns:
        Batches as long as the first one given, the last may be shorter; with labels where there are any.

    Example:
        >>> batches = [(torch.arange(4.0), torch.arange(4)), (torch.arange(4.0, 6.0), torch.arange(2))]
        >>> [(inputs.images.tolist(), labels.tolist())
        ...  for inputs, labels in choose_images(batches, torch.tensor([5, 0, 3, 1, 4]))]
        [([0.0, 1.0, 3.0, 4.0], [0, 1, 3, 0]), ([5.0], [1])]
    """
    found: list[Inputs] = []
    classes: list[Tensor] = []
    start = size = 0
    for number, batch in enumerate(batches):
        inputs, labels = read_batch(batch, number, call=call or CallSignature())
        size = size or len(inputs)
        own = (rows[(rows >= start) & (rows < start + len(inputs))] - start).sort().values
        start += len(inputs)
        found.append(inputs[own])
        if labels is not None:
            classes.append(labels[own])
    parts = Inputs.concatenate(found).split(size)
    if not classes:
        return list(parts)
    return list(zip(parts, torch.split(torch.cat(classes), size), strict=True))


def size_table(growth: pd.DataFrame) -> pd.DataFrame:
    """Condense the comparison by size (table D).

    Args:
        growth: of :func:`growth_table`.

    Returns:
        A row for each size, ascending, the whole last: mean over cells and draws of each number, and with ``_sd`` the
        deviation between the draws' means, NaN with one draw.

    Example:
        >>> cells = {"draw": [0, 1], "images": 100, "ari": [0.3, 0.5], "silhouette": 0.3}
        >>> growth = pd.DataFrame(cells | dict.fromkeys(RANKINGS, 0.9))
        >>> size_table(growth)[["images", "ari", "ari_sd"]].round(3).values.tolist()
        [[100.0, 0.4, 0.141]]
    """
    columns = ["ari", "silhouette", *RANKINGS]
    draws = growth.groupby(["images", "draw"])[columns].mean().groupby("images")
    return draws.mean().join(draws.std().add_suffix("_sd")).reset_index()


def growth_claims(growth: pd.DataFrame) -> list[Claim]:
    """Judge appendix D by the largest part of each network's calibration.

    Args:
        growth: of :func:`growth_table`, of one network or of several.
    """
    growth = with_runs(growth)
    parts = growth[growth.draw >= 0]
    largest = parts.groupby(RUN).images.transform("max")
    # draws of one cell are no cells of their own: their images overlap
    judged = parts[parts.images == largest]
    cells = judged.groupby([*RUN, "layer"])[["ari", *RANKINGS]].mean().reset_index()
    totals = growth.groupby(RUN).images.max()
    shares = {f"{part:,} of {totals[run]:,} images" for run, part in judged.groupby(RUN).images.first().items()}
    share = shares.pop() if len(shares) == 1 else "the largest part of the images"
    ranked = [
        Claim(
            f"With {share}, channels rank by {words} as with all of them.",
            "",
            best_estimate(cells, column),
            above=STABLE,
            note="The paper gives no number for its rank stability; the bound is ours.",
        )
        for column, words in RANKINGS.items()
    ]
    grouped = Claim(
        f"With {share}, groups of the local axis are only partly those of all of them (adjusted Rand index).",
        "0.363 with 2,000 of 5,000",
        best_estimate(cells, "ari"),
        below=PARTLY,
        note="The bound is ours. A group of continuously spread channels moves with its borders.",
    )
    return [*ranked, grouped]


def calibration_size_section(inputs: EvidenceInputs) -> Section:
    """Assemble the evidence on the number of calibration images of one network; intervals are over its layers.

    Raises:
        NotApplicableError: see :func:`growth_table`.
    """
    growth = growth_table(inputs)
    sizes = size_table(growth)
    return Section(
        "calibration-size",
        "How many images does it take to place channels on the axes?",
        {"calibration_growth": growth, "calibration_sizes": sizes},
        growth_claims(growth),
        [
            Drawing(
                "calibration_size",
                lambda: growth_figure(sizes),
                "Against the number of calibration images: above, rank correlation of channels with what all images "
                "give; below, adjusted Rand index of the local groups with those from all images, and the groups' "
                "silhouette. "
                f"Means over layers and {DRAWS} draws; bars are one standard deviation of the draws.",
            )
        ],
        follows="A score whose curve has levelled off needs no more images; one whose curve still climbs at its right "
        "end would remove other channels if it were given other images.",
        fails="The parts are of the calibration set itself, which flatters the larger ones: with half of the images "
        "half of the evidence is shared. tp-twoaxis stability compares disjoint halves.",
    )


def growth_figure(sizes: pd.DataFrame) -> Figure:
    """Draw what a part of the images says against its size.

    Args:
        sizes: of :func:`size_table`.

    Example:
        >>> columns = ["ari", "silhouette", *RANKINGS]
        >>> numbers = dict.fromkeys(columns, [0.5, 1.0]) | {f"{column}_sd": [0.1, 0.1] for column in columns}
        >>> len(growth_figure(pd.DataFrame({"images": [100, 200], **numbers})).axes)
        2
    """
    figure, (above, below) = panels(2, 2.6)
    for axes, lines in ((above, RANKINGS), (below, {"ari": "local groups", "silhouette": "silhouette of groups"})):
        for number, (column, label) in enumerate(lines.items()):
            axes.errorbar(
                sizes.images,
                sizes[column],
                sizes[f"{column}_sd"],
                marker=MARKERS[number],
                color=COLOURS[number],
                linewidth=1.4,
                markersize=4.5,
                capsize=2.5,
                label=label,
            )
        axes.set_xscale("log")
        axes.set_xticks(sizes.images.tolist(), [f"{count:,}" for count in sizes.images])
        axes.minorticks_off()
        axes.set_xlabel("calibration images (logarithmic)")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, fontsize=8, frameon=False)
    above.set_ylabel("rank correlation with all")
    below.set_ylabel("index; silhouette")
    below.set_ylim(bottom=min(0.0, float(sizes.ari.min())))
    return figure
