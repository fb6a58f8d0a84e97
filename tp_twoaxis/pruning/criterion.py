"""What ranks the channels of each step, from what a user may hand over: a name or an importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance.anticipating import AnticipatingImportance
from tp_twoaxis.importance.entry import Importance, requires
from tp_twoaxis.importance.gradient_baselines import TaylorBNImportance
from tp_twoaxis.importance.hybrid import HybridImportance
from tp_twoaxis.importance.registry import IMPORTANCES, build_importance, find_importance
from tp_twoaxis.importance.renewal import Interim, renewed, told
from tp_twoaxis.importance.two_axis import TwoAxisImportance
from tp_twoaxis.pruning.repair import LayerLoss
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.store import CalibrationStatistics

# what these read is on the model, of the state in which somebody put it there
OF_THE_DENSE = (
    tp.importance.GroupTaylorImportance,
    tp.importance.GroupHessianImportance,
    tp.importance.OBDCImportance,
    tp.importance.ActivationImportance,
    TaylorBNImportance,
)


def resolve(
    importance: str | Callable[[Any], Tensor],
    stats: CalibrationStatistics | None,
    loader: Iterable[Any] | None,
    network: nn.Module,
    max_images: int | None,
    consumers: bool,
    progress: bool,
) -> tuple[Callable[[Any], Tensor], str, CalibrationStatistics | None]:
    """Find what ranks the channels of the dense network, its name for the report, and what statistics there are.

    Args:
        importance: see :func:`~tp_twoaxis.prune_to_flops`, as for what is not named here.
        stats: of the network, if there are any.
        loader: to gather them from, if they are needed.
        network: the dense network.
        max_images: see there.
        consumers: also gather what layers read, for the repair.
        progress: show progress bars.

    Raises:
        TwoAxisError: it is none, or what it needs is not there.
    """
    if isinstance(importance, str):
        entry = find_importance(importance)
        if stats is None and loader is not None and requires(entry.needs, "stats"):
            stats = calibrate(
                network,
                loader,
                max_images=max_images,
                gradients=requires(entry.needs, "gradient-stats"),
                consumers=consumers or requires(entry.needs, "consumer-stats"),
                progress=progress,
            )
        ranking = build_importance(
            importance, entry, stats=stats, model=network, loader=loader, max_images=max_images, progress=progress
        )
        return ranking, importance, stats
    if not callable(importance):
        raise TwoAxisError(
            f"importance: expected a Torch-Pruning importance or a name, got {type(importance).__name__}; "
            f"names are {', '.join(IMPORTANCES)}"
        )
    if isinstance(importance, (TwoAxisImportance, AnticipatingImportance)):
        return importance, repr(importance), importance.stats if stats is None else stats
    return importance, type(importance).__name__, stats


def check_steps(steps: int, importance: str | Importance, loader: Iterable[Any] | None) -> None:
    """Check that later steps can have what they need, before the first one changes anything.

    Args:
        steps: see :func:`~tp_twoaxis.prune_to_flops`, as for the others.
        importance: what will rank the channels.
        loader: of the images.

    Raises:
        TwoAxisError: the number is out of range, or there is something that later steps cannot have.

    Example:
        >>> check_steps(3, "l2", None)
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise TwoAxisError(f"steps: expected a whole number of at least 1, got {steps!r}")
    if steps == 1:
        return
    parts = [importance.allocation, importance.ranking] if isinstance(importance, HybridImportance) else [importance]
    for part in parts:
        if isinstance(part, OF_THE_DENSE) and not hasattr(part, "renewed"):
            raise TwoAxisError(
                f"steps={steps}: {type(part).__name__} reads what was gathered on the dense network, and later steps "
                "need it of what is left; give the criterion by name ('taylor', 'taylor-bn', 'host-hessian', "
                "'host-activation', 'hybrid') with loader=..., or prune step by step with steps=1"
            )
        named = isinstance(part, str) and find_importance(part).needs != "none"
        ours = hasattr(part, "renewed") and getattr(part, "loader", None) is None
        if loader is None and (named or ours):
            what = part if isinstance(part, str) else type(part).__name__
            raise TwoAxisError(
                f"steps={steps}: {what} looks at what is left with images after each step: expected loader=..., got "
                "none; pass the calibration images, or steps=1"
            )
    if isinstance(loader, Iterator):
        raise TwoAxisError(
            f"steps={steps} reads the images more than once: expected a list or a DataLoader, got "
            f"{type(loader).__name__}; pass list(loader)"
        )


def interim(
    network: nn.Module,
    losses: dict[str, LayerLoss],
    loader: Iterable[Any] | None,
    max_images: int | None,
    progress: bool,
) -> Interim:
    """Describe the network between two steps.

    Args:
        network: what is left.
        losses: its losses since the dense one.
        loader: of the images.
        max_images: use at most so many.
        progress: show progress bars.
    """
    written, read = (
        {name: float(mask.double().mean()) for name, mask in masks.items()}
        for masks in ({n: loss.outputs for n, loss in losses.items()}, {n: loss.inputs for n, loss in losses.items()})
    )
    return Interim(network, loader, max_images, progress, written, read)


def renew(importance: str | Importance, stats: CalibrationStatistics | None, interim: Interim) -> Importance:
    """Find what ranks the channels of a later step.

    Args:
        importance: see :func:`~tp_twoaxis.prune_to_flops`.
        stats: of the first step, if there were any.
        interim: the network as it is.

    Raises:
        TwoAxisError: what it needs cannot be gathered.
    """
    if not isinstance(importance, str):
        return renewed(importance, interim)
    entry = find_importance(importance)
    fresh = None
    if stats is not None and requires(entry.needs, "stats"):
        fresh = interim.recalibrated(
            stats,
            gradients=requires(entry.needs, "gradient-stats"),
            consumers=requires(entry.needs, "consumer-stats"),
        )
    made = build_importance(
        importance,
        entry,
        stats=fresh,
        model=interim.model,
        loader=interim.loader,
        max_images=interim.max_images,
        progress=interim.progress,
    )
    return told(made, interim)
