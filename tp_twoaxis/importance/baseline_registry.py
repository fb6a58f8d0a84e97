"""Criteria of others by name, and the host's own versions where they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch_pruning as tp
from torch import nn

from tp_twoaxis.importance.activation_baselines import (
    ActivationRMSImportance,
    CHIPImportance,
    MIPPImportance,
    VBPImportance,
)
from tp_twoaxis.importance.entry import Importance, ImportanceEntry, Needs, option_names
from tp_twoaxis.importance.gathered import GatheredImportance
from tp_twoaxis.importance.gradient_baselines import HessianImportance, TaylorBNImportance
from tp_twoaxis.importance.host_versions import host_activation, host_hessian
from tp_twoaxis.importance.weight_baselines import (
    BNFoldedNormImportance,
    FPGMImportance,
    NetworkSlimmingImportance,
    RandomImportance,
)
from tp_twoaxis.statistics.gradients import accumulate_gradients


def _from_weights(summary: str, made: Callable[..., Importance], *, seeded: bool = False) -> ImportanceEntry:
    return ImportanceEntry("none", summary, made, options=option_names(made), seeded=seeded)


def _from_gradients(summary: str, made: Callable[..., Importance]) -> ImportanceEntry:
    def build(
        model: nn.Module, loader: Iterable[Any], *, max_images: int | None = 5000, progress: bool = True, **options: Any
    ) -> Importance:
        accumulate_gradients(model, loader, max_images=max_images, progress=progress)
        return made(**options)

    return ImportanceEntry("labels", summary, build, options=option_names(made))


def _gathered(needs: Needs, summary: str, made: type[GatheredImportance]) -> ImportanceEntry:
    return ImportanceEntry(needs, summary, made.calibrate, options=option_names(made))


_MAGNITUDE = tp.importance.MagnitudeImportance

BASELINES: dict[str, ImportanceEntry] = {
    "l1": _from_weights("L1 norm of the group's weights", partial(_MAGNITUDE, p=1)),
    "l2": _from_weights("squared L2 norm of the group's weights", partial(_MAGNITUDE, p=2)),
    "taylor": _from_gradients(
        "first-order Taylor expansion of the loss, the host's: weights without BatchNorm's",
        tp.importance.TaylorImportance,
    ),
    "fpgm": _from_weights("summed distance to the layer's other filters (He et al. 2019)", FPGMImportance),
    "random": _from_weights("uniform random numbers, fixed by the seed", RandomImportance, seeded=True),
    "bn-scale": _from_weights(
        "BatchNorm's scale (Liu et al. 2017); groups without one stay whole", tp.importance.BNScaleImportance
    ),
    "lamp": _from_weights("layer-adaptive magnitude (Lee et al. 2021), by channel", tp.importance.LAMPImportance),
    "taylor-bn": _from_gradients(
        "first-order Taylor expansion of the loss (Molchanov et al. 2019), BatchNorm and biases included",
        TaylorBNImportance,
    ),
    "hessian": _gathered(
        "labels", "optimal brain damage (LeCun et al. 1989): squared gradients of all images", HessianImportance
    ),
    "network-slimming": _from_weights(
        "BatchNorm's scale (Liu et al. 2017); a group without one is an error", NetworkSlimmingImportance
    ),
    "bn-folded-norm": _from_weights("L2 norm of the weights with BatchNorm folded in", BNFoldedNormImportance),
    "activation-rms": _gathered("images", "root mean square of what the next layers read", ActivationRMSImportance),
    "vbp": _gathered("images", "variance of what the next layers read (Berisha et al. 2025)", VBPImportance),
    "chip": _gathered("images", "channel independence by nuclear norms (Sui et al. 2021)", CHIPImportance),
    "mipp": _gathered(
        "images",
        "information about the next layer's outputs, Gaussian form (after Westphal et al. 2024)",
        MIPPImportance,
    ),
    "host-fpgm": _from_weights("the host's FPGM: distances of squared weights", tp.importance.FPGMImportance),
    "host-hessian": ImportanceEntry("labels", "the host's Hessian: the last image's squared gradient", host_hessian),
    "host-activation": ImportanceEntry(
        "images", "the host's activation criterion: mean magnitude of the last batch's inputs", host_activation
    ),
}
