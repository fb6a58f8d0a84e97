"""The table of criteria: ours, and those of others to compare with. A new one is a row here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch_pruning as tp

from tp_twoaxis.errors import TwoAxisError, is_number
from tp_twoaxis.importance.base import GatheredImportance
from tp_twoaxis.importance.baselines.activation_criteria import (
    ActivationRMSImportance,
    CHIPImportance,
    MIPPImportance,
    VBPImportance,
)
from tp_twoaxis.importance.baselines.gradient_criteria import (
    HessianImportance,
    TaylorBNImportance,
    TaylorGroupImportance,
)
from tp_twoaxis.importance.baselines.tp_criteria import tp_activation, tp_hessian
from tp_twoaxis.importance.baselines.weight_criteria import (
    BNFoldedNormImportance,
    FPGMImportance,
    NetworkSlimmingImportance,
    RandomImportance,
)
from tp_twoaxis.importance.cap_qgw import CapQGWImportance
from tp_twoaxis.importance.criterion import Axis, Criterion, Importance, option_names
from tp_twoaxis.importance.hybrid import HybridImportance
from tp_twoaxis.importance.pruning_state import Need, PruningState
from tp_twoaxis.importance.registry import CRITERIA, find_criterion
from tp_twoaxis.importance.repair_aware import ENOUGH_IMAGES, AnticipatingImportance
from tp_twoaxis.importance.two_axis import TwoAxisImportance
from tp_twoaxis.scores.named_scores import SCORES, Score, entry_of
from tp_twoaxis.statistics.gradients import accumulate_gradients

_MAGNITUDE = tp.importance.MagnitudeImportance


def _build_score(name: str, state: PruningState, **options: Any) -> TwoAxisImportance:
    entry = SCORES[name]
    of_score = {option: options.pop(option) for option in option_names(entry.function) if option in options}
    score = partial(entry.function, **of_score) if of_score else name
    extras: tuple[Need, ...] = ("consumers",) if options.get("site") == "consumer" else ()
    stats = state.statistics(*extras, target=entry.axis_with(of_score) in ("target", "both"))
    return TwoAxisImportance(stats, score, **options).with_removed(state)


class ScoreCriterion(Criterion):
    """The row of a score: options may make it look at the other axis too."""

    def configured(self, options: Mapping[str, Any], name: str | None = None) -> Criterion:
        """Return the criterion with options set, and its axis with them."""
        made = super().configured(options, name)
        if self.score is not None:
            self._check_numbers(options, self.score)
        entry = None if self.score is None else entry_of(self.score)
        return made if entry is None else replace(made, axis=entry.axis_with(made.bound))

    def _check_numbers(self, options: Mapping[str, Any], score: Score) -> None:
        """Refuse another thing where the score's own default is a number, before images are read."""
        for parameter in inspect.signature(score).parameters.values():
            value = options.get(parameter.name, 0)
            if is_number(parameter.default) and not is_number(value):
                raise TwoAxisError(
                    f"criterion {self.name!r}: option {parameter.name}: expected a number such as "
                    f"{parameter.default:g}, got {value!r}"
                )


def _score(name: str) -> Criterion:
    """Make a row of a score: statistics of layers, reduced over a group's producers or consumers."""
    entry = SCORES[name]
    of_groups = (option for option in option_names(TwoAxisImportance) if option != "score")
    options = (*option_names(entry.function), *of_groups)
    axis: Axis = entry.axis_with({})
    summary = f"{entry.summary} ({axis} axis)"
    factory = partial(_build_score, name)
    return ScoreCriterion(name, summary, factory, ("statistics",), axis, options, entry.function)


def _cap_qgw(state: PruningState, **options: Any) -> CapQGWImportance:
    return CapQGWImportance(state.statistics("gradients", target=False), **options).with_removed(state)


def _anticipating(state: PruningState, **options: Any) -> AnticipatingImportance:
    model, loader = state.images()
    given = {"model": model, "loader": loader, "max_images": state.max_images, "progress": state.progress}
    stats = state.statistics("consumers", target=False, enough=ENOUGH_IMAGES)
    return AnticipatingImportance(stats, **{**given, **options})


def _hybrid(
    state: PruningState, *, allocation: str = "taylor", ranking: str = "capture", seed: int | None = None
) -> HybridImportance:
    parts = (find_criterion(name) for name in (allocation, ranking))
    return HybridImportance(*((part if seed is None else part.seeded(seed)).build(state) for part in parts))


class HybridCriterion(Criterion):
    """The row of ``hybrid``: it needs what its two criteria need."""

    def configured(self, options: Mapping[str, Any], name: str | None = None) -> Criterion:
        """Return the criterion with options set; those that name criteria are checked too."""
        made = super().configured(options, name)
        chosen = {"ranking": "capture", "allocation": "taylor", **made.bound}
        parts = [find_criterion(chosen[role]) for role in ("ranking", "allocation")]
        needs = dict.fromkeys(need for part in parts for need in part.needs)
        return replace(made, needs=tuple(needs), draws=any(part.draws for part in parts))


def _build_weights(made: Callable[..., Importance], state: PruningState, **options: Any) -> Importance:
    return made(**options)


def _weights(
    name: str, summary: str, made: Callable[..., Importance], options: tuple[str, ...] | None = None
) -> Criterion:
    """Make a row of a criterion that looks at weights alone."""
    taken = option_names(made) if options is None else options
    return Criterion(name, summary, partial(_build_weights, made), options=taken)


def _random(state: PruningState, *, seed: int | None = None) -> RandomImportance:
    return RandomImportance(state.seed if seed is None else seed)


def _build_from_gradients(made: Callable[..., Importance], state: PruningState, **options: Any) -> Importance:
    model, loader = state.images(labels=True)
    accumulate_gradients(model, loader, max_images=state.max_images, progress=state.progress)
    return made(**options)


def _gradients(name: str, summary: str, made: Callable[..., Importance]) -> Criterion:
    """Make a row of a criterion that reads the loss's gradients from the model's parameters."""
    return Criterion(name, summary, partial(_build_from_gradients, made), ("labels",), options=option_names(made))


def _build_gathered(make: Callable[..., Importance], labels: bool, state: PruningState, **options: Any) -> Importance:
    model, loader = state.images(labels=labels)
    return make(model, loader, max_images=state.max_images, progress=state.progress, **options)


def _gathered(
    name: str, summary: str, need: Need, made: type[GatheredImportance], options: tuple[str, ...] | None = None
) -> Criterion:
    """Make a row of a criterion that gathers statistics of its own."""
    factory = partial(_build_gathered, made.calibrate, need == "labels")
    return Criterion(name, summary, factory, (need,), options=option_names(made) if options is None else options)


def _torch_pruning(name: str, summary: str, need: Need, prepare: Callable[..., Importance]) -> Criterion:
    """Make a row of Torch-Pruning's own version of a criterion, prepared from images."""
    return Criterion(name, summary, partial(_build_gathered, prepare, need == "labels"), (need,))


_ROWS = (
    *(_score(name) for name in SCORES),
    Criterion(
        "cap-qgw",
        "capture's quantiles in clusters, weighted by gradients",
        _cap_qgw,
        ("statistics", "gradients"),
        "local",
        option_names(CapQGWImportance),
    ),
    Criterion(
        "anticipating",
        "what the logits lose for a channel's MACs once its consumers are repaired",
        _anticipating,
        ("statistics", "consumers", "images"),
        "mixed",
        option_names(AnticipatingImportance),
        enough_images=ENOUGH_IMAGES,
    ),
    HybridCriterion(
        "hybrid",
        "Taylor's allocation, capture's ranking",
        _hybrid,
        ("statistics", "labels"),
        "both",
        ("allocation", "ranking", "seed"),
    ),
    _weights("l1", "L1 norm of the group's weights", partial(_MAGNITUDE, p=1)),
    _weights("l2", "squared L2 norm of the group's weights", partial(_MAGNITUDE, p=2)),
    _gradients(
        "taylor",
        "first-order Taylor expansion of the loss, Torch-Pruning's: weights without BatchNorm's",
        tp.importance.TaylorImportance,
    ),
    _weights("fpgm", "summed distance to the layer's other filters (He et al. 2019)", FPGMImportance),
    Criterion("random", "uniform random numbers, fixed by the seed", _random, options=("seed",), draws=True),
    _weights(
        "bn-scale",
        "BatchNorm's scale (Liu et al. 2017); groups without one stay whole",
        tp.importance.BNScaleImportance,
    ),
    _weights("lamp", "layer-adaptive magnitude (Lee et al. 2021), by channel", tp.importance.LAMPImportance),
    _gradients(
        "taylor-bn",
        "first-order Taylor expansion of the loss (after Molchanov et al. 2019), BatchNorm and biases included",
        TaylorBNImportance,
    ),
    _gathered(
        "taylor-group",
        "squared sums of weight times gradient over the group, mean over minibatches (Molchanov et al. 2019)",
        "labels",
        TaylorGroupImportance,
        ("loss", "normalizer"),  # all layers are one sum: there is nothing to reduce
    ),
    _gathered(
        "hessian",
        "optimal brain damage (LeCun et al. 1989): squared gradients of all images",
        "labels",
        HessianImportance,
    ),
    _weights(
        "network-slimming",
        "BatchNorm's scale (Liu et al. 2017); a group without one is an error",
        NetworkSlimmingImportance,
    ),
    _weights("bn-folded-norm", "L2 norm of the weights with BatchNorm folded in", BNFoldedNormImportance),
    _gathered("activation-rms", "root mean square of what the next layers read", "images", ActivationRMSImportance),
    _gathered("vbp", "variance of what the next layers read (Berisha et al. 2025)", "images", VBPImportance),
    _gathered("chip", "channel independence by nuclear norms (Sui et al. 2021)", "images", CHIPImportance),
    _gathered(
        "mipp",
        "information about the next layer's outputs, Gaussian form (after Westphal et al. 2024)",
        "images",
        MIPPImportance,
    ),
    _weights("host-fpgm", "Torch-Pruning's FPGM: distances of squared weights", tp.importance.FPGMImportance),
    _torch_pruning("host-hessian", "Torch-Pruning's Hessian: the last image's squared gradient", "labels", tp_hessian),
    _torch_pruning(
        "host-activation",
        "Torch-Pruning's activation criterion: mean magnitude of the last batch's inputs",
        "images",
        tp_activation,
    ),
)
CRITERIA.update({criterion.name: criterion for criterion in _ROWS})
