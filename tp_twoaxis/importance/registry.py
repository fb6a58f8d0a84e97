"""Every criterion by name: ours, and the baselines to compare with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance.anticipating import AnticipatingImportance
from tp_twoaxis.importance.baseline_registry import BASELINES
from tp_twoaxis.importance.cap import CapQGWImportance
from tp_twoaxis.importance.entry import Importance, ImportanceEntry, option_names, requires
from tp_twoaxis.importance.hybrid import HybridImportance
from tp_twoaxis.importance.spec import parse_spec
from tp_twoaxis.importance.two_axis import TwoAxisImportance
from tp_twoaxis.scores.registry import SCORES
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.store import CalibrationStatistics


def _ours(name: str) -> ImportanceEntry:
    score = SCORES[name]
    own = option_names(score.function)

    def build(stats: CalibrationStatistics, **options: Any) -> TwoAxisImportance:
        of_score = {option: options.pop(option) for option in own if option in options}
        made = partial(score.function, **of_score) if of_score else name
        return TwoAxisImportance(stats, made, **{"normalizer": score.normalizer, **options})

    taken = (*own, *(option for option in option_names(TwoAxisImportance) if option != "score"))
    return ImportanceEntry("stats", f"{score.summary} ({score.axis} axis)", build, score.axis, taken)


def _hybrid(
    stats: CalibrationStatistics,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_images: int | None = 5000,
    progress: bool = True,
    allocation: str = "taylor",
    ranking: str = "capture",
) -> HybridImportance:
    given: dict[str, Any] = {"stats": stats, "model": model, "loader": loader, "max_images": max_images}
    return HybridImportance(*(make_importance(name, progress=progress, **given) for name in (allocation, ranking)))


IMPORTANCES: dict[str, ImportanceEntry] = {
    **{name: _ours(name) for name in SCORES},
    "cap-qgw": ImportanceEntry(
        "gradient-stats",
        "capture's quantiles in clusters, weighted by gradients",
        CapQGWImportance,
        "local",
        option_names(CapQGWImportance),
    ),
    "anticipating": ImportanceEntry(
        ("consumer-stats", "images"),
        "what the logits lose for a channel's MACs once its readers are mended",
        AnticipatingImportance,
        "local",
        option_names(AnticipatingImportance),
    ),
    "hybrid": ImportanceEntry(
        ("stats", "labels"), "Taylor's allocation, capture's ranking", _hybrid, "both", ("allocation", "ranking")
    ),
    **BASELINES,
}


def find_importance(name: str) -> ImportanceEntry:
    """Look a criterion up without building it.

    Args:
        name: one of :data:`IMPORTANCES`, perhaps with options: ``hull(strength=1.0)``, ``capture(normalizer='max')``;
            see :func:`~tp_twoaxis.importance.spec.parse_spec`.

    Raises:
        TwoAxisError: no such criterion, or no such option; the message lists all names and those near it.

    Example:
        >>> find_importance("taylor").needs
        'labels'
        >>> find_importance("hull(strength=1.0)").axis
        'local'
    """
    plain, options = parse_spec(name)
    if plain not in IMPORTANCES:
        near = difflib.get_close_matches(plain, IMPORTANCES, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; choose one of them"
        raise TwoAxisError(f"score: expected one of {', '.join(IMPORTANCES)}, got {plain!r}{hint}")
    return IMPORTANCES[plain].configured(name, options)


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
        name: one of :data:`IMPORTANCES`, perhaps with options in parentheses, see :func:`find_importance`.
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
    return build_importance(
        name, entry, stats=stats, model=model, loader=loader, seed=seed, max_images=max_images, progress=progress
    )


def build_importance(
    name: str,
    entry: ImportanceEntry,
    *,
    stats: CalibrationStatistics | None = None,
    model: nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    seed: int = 0,
    max_images: int | None = 5000,
    progress: bool = True,
) -> Importance:
    """Build a criterion that :func:`make_importance` need not know by name, and gather first what it needs.

    Args:
        name: for messages.
        entry: the criterion.
        stats: see :func:`make_importance`.
        model: likewise.
        loader: likewise.
        seed: likewise.
        max_images: read at most this many; None reads the loader to its end.
        progress: show progress bars on stderr.

    Raises:
        TwoAxisError: what the criterion needs is not given.

    Example:
        >>> import torch_pruning as tp
        >>> entry = ImportanceEntry("none", "an entry point's", tp.importance.MagnitudeImportance)
        >>> type(build_importance("mine", entry)).__name__
        'MagnitudeImportance'
    """
    given: list[Any] = []
    options: dict[str, Any] = {"seed": seed} if entry.seeded else {}
    if requires(entry.needs, "stats"):
        given.append(_statistics(name, entry, stats, model, loader, max_images, progress))
    if requires(entry.needs, "labels") or requires(entry.needs, "images"):
        what = "model=... and loader=..." + (" with labels" if requires(entry.needs, "labels") else "")
        given += _required(name, model, loader, what)
        options |= {"max_images": max_images, "progress": progress}
    return entry.build(*given, **options)


def _statistics(
    name: str,
    entry: ImportanceEntry,
    stats: CalibrationStatistics | None,
    model: nn.Module | None,
    loader: Iterable[Any] | None,
    max_images: int | None,
    progress: bool,
) -> CalibrationStatistics:
    """Give the statistics that a criterion needs: those at hand, or new ones."""
    gradients, consumers = requires(entry.needs, "gradient-stats"), requires(entry.needs, "consumer-stats")
    asked = ", gradients=True" * gradients + ", consumers=True" * consumers
    if stats is None:
        labels = " with labels" if gradients else ""
        what = f"stats=calibrate(model, loader{asked}), or model=... and loader=...{labels}"
        network, images = _required(name, model, loader, what)
        return calibrate(
            network, images, max_images=max_images, gradients=gradients, consumers=consumers, progress=progress
        )
    lacking = ["gradients"] * (gradients and not stats.has_gradients) + ["consumers"] * (
        consumers and not stats.consumers
    )
    if lacking:
        raise TwoAxisError(
            f"importance {name!r}: expected statistics with {' and '.join(lacking)}, got some without; gather them "
            f"with calibrate(model, loader{asked})"
            + (" or tp-twoaxis calibrate --gradients, which need labels" if gradients else "")
        )
    return stats


def _required(
    name: str, model: nn.Module | None, loader: Iterable[Any] | None, what: str
) -> tuple[nn.Module, Iterable[Any]]:
    if model is None or loader is None:
        raise TwoAxisError(f"importance {name!r}: expected {what}, got neither or only one; pass them")
    return model, loader
