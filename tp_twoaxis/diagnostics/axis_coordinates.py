"""Where the varying channels of a cell lie on both axes, and which cells have enough images to tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.diagnostics.rank_agreement import FEWEST_CHANNELS, rank_correlation
from tp_twoaxis.scores import local, target
from tp_twoaxis.statistics.layer_statistics import LayerStatistics

# the paper's smallest calibration (appendix D); ours as a bound. The task information of an unrelated channel is
# about 1 / (2 n) nats from n images, and below this it is as large as that of related ones
FEWEST_IMAGES = 100


class LocalAxis(NamedTuple):
    """Input capture I_k and peer overlap R_k of V varying channels, [V] nats each."""

    capture: Tensor
    overlap: Tensor


class TargetAxis(NamedTuple):
    """Task information M_k and target excess X_k of V varying channels, [V] nats each."""

    task_mi: Tensor
    excess: Tensor


def local_axis(layer: LayerStatistics) -> LocalAxis:
    """Compute a cell's local coordinates (equations 1 and 2); constant channels are left out.

    Example:
        >>> import torch
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Conv2d(3, 4, 3)
        >>> layer = calibrate(net, [torch.randn(8, 3, 6, 6)], target=None, progress=False)[""]
        >>> [len(values) for values in local_axis(layer)]
        [4, 4]
    """
    active = layer.variance > 0
    return LocalAxis(local.input_capture(layer.variance)[active], local.peer_overlap(layer.correlation, active)[active])


def target_axis(
    layer: LayerStatistics,
    variable: str | None = None,
    *,
    partners: int = 10,
    rule: target.PartnerRule = "task-mi",
    seed: int = 0,
) -> TargetAxis:
    """Compute a cell's target coordinates (equations 3 and 5); constant channels are left out, as partners too.

    Args:
        layer: statistics with task variables.
        variable: the task variable; default the calibration's target.
        partners: of each channel in its excess, m.
        rule: how partners are chosen; see :func:`~tp_twoaxis.scores.target.target_excess`.
        seed: of the random rule.

    Raises:
        TwoAxisError: the variable was not recorded.

    Example:
        >>> import torch
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> layer = calibrate(net, [(torch.randn(64, 8), torch.randint(4, (64,)))], progress=False)["1"]
        >>> [len(values) for values in target_axis(layer, "predicted_margin")]
        [4, 4]
    """
    active = layer.variance > 0
    correlation = layer.target_correlation(variable)[active]
    excess = target.target_excess(
        correlation, layer.pooled_correlation[active][:, active], partners=partners, rule=rule, seed=seed
    )
    return TargetAxis(target.task_information(correlation), excess)


def cell_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation over the channels of a cell that have both values.

    Args:
        a: [V], NaN for channels to leave out.
        b: [V].

    Returns:
        A number in [-1, 1]; NaN below three channels, or where all values of either are equal.

    Example:
        >>> import torch
        >>> cell_correlation(torch.tensor([1.0, 2.0, 9.0, math.nan]), torch.tensor([3.0, 2.0, 1.0, 4.0]))
        -1.0
    """
    both = ~(a.isnan() | b.isnan())
    if int(both.sum()) < FEWEST_CHANNELS:
        return math.nan
    return float(rank_correlation(a[both][None], b[both][None]))


def relative_depths(cells: Sequence[str]) -> dict[str, float]:
    """Place cells between the first, 0, and the last, 1, in the model's order.

    Example:
        >>> relative_depths(["conv1", "conv2", "conv3"])
        {'conv1': 0.0, 'conv2': 0.5, 'conv3': 1.0}
    """
    return {name: number / max(1, len(cells) - 1) for number, name in enumerate(cells)}


def task_cells(inputs: EvidenceInputs) -> list[str]:
    """Name the cells whose channels can be placed on the target axis.

    A cell with more channels than images is left out: its pooled correlations are those of a singular matrix.

    Raises:
        NotApplicableError: there is no convolution, no task variable, only one class, or too few images.

    Example:
        >>> import torch
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = [(torch.randn(128, 3, 6, 6), torch.randint(4, (128,)))]
        >>> task_cells(EvidenceInputs(net, calibrate(net, images, progress=False), images))
        ['0']
    """
    names, statistics = inputs.cells(), inputs.statistics
    if statistics.target is None:
        raise NotApplicableError(
            "the statistics hold no task variable; calibrate a classifier with labels, or with "
            "target='predicted_margin'"
        )
    if statistics.num_images < FEWEST_IMAGES:
        raise NotApplicableError(
            f"expected at least {FEWEST_IMAGES} images to measure task information with, got {statistics.num_images}"
        )
    first = statistics[names[0]]
    if "one_vs_rest" in first.columns and not bool(first.target_correlation("one_vs_rest").any()):
        raise NotApplicableError("all images of the calibration have one class; expected images of at least two")
    able = [name for name in names if statistics[name].num_channels <= statistics.num_images]
    if not able:
        raise NotApplicableError(
            f"every convolution has more channels than there are images ({statistics.num_images}); give more images"
        )
    return able
