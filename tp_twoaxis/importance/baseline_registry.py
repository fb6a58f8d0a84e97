"""Criteria of others by name, and the host's own versions where they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch_pruning as tp
from torch import Tensor, nn

from tp_twoaxis.importance.activation_baselines import (
    ActivationRMSImportance,
    CHIPImportance,
    MIPPImportance,
    VBPImportance,
)
from tp_twoaxis.importance.gradient_baselines import HessianImportance, TaylorBNImportance
from tp_twoaxis.importance.host_versions import host_activation, host_hessian
from tp_twoaxis.importance.weight_baselines import (
    BNFoldedNormImportance,
    FPGMImportance,
    NetworkSlimmingImportance,
    RandomImportance,
)
from tp_twoaxis.statistics.gradients import accumulate_gradients

Importance = Callable[[Any], Tensor]


@dataclass(frozen=True)
class ImportanceEntry:
    """A named criterion.

    Attributes:
        needs: ``"stats"``: calibration statistics (or a model and a loader to make them); ``"labels"``: a model
            and a loader with labels, for a backward pass; ``"images"``: a model and a loader, labels not used;
            ``"none"``: weights alone.
        summary: what it is, in one line.
        build: makes the importance. ``"stats"`` entries are called with the statistics; ``"labels"`` and
            ``"images"`` entries with the model, the loader, ``max_images=`` and ``progress=``, and may leave
            gradients on the model; ``random`` with ``seed=``; the others with nothing.
    """

    needs: Literal["stats", "labels", "images", "none"]
    summary: str
    build: Callable[..., Importance]


def _with_gradients(importance: Callable[[], Importance]) -> Callable[..., Importance]:
    def build(
        model: nn.Module, loader: Iterable[Any], *, max_images: int | None = 5000, progress: bool = True
    ) -> Importance:
        accumulate_gradients(model, loader, max_images=max_images, progress=progress)
        return importance()

    return build


_MAGNITUDE = tp.importance.MagnitudeImportance

BASELINES: dict[str, ImportanceEntry] = {
    "l1": ImportanceEntry("none", "L1 norm of the group's weights", partial(_MAGNITUDE, p=1)),
    "l2": ImportanceEntry("none", "squared L2 norm of the group's weights", partial(_MAGNITUDE, p=2)),
    "taylor": ImportanceEntry(
        "labels",
        "first-order Taylor expansion of the loss, the host's: weights without BatchNorm's",
        _with_gradients(tp.importance.TaylorImportance),
    ),
    "fpgm": ImportanceEntry("none", "summed distance to the layer's other filters (He et al. 2019)", FPGMImportance),
    "random": ImportanceEntry("none", "uniform random numbers, fixed by the seed", RandomImportance),
    "bn-scale": ImportanceEntry(
        "none", "BatchNorm's scale (Liu et al. 2017); groups without one stay whole", tp.importance.BNScaleImportance
    ),
    "lamp": ImportanceEntry(
        "none", "layer-adaptive magnitude (Lee et al. 2021), by channel", tp.importance.LAMPImportance
    ),
    "taylor-bn": ImportanceEntry(
        "labels",
        "first-order Taylor expansion of the loss (Molchanov et al. 2019), BatchNorm and biases included",
        _with_gradients(TaylorBNImportance),
    ),
    "hessian": ImportanceEntry(
        "labels",
        "optimal brain damage (LeCun et al. 1989): squared gradients of all images",
        HessianImportance.calibrate,
    ),
    "network-slimming": ImportanceEntry(
        "none", "BatchNorm's scale (Liu et al. 2017); a group without one is an error", NetworkSlimmingImportance
    ),
    "bn-folded-norm": ImportanceEntry(
        "none", "L2 norm of the weights with BatchNorm folded in", BNFoldedNormImportance
    ),
    "activation-rms": ImportanceEntry(
        "images", "root mean square of what the next layers read", ActivationRMSImportance.calibrate
    ),
    "vbp": ImportanceEntry(
        "images", "variance of what the next layers read (Berisha et al. 2025)", VBPImportance.calibrate
    ),
    "chip": ImportanceEntry(
        "images", "channel independence by nuclear norms (Sui et al. 2021)", CHIPImportance.calibrate
    ),
    "mipp": ImportanceEntry(
        "images",
        "information about the next layer's outputs, Gaussian form (after Westphal et al. 2024)",
        MIPPImportance.calibrate,
    ),
    "host-fpgm": ImportanceEntry("none", "the host's FPGM: distances of squared weights", tp.importance.FPGMImportance),
    "host-hessian": ImportanceEntry("labels", "the host's Hessian: the last image's squared gradient", host_hessian),
    "host-activation": ImportanceEntry(
        "images", "the host's activation criterion: mean magnitude of the last batch's inputs", host_activation
    ),
}
