"""Every criterion by name: ours, and the baselines to compare with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance.baseline_registry import BASELINES, Importance, ImportanceEntry
from tp_twoaxis.importance.two_axis import TwoAxisImportance
from tp_twoaxis.importance.weight_baselines import RandomImportance
from tp_twoaxis.scores.registry import SCORES
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.store import CalibrationStatistics


def _ours(name: str) -> ImportanceEntry:
    # minus an overlap is below 0, which a division by the mean would turn around
    normalizer = "standarization" if name == "low-overlap" else "mean"
    build = partial(TwoAxisImportance, score=name, normalizer=normalizer)
    return ImportanceEntry("stats", f"{SCORES[name].summary} ({SCORES[name].axis} axis)", build)


IMPORTANCES: dict[str, ImportanceEntry] = {name: _ours(name) for name in SCORES} | BASELINES


def find_importance(name: str) -> ImportanceEntry:
    """Look a criterion up without building it.

    Args:
        name: one of :data:`IMPORTANCES`.

    Raises:
        TwoAxisError: no such criterion; the message lists all names and those near it.

    Example:
        >>> find_importance("taylor").needs
        'labels'
    """
    if name not in IMPORTANCES:
        near = difflib.get_close_matches(name, IMPORTANCES, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; choose one of them"
        raise TwoAxisError(f"score: expected one of {', '.join(IMPORTANCES)}, got {name!r}{hint}")
    return IMPORTANCES[name]


def make_importance(
    name: str,
    *,
    stats: CalibrationStatistics | None = None,
    model: nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    seed: int = 0,
    max_images: int | None = 5000,
    progress: bool = True,
) -> Importance:
    """Build any criterion, ready to be handed to Torch-Pruning or :func:`~tp_twoaxis.prune_to_flops`.

    ``taylor``, ``taylor-bn`` and ``host-hessian`` run a backward pass and **leave gradients on the model**, where
    they are read at every call; call ``model.zero_grad()`` once the model is pruned. What else looks at the
    model's activations or gradients leaves it as it was.

    Args:
        name: one of :data:`IMPORTANCES`.
        stats: calibration statistics, for entries that need them; without, they are gathered here from
            ``model`` and ``loader``.
        model: the model to prune.
        loader: yields ``(images, labels)``; labels are not used by entries that need ``"images"``.
        seed: of ``random``; the others do not use it.
        max_images: gather from at most this many images; None reads the loader to its end.
        progress: show progress bars on stderr.

    Returns:
        A Torch-Pruning importance: group -> one score a root channel, larger keeps.

    Raises:
        TwoAxisError: the name is unknown, or what the criterion needs is not given.

    Example:
        >>> type(make_importance("l1")).__name__
        'MagnitudeImportance'
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
        >>> make_importance("capture", model=net, loader=[torch.randn(64, 8)], progress=False)
        TwoAxisImportance(score='capture', normalizer='mean')
    """
    entry = find_importance(name)
    if entry.needs == "stats":
        if stats is None:
            network, images = _required(
                name, model, loader, "stats=calibrate(model, loader), or model=... and loader=..."
            )
            stats = calibrate(network, images, max_images=max_images, progress=progress)
        return entry.build(stats)
    if entry.needs in ("labels", "images"):
        what = "model=... and loader=..." + (" with labels" if entry.needs == "labels" else "")
        network, images = _required(name, model, loader, what)
        return entry.build(network, images, max_images=max_images, progress=progress)
    return entry.build(seed=seed) if entry.build is RandomImportance else entry.build()


def _required(
    name: str, model: nn.Module | None, loader: Iterable[Any] | None, what: str
) -> tuple[nn.Module, Iterable[Any]]:
    if model is None or loader is None:
        raise TwoAxisError(f"importance {name!r}: expected {what}, got neither or only one; pass them")
    return model, loader
