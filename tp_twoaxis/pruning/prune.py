"""From a trained network and an importance to a smaller network at a MACs target, or to no change at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tp_twoaxis.dependency.attention import AttentionUnit
from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.dependency.flops import (
    ExampleInputs,
    MacsCount,
    count_macs,
    inside,
    measure_latency,
    running_layers,
)
from tp_twoaxis.dependency.other_counters import thop_macs, tp_macs
from tp_twoaxis.errors import TwoAxisError, reason
from tp_twoaxis.importance import (
    AnticipatingImportance,
    Criterion,
    DistortionCurve,
    DistortionCurves,
    HybridImportance,
    Importance,
    PruningState,
    TwoAxisImportance,
    as_criterion,
)
from tp_twoaxis.importance.baselines import READ_FROM_MODEL
from tp_twoaxis.importance.pruning_state import iterated_once
from tp_twoaxis.known_names import AUTO
from tp_twoaxis.pruning.checkpoint import loading_notes
from tp_twoaxis.pruning.config import Budget, PruningConfig
from tp_twoaxis.pruning.iterate import PruningOutcome, prune_in_steps
from tp_twoaxis.pruning.latency_step import DenseLatency
from tp_twoaxis.pruning.pruning_report import PruningReport, Size
from tp_twoaxis.pruning.recipe import choose_recipe, is_auto
from tp_twoaxis.repair import RepairReport, check_repair, refits, repair_network
from tp_twoaxis.repair.repair_task import TRAINING_STEPS
from tp_twoaxis.repair.strategies import without_training
from tp_twoaxis.runtime.model_state import ModelSnapshot, refuse_quantised, unwrap
from tp_twoaxis.runtime.timing import timed
from tp_twoaxis.statistics.store import CalibrationStatistics

LATENCY_BATCHES = (1, 64)


def prune_to_flops(
    model: nn.Module,
    example_inputs: ExampleInputs,
    importance: str | Criterion | Callable[[Any], Tensor] = AUTO,
    *,
    flops: float = 0.5,
    budget: Budget = "macs",
    steps: int = 1,
    repair: str | Iterable[str] = AUTO,
    stats: CalibrationStatistics | None = None,
    loader: Iterable[Any] | None = None,
    ignored_layers: Iterable[nn.Module | str] = (),
    min_keep: float = 0.1,
    round_to: int | None = None,
    attention: AttentionUnit = "heads",
    tolerance: float = 0.01,
    guard: bool = True,
    max_memory: float = 4.0,
    training_steps: int = TRAINING_STEPS,
    max_images: int | None = 5000,
    latency: bool = False,
    other_counters: bool = False,
    progress: bool = True,
) -> PruningReport:
    """Remove channels through Torch-Pruning's dependency graph until a share of the MACs is left.

    One threshold over all groups decides, at which the kept MACs match the target by the counter of
    :func:`~tp_twoaxis.dependency.flops.count_macs`. The model is changed in place; on any error it is
    put back exactly as it was. Layers that compute the model's outputs are never touched. Parameters
    become new objects, so build optimizers afterwards.

    Args:
        model: the network; DataParallel, DistributedDataParallel and ``torch.compile`` are looked through.
        example_inputs: a tensor, or a tuple or dict of the forward's arguments; moved to the model's device.
        importance: any Torch-Pruning importance, ours or its own, or a criterion expression, see
            :func:`~tp_twoaxis.importance.find_criterion`: a score (then ``stats``, or ``loader`` to calibrate
            from) or a baseline such as ``l2`` or ``taylor``. Gradient-based objects need
            ``loss.backward()`` before. Left out, ``anticipating`` where the images allow it, see
            :func:`~tp_twoaxis.pruning.recipe.choose_recipe`; the report says what was chosen and why.
        flops: share of the dense MACs to **keep**, in (0, 1].
        budget: what ``flops`` is a share of: ``macs``; ``channels``, all groups' root channels together, for
            protocols that remove a share of the channels and take the MACs as they come; or ``latency``, the time of a
            forward pass over ``example_inputs`` as they are, batch and all, on the model's device and with the threads
            that there are (:func:`~tp_twoaxis.pruning.latency_step.prune_step_to_latency`).
        steps: remove in so many steps, each the same share of what is there (``flops ** (i / steps)`` is left after
            step i): score, remove, repair, gather statistics anew, score again. See the notes.
        repair: any of ``bn`` (re-estimate BatchNorm statistics), ``bias``, ``ridge``, ``patch``, ``sequential`` and
            ``joint`` (refit the layers that read removed channels to those that stay), and ``distill`` (train on from
            ``joint`` without labels, minutes instead of seconds), from ``loader``; a tuple, or
            ``"ridge+bn"``; see :func:`~tp_twoaxis.repair.repair_network`. ``()`` and ``"none"`` repair nothing. Left
            out, the one that keeps most: ``joint`` where the images allow it.
        stats: calibration statistics for an importance given by name; with ``consumers=True`` they serve the
            repairs as well. Later steps score by new ones, of the same layers and target.
        loader: images for repair (labels are not used there) and, if needed, for calibration; re-iterable where there
            are several steps.
        ignored_layers: layers, or parts of the model, or their names, that keep their output channels; those that read
            no removed channel keep their weights too, whatever the repair.
        min_keep: share of every group's channels that always stays; of the dense network's, whatever the steps.
        round_to: keep multiples of this many channels in every group that loses some.
        attention: what attention that is built from linear layers loses: whole ``heads``, or ``head-dims``, the same
            number of queries, keys and values of every head, at places of its own in each. PyTorch's own
            ``nn.MultiheadAttention`` loses head dims with the stream that it reads, either way.
        tolerance: accepted relative distance to the target; 5 % for a latency, whatever it is.
        guard: hold every fifth image out of repair, at most 128, and keep changes of weights only as far as they bring
            the network nearer to the dense one on those; see :func:`~tp_twoaxis.repair.repair_network`.
        max_memory: GiB for the activations that wait in ``sequential`` and ``joint``; images that are too many for the
            first layers join behind them, where activations are smaller.
        training_steps: of ``distill``, which runs after the last of ``steps``.
        max_images: at most this many images for repair, for calibration and for what a named baseline gathers.
        other_counters: also report Torch-Pruning's and thop's MACs, before and after: four more passes.
        latency: also measure milliseconds at batch 1 and batch 64, before and after.
        progress: show progress bars on stderr.

    Returns:
        The report; when the target could not be met within ``tolerance``, its notes explain why. All of it, channel
        numbers and repaired layers too, compares the dense network with the outcome of all steps.

    Raises:
        TwoAxisError: bad arguments, an untraceable model, a failing importance, a network that no longer runs.
        UnreachableTargetError: no allowed removal reaches the target; the message gives the range.

    Notes:
        Between two steps the repaired network is what is scored. The repair itself starts from the dense network's
        weights and statistics each time and covers all removals so far, so errors do not add up
        (:func:`~tp_twoaxis.pruning.iterate.prune_in_steps`). For training between steps call this function
        once a step, with ``flops`` the share of what is there then.

        A criterion given by name is built anew after every step. An importance given as an object is replaced by a copy
        with new statistics where it has a method ``build(state)``, as ours have, from its own ``loader`` if it has one,
        and called again as it is where it reads nothing but weights. Objects that read gradients or activations stored
        on the model are refused for several steps, because those are of the dense network: give the name.

    Example:
        >>> import torch
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
        ...     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
        >>> loader = [(torch.randn(64, 3, 12, 12), torch.randint(4, (64,)))]
        >>> x = torch.randn(1, 3, 12, 12)
        >>> report = prune_to_flops(net, x, flops=0.5, loader=loader, progress=False)
        >>> report.importance, report.repair, abs(report.achieved - 0.5) < 0.005
        ('anticipating', ['joint'], True)
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...     nn.Linear(32, 4))
        >>> report = prune_to_flops(net, x, "cap-a", flops=0.5, steps=3, repair="bn", loader=loader, progress=False)
        >>> report.steps, abs(report.achieved - 0.5) < 0.005
        (3, True)
    """
    named = () if is_auto(repair) else repair
    config = PruningConfig(
        flops,
        budget,
        steps,
        named,
        ignored_layers,
        min_keep,
        round_to,
        attention,
        tolerance,
        guard,
        max_memory,
        training_steps,
    )
    network = unwrap(model)
    refuse_quantised(network)
    parameter = next(network.parameters(), None)
    if parameter is None:
        raise TwoAxisError(f"{type(network).__name__} has no parameters, so nothing can be removed")
    config.ignored_in(network)
    if not is_auto(importance):
        as_criterion(importance)  # a wrong name is said before images are read
    recipe = choose_recipe(network, example_inputs, importance, repair, loader=loader, stats=stats)
    criterion = as_criterion(recipe.importance)
    repairs = check_repair(recipe.repair, network, loader, stats)
    _check_steps(config.steps, criterion, recipe.importance, loader)
    inputs = tree_map(lambda x: x.to(parameter.device) if isinstance(x, Tensor) else x, example_inputs)
    state = PruningState(network, loader, stats, max_images=max_images, progress=progress)
    snapshot = ModelSnapshot(network)
    try:
        report = _prune(inputs, criterion, state, config, repairs, _Measured(network, inputs, other_counters, latency))
    except BaseException:
        snapshot.restore()
        raise
    if isinstance(recipe.importance, (str, Criterion)):
        network.zero_grad(set_to_none=True)  # gradients gathered for a criterion belong to the dense network
    return replace(report, notes=[*recipe.notes, *report.notes])


def _prune(
    inputs: ExampleInputs,
    criterion: Criterion,
    state: PruningState,
    config: PruningConfig,
    repairs: tuple[str, ...],
    measured: _Measured,
) -> PruningReport:
    """Prune a network in place; on an error the caller restores it."""
    network, seconds = measured.network, dict[str, float]()
    trained = {name: p.requires_grad for name, p in network.named_parameters()}
    modes = [(module, module.training) for module in network.modules()]
    with timed(seconds, "calibrate"):
        importance, stats = _first_importance(criterion, state, refits(repairs))
    with timed(seconds, "count"):
        dense = _count_dense(network, inputs)
        before, milliseconds = measured.size(dense), measured.latencies()
    # the copy reads the network as it is here: statistics and targets of repair are the dense network's
    original = copy.deepcopy(network).requires_grad_(False) if refits(repairs) else network

    latency = None
    if config.budget == "latency":
        dense_copy = original if original is not network else copy.deepcopy(network)
        latency = DenseLatency(dense_copy, inputs, state.progress)

    def repair(masks: dict[str, PrunedChannels], last: bool) -> RepairReport:
        return repair_network(
            network,
            original,
            masks,
            repairs if last else without_training(repairs),
            loader=state.loader,
            stats=stats,
            max_images=state.max_images,
            whole=config.ignored_names(network),
            measure=last,
            guard=config.guard,
            max_memory=config.max_memory,
            training_steps=config.training_steps,
            progress=state.progress,
        )

    outcome = prune_in_steps(inputs, importance, criterion, state, config, dense, seconds, repair, latency)
    with timed(seconds, "count"):
        after, later = measured.size(outcome.count), measured.latencies()
    achieved, notes = outcome.achieved, _notes(outcome)
    times = {key: (first, later[key]) for key, first in milliseconds.items()}
    if latency is not None:
        with timed(seconds, "latency"):
            ratio = latency.beside(network)
        achieved, times["example"] = ratio.ratio, ratio.milliseconds[::-1]
        notes += latency.notes(ratio, config.flops)
    for name, kept in network.named_parameters():
        kept.requires_grad_(trained.get(name, kept.requires_grad))  # a bias that repair added has no past
    for module, training in modes:
        module.training = training
    return PruningReport(
        criterion.name,
        config.flops,
        achieved,
        before,
        after,
        [report for _, report in outcome.history.groups],
        outcome.history.removed_channels,
        list(repairs),
        seconds,
        times,
        [*notes, *loading_notes(network)],
        config.budget,
        outcome.repair.consumers,
        config.steps,
        _sensitivity(outcome.importance, network),
        [] if latency is None else latency.table,
    )


def _first_importance(
    criterion: Criterion, state: PruningState, refit: bool
) -> tuple[Importance, CalibrationStatistics | None]:
    """Build the importance of the dense network; also return statistics that repairs can use, if there are any."""
    if "statistics" in criterion.needs and state.stats is None and state.loader is not None:
        # one pass for the criterion and for the repair
        criterion.statistics(state, also=("consumers",) if refit else ())
    importance = criterion.build(state)
    known = state.known_statistics
    if known is None and isinstance(importance, (TwoAxisImportance, AnticipatingImportance)):
        known = importance.stats
    return importance, known


def _sensitivity(importance: Importance, network: nn.Module) -> list[DistortionCurve]:
    curves = getattr(importance, "curves", None)
    if not isinstance(curves, DistortionCurves):
        return []
    return list(curves.in_order_of(name for name, _ in network.named_modules()).values())


def _notes(outcome: PruningOutcome) -> list[str]:
    notes = [*outcome.notes, *outcome.repair.notes]
    if getattr(getattr(outcome.importance, "stats", None), "target", None) == "predicted_margin":
        notes.append("calibrated without labels or on the prediction: the target axis uses the predicted margin")
    return notes


def _check_steps(
    steps: int, criterion: Criterion, importance: str | Criterion | Importance, loader: Iterable[Any] | None
) -> None:
    """Check that later steps can have what they need, before the first one changes anything.

    Raises:
        TwoAxisError: there is something that later steps cannot have.
    """
    if steps == 1:
        return
    parts = [importance.allocation, importance.ranking] if isinstance(importance, HybridImportance) else [importance]
    for part in parts:
        if isinstance(part, READ_FROM_MODEL) and not hasattr(part, "build"):
            raise TwoAxisError(
                f"steps={steps}: {type(part).__name__} reads what was gathered on the dense network, and later steps "
                "need it of what is left; give the criterion by name ('taylor', 'taylor-bn', 'host-hessian', "
                "'host-activation', 'hybrid') with loader=..., or prune step by step with steps=1"
            )
        named = part is importance and bool(criterion.needs)
        ours = hasattr(part, "build") and not isinstance(part, Criterion) and getattr(part, "loader", None) is None
        if loader is None and (named or ours):
            what = criterion.name if isinstance(part, (str, Criterion)) else type(part).__name__
            raise TwoAxisError(
                f"steps={steps}: {what} looks at what is left with images after each step: expected loader=..., got "
                "none; pass the calibration images, or steps=1"
            )
    if iterated_once(loader):
        raise TwoAxisError(
            f"steps={steps} reads the images more than once: expected a list or a DataLoader, got "
            f"{type(loader).__name__}; pass list(loader)"
        )


@dataclass(frozen=True)
class _Measured:
    """A network and what is measured of it before and after."""

    network: nn.Module
    inputs: ExampleInputs
    other_counters: bool
    latency: bool

    def size(self, count: MacsCount) -> Size:
        if not self.other_counters:
            return Size(count.total, count.params)
        counters = tp_macs(self.network, self.inputs), thop_macs(self.network, self.inputs)
        return Size(count.total, count.params, *counters)

    def latencies(self) -> dict[str, float]:
        if not self.latency:
            return {}
        return {f"batch {n}": measure_latency(self.network, self.inputs, n) for n in LATENCY_BATCHES}


def _count_dense(network: nn.Module, inputs: ExampleInputs) -> MacsCount:
    with running_layers(network) as running:
        try:
            return count_macs(network, inputs)
        except TwoAxisError:
            raise
        except Exception as error:
            raise TwoAxisError(
                f"{type(network).__name__} does not run on example_inputs{inside(running, network)} "
                f"({reason(error)}); "
                "give it what its forward takes, for example torch.randn(1, 3, 224, 224)"
            ) from error
