"""A method of the comparison: what ranks, who decides how many, in how many steps, what mends, what is trained."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from itertools import product
from typing import Any

from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance.entry import Importance, ImportanceEntry, Needs
from tp_twoaxis.importance.registry import IMPORTANCES, build_importance, find_importance
from tp_twoaxis.importance.spec import parse_spec
from tp_twoaxis.pruning.repair import REPAIRS
from tp_twoaxis.scores.registry import DEFAULT_SCORE

ENTRY_POINTS = "tp_twoaxis.importances"
ALIASES = {"local": DEFAULT_SCORE, "target": "task-mi"}
"""Short names of the default score of each axis."""


class UniformAllocation:
    """An importance's order inside every group, and the same share of every group removed.

    Scores become quantiles of their group, so that a global threshold cuts all groups alike: what differs
    between two methods is the ranking alone.

    Args:
        importance: any Torch-Pruning importance.

    Example:
        >>> import torch
        >>> UniformAllocation(lambda group: torch.tensor([5.0, -1.0, 2.0]))(None)
        tensor([0.8333, 0.1667, 0.5000])
    """

    def __init__(self, importance: Importance) -> None:
        self.importance = importance

    def __call__(self, group: Any) -> Any:
        """Rank a group; [C] quantiles in (0, 1), or None where the importance declines."""
        scores: Any = self.importance(group)
        if not isinstance(scores, Tensor):
            return scores
        ranks = scores.detach().cpu().argsort(stable=True).argsort()
        return (ranks + 0.5) / len(scores)


def _as_it_is(importance: Importance) -> Importance:
    return importance


ALLOCATIONS: dict[str, Callable[[Importance], Importance]] = {"global": _as_it_is, "uniform": UniformAllocation}
"""How a score decides how many channels each group loses: ``global`` by one threshold on the normalised scores."""


@dataclass(frozen=True)
class Method:
    """One column of a table.

    Attributes:
        criterion: a name in ``IMPORTANCES``, of an entry point, or ``module:factory``.
        allocation: a name in :data:`ALLOCATIONS`.
        repair: repairs in the order of :func:`~tp_twoaxis.prune_to_flops`; () leaves the cut as it is.
        finetune_batches: training batches after the repair; 0 trains nothing.
        steps: of pruning; see :func:`~tp_twoaxis.prune_to_flops`.

    Example:
        >>> Method("l2", repair=("bn",), finetune_batches=200).name
        'l2+bn+ft200'
        >>> Method("l2", repair=("bn",), steps=3).name
        'l2+bn+steps3'
    """

    criterion: str
    allocation: str = "global"
    repair: tuple[str, ...] = ("bn",)
    finetune_batches: int = 0
    steps: int = 1

    @property
    def treatment(self) -> str:
        """All but the criterion: ``"bn+ft200"``, ``"none"``, ``"uniform bn"``."""
        return ("" if self.allocation == "global" else f"{self.allocation} ") + ("+".join(self._parts) or "none")

    @property
    def name(self) -> str:
        """The criterion and the treatment in short, unique within a table."""
        return "+".join([self.criterion + ("" if self.allocation == "global" else f"/{self.allocation}"), *self._parts])

    @property
    def _parts(self) -> list[str]:
        # one step and no training have no name: methods had theirs before there was a choice
        steps = [f"steps{self.steps}"] if self.steps > 1 else []
        return [*self.repair, *steps] + ([f"ft{self.finetune_batches}"] if self.finetune_batches else [])

    def checked(self) -> Method:
        """Return the method with aliases replaced.

        Raises:
            TwoAxisError: a name is unknown or a number is out of range; the message lists the valid names.

        Example:
            >>> Method("local").checked().criterion
            'norm-local'
        """
        criterion = unaliased(self.criterion)
        find_criterion(criterion)
        _choose("allocation", self.allocation, ALLOCATIONS)
        for name in self.repair:
            _choose("repair", name, REPAIRS)
        if self.finetune_batches < 0:
            raise TwoAxisError(f"finetune_batches: expected 0 or more, got {self.finetune_batches}; 0 trains nothing")
        if self.steps < 1:
            raise TwoAxisError(f"steps: expected at least 1, got {self.steps}; 1 removes everything at once")
        return Method(criterion, self.allocation, tuple(self.repair), self.finetune_batches, self.steps)


def cross(
    criteria: Iterable[str],
    *,
    allocations: Iterable[str] = ("global",),
    repairs: Iterable[Sequence[str]] = (("bn",),),
    budgets: Iterable[int] = (0,),
    steps: Iterable[int] = (1,),
) -> tuple[Method, ...]:
    """Every criterion with every allocation, repair, fine-tuning budget and number of steps.

    Example:
        >>> [m.name for m in cross(["l1", "l2"], repairs=[(), ("bn",)])]
        ['l1', 'l1+bn', 'l2', 'l2+bn']
    """
    return tuple(
        Method(criterion, allocation, tuple(repair), budget, number).checked()
        for criterion, allocation, repair, budget, number in product(criteria, allocations, repairs, budgets, steps)
    )


@dataclass(frozen=True)
class Criterion:
    """How to build an importance inside a cell.

    Attributes:
        name: as in the table.
        needs: as of :class:`~tp_twoaxis.importance.entry.ImportanceEntry`; what labels and images tell is gathered once
            and shared.
        build: keywords ``stats``, ``model``, ``loader``, ``seed`` -> importance. ``model`` is the copy that will
            be pruned, ``loader`` yields the calibration images with labels.
    """

    name: str
    needs: Needs
    build: Callable[..., Importance]


def criterion_names() -> list[str]:
    """List the criteria that have a name: the package's, then those of installed entry points."""
    return [*IMPORTANCES, *(name for name in _plugins() if name not in IMPORTANCES)]


def find_criterion(name: str) -> Criterion:
    """Look a criterion up by name, entry point or ``module:factory``, each perhaps with options.

    A factory is called with those of the keywords ``stats``, ``model``, ``loader`` and ``seed`` that it has, and
    returns an importance; statistics are gathered only for those that ask. An entry point of the group
    ``tp_twoaxis.importances`` is such a factory or an :class:`~tp_twoaxis.importance.entry.ImportanceEntry`.
    The package's own names cannot be replaced. Options are written as in a call: ``hull(strength=1.0)``.

    Raises:
        TwoAxisError: there is no such criterion; the message lists the valid names.

    Example:
        >>> find_criterion("taylor").needs
        'labels'
        >>> find_criterion("torch_pruning.pruner.importance:RandomImportance").needs
        'none'
    """
    name = unaliased(name)
    plain, options = parse_spec(name)
    if plain in IMPORTANCES:
        return _of(name, find_importance(name), {})
    plugins = _plugins()
    if plain in plugins:
        try:
            loaded = plugins[plain].load()
        except Exception as error:  # another package's import may raise anything
            raise TwoAxisError(
                f"criterion {name!r}: its entry point {plugins[plain].value} does not load "
                f"({type(error).__name__}: {error}); repair or uninstall that package"
            ) from error
        return _of(name, loaded, options)
    if ":" in plain:
        return _of(name, _load(plain), options)
    _choose("criterion", plain, [*criterion_names(), *ALIASES], " or module:factory")
    raise AssertionError(name)


def unaliased(name: str) -> str:
    """Replace an alias, with or without options behind it.

    Example:
        >>> unaliased("local(normalizer='max')")
        "norm-local(normalizer='max')"
    """
    plain, bracket, rest = name.partition("(")
    return f"{ALIASES.get(plain, plain)}{bracket}{rest}"


def _plugins() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _of(name: str, loaded: Any, options: dict[str, Any]) -> Criterion:
    if isinstance(loaded, ImportanceEntry):
        loaded = loaded.configured(name, options)
        # the loader yields the calibration images and no others, so all of them are read
        build = partial(build_importance, name, loaded, max_images=None, progress=False)
        return Criterion(name, loaded.needs, build)
    if not callable(loaded):
        raise TwoAxisError(f"criterion {name!r}: expected a function that makes an importance, got {loaded!r}")
    factory = partial(loaded, **options) if options else loaded
    parameters = inspect.signature(loaded).parameters.values()
    takes = {p.name for p in parameters}
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and not isinstance(loaded, type):
        takes |= {"stats", "model", "loader", "seed"}
    return Criterion(
        name, "stats" if "stats" in takes else "none", partial(_call_factory, name, factory, frozenset(takes))
    )


def _call_factory(name: str, factory: Callable[..., Any], takes: frozenset[str], **given: Any) -> Importance:
    importance = factory(**{key: value for key, value in given.items() if key in takes})
    if not callable(importance):
        raise TwoAxisError(
            f"criterion {name!r}: expected an importance, group -> scores, got {type(importance).__name__}; "
            "return it from the factory"
        )
    made: Importance = importance
    return made


def _load(spec: str) -> Any:
    module_name, _, attribute = spec.partition(":")
    folder = os.getcwd()
    sys.path.insert(0, folder)  # a console script does not have the working directory on its path
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise TwoAxisError(
            f"criterion {spec!r}: importing {module_name!r} says: {error}; run from its folder or install it; names "
            f"without a colon are {', '.join(criterion_names())}"
        ) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, dir(module), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "check the spelling"
        raise TwoAxisError(f"criterion {spec!r}: {module_name} has no {attribute!r}; {hint}")
    return getattr(module, attribute)


def _choose(what: str, name: str, valid: Iterable[str], more: str = "") -> None:
    names = list(valid)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "choose one of them"
    raise TwoAxisError(f"{what}: expected one of {', '.join(names)}{more}, got {name!r}; {hint}")
