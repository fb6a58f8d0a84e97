"""One way to a criterion: every command and function that takes an expression finds it here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tp_twoaxis.errors import TwoAxisError, reason
from tp_twoaxis.importance.criterion import (
    Criterion,
    Importance,
    criterion_from_factory,
    criterion_from_importance,
    option_names,
    parse_expression,
)
from tp_twoaxis.importance.pruning_state import PruningState
from tp_twoaxis.known_names import ALIASES, FAMILIES, check_criterion, criterion_names, plugins
from tp_twoaxis.runtime.factories import load_attribute
from tp_twoaxis.scores.named_scores import Score
from tp_twoaxis.statistics.store import CalibrationStatistics

CRITERIA: dict[str, Criterion] = {}
"""Every criterion of the package by name; filled by :mod:`tp_twoaxis.importance.criteria`."""


def find_criterion(expression: str) -> Criterion:
    """Look a criterion up.

    Args:
        expression: a name in :data:`CRITERIA`; ``local`` or ``target``, the default score of an axis; the name of an
            entry point of the group ``tp_twoaxis.importances``; or ``module:factory``. Options are written as in a
            call: ``hull(strength=1.0)``. An entry point is a :class:`~tp_twoaxis.importance.criterion.Criterion` or a
            factory; for factories see :func:`~tp_twoaxis.importance.criterion.criterion_from_factory`. The package's
            own names cannot be replaced.

    Raises:
        TwoAxisError: there is no such criterion or option; the message lists the valid names and those near it.

    Example:
        >>> find_criterion("taylor").needs, find_criterion("hull(strength=1.0)").axis
        (('labels',), 'local')
        >>> find_criterion("local(normalizer='max')").name
        "capture(normalizer='max')"
        >>> find_criterion("torch_pruning.pruner.importance:RandomImportance").needs
        ()
    """
    if not isinstance(expression, str):
        raise TwoAxisError(f"criterion: expected a name, got {type(expression).__name__}; names are strings")
    name, options = parse_expression(expression)
    canonical = ALIASES.get(name, name)
    expression = canonical + expression.strip()[len(name) :]
    if canonical in CRITERIA:
        return CRITERIA[canonical].configured(options, expression)
    point = plugins().get(canonical)
    if point is not None:
        try:
            made = point.load()
        except Exception as error:  # another package's import may raise anything
            raise TwoAxisError(
                f"criterion {expression!r}: its entry point {point.value} does not load "
                f"({reason(error)}); repair or uninstall that package"
            ) from error
    elif ":" in canonical:
        names = ", ".join(criterion_names())
        made = load_attribute(canonical, "criterion", otherwise=f"names without a colon are {names}")
    else:
        check_criterion(name)
    if isinstance(made, Criterion):
        return made.configured(options, expression)
    return criterion_from_factory(expression, made, options)


def as_criterion(importance: str | Criterion | Importance) -> Criterion:
    """Take what users give to rank channels by: an expression, a criterion, or an importance.

    Raises:
        TwoAxisError: it is none of these.

    Example:
        >>> as_criterion("local").name, as_criterion(lambda group: 1.0).name
        ('capture', 'function')
    """
    if isinstance(importance, str):
        return find_criterion(importance)
    return importance if isinstance(importance, Criterion) else criterion_from_importance(importance)


def expand_criteria(expressions: Iterable[str]) -> list[str]:
    """Replace families by their members, and check every name.

    Args:
        expressions: as of :func:`find_criterion`, or names in :data:`FAMILIES`.

    Returns:
        Canonical expressions, each once, in the order given.

    Raises:
        TwoAxisError: an unknown name.

    Example:
        >>> expand_criteria(["local", "all-target", "task-mi"])[:3]
        ['capture', 'task-mi', 'target-redundancy']
    """
    found: dict[str, None] = {}
    for expression in expressions:
        if expression in FAMILIES:
            found |= dict.fromkeys(_family(expression))
        else:
            found[find_criterion(expression).name] = None
    return list(found)


def _family(name: str) -> list[str]:
    if name == "all":
        return criterion_names()
    # criteria that look at more than the layer itself belong to no axis' family of scores
    return [
        key for key, c in CRITERIA.items() if c.axis in FAMILIES[name] and (c.axis == "baseline" or c.score is not None)
    ]


def layer_score(expression: str) -> Score:
    """Look up a criterion that scores the channels of a single layer from its statistics.

    Raises:
        TwoAxisError: there is no such criterion, or it or its options have to do with groups.

    Example:
        >>> layer_score("capture").__name__
        'capture'
    """
    criterion = find_criterion(expression)
    if criterion.score is None:
        scores = [name for name, entry in CRITERIA.items() if entry.score is not None]
        raise TwoAxisError(
            f"score: expected one that a layer's statistics are enough for ({', '.join(scores)}), got {expression!r}, "
            "which ranks whole groups; choose one of these"
        )
    if of_groups := [option for option in criterion.bound if option not in option_names(criterion.score)]:
        raise TwoAxisError(
            f"score: expected options of a layer's score, got {', '.join(of_groups)} in {expression!r}, which act on "
            "groups; leave them out"
        )
    return criterion.score


def make_importance(
    expression: str,
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
        expression: see :func:`find_criterion`.
        stats: calibration statistics, for criteria that need them; without, they are gathered here from
            ``model`` and ``loader``.
        model: the model to prune.
        loader: yields ``(images, labels)``; labels are not used by criteria that need ``"images"``.
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
        TwoAxisImportance(score='capture', normalizer='median')
    """
    state = PruningState(model, loader, stats, max_images=max_images, seed=seed, progress=progress)
    return find_criterion(expression).build(state)
