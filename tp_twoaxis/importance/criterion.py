"""What a criterion is, how its expression is read, and how functions and objects become one."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from torch import nn

from tp_twoaxis.errors import TwoAxisError, check_name
from tp_twoaxis.importance.pruning_state import EXTRAS, MissingInputError, Need, PruningState
from tp_twoaxis.scores.named_scores import Score
from tp_twoaxis.statistics.store import CalibrationStatistics

Importance = Callable[[Any], Any]
"""A Torch-Pruning importance: group -> [root channels] scores, larger keeps, or None to leave the group whole."""
Axis = Literal["local", "target", "mixed", "both", "baseline"]

# what is passed when a criterion is built, and is no option of it
_GIVEN = {"self", "cls", "stats", "statistics", "layer", "model", "loader", "max_images", "progress", "seed"}


@dataclass(frozen=True, eq=False)
class Criterion:
    """A way to rank channels, by name or given as an object; :meth:`build` makes the importance.

    Attributes:
        name: the expression that finds it, ``"hull(strength=1.0)"``, or what describes an object.
        summary: what it is, in one line.
        factory: state, and options by keyword -> importance.
        needs: what it looks at: any of :data:`Need`; none for weights alone.
        axis: ``local``, ``target``; ``mixed`` where local statistics come with weights or with what the network makes
            of a layer; ``both``; ``baseline`` for criteria of others.
        options: keywords that ``factory`` takes.
        score: statistics of a layer -> [C], for criteria that score single layers; takes some of the options.
        draws: whether it draws random numbers.
        enough_images: so many suffice for its statistics; None: it takes all that it may.
        bound: options that are set.

    Example:
        >>> criterion = Criterion("norm", "a norm", lambda state, p=2: lambda group: p, options=("p",))
        >>> criterion.configured({"p": 1}).build(PruningState())(None)
        1
    """

    name: str
    summary: str
    factory: Callable[..., Importance]
    needs: tuple[Need, ...] = ()
    axis: Axis = "baseline"
    options: tuple[str, ...] = ()
    score: Score | None = None
    draws: bool = False
    enough_images: int | None = None
    bound: Mapping[str, Any] = field(default_factory=dict)

    @property
    def extras(self) -> tuple[Need, ...]:
        """What it needs of statistics besides the usual; see :meth:`PruningState.statistics`."""
        return tuple(need for need in self.needs if need in EXTRAS)

    @property
    def reads_task(self) -> bool:
        """Whether it may look at the task variables of statistics, so that the model has to be a classifier."""
        return self.axis != "local"

    @property
    def reads_images(self) -> bool:
        """Whether it looks at the model's activations or gradients itself, beside the statistics."""
        return "images" in self.needs or "labels" in self.needs

    def configured(self, options: Mapping[str, Any], name: str | None = None) -> Criterion:
        """Return the criterion with options set.

        Args:
            options: keyword -> value.
            name: of the new criterion; default this one's.

        Raises:
            TwoAxisError: it has no such option; the message lists those that it has.
        """
        for option in options:
            check_name(f"criterion {self.name!r}: option", option, self.options)
        needs = self.needs
        if options.get("site") == "consumer" and "consumers" not in needs:
            needs = (*needs, "consumers")
        score = self.score
        if score is not None and (own := {k: v for k, v in options.items() if k in option_names(score)}):
            score = partial(score, **own)
        return replace(self, name=name or self.name, needs=needs, score=score, bound={**self.bound, **options})

    def seeded(self, seed: int) -> Criterion:
        """Return the criterion with a seed of its own, if it draws random numbers and has none yet."""
        return self.configured({"seed": seed}) if self.draws and "seed" not in self.bound else self

    def statistics(self, state: PruningState, *, also: Iterable[Need] = ()) -> CalibrationStatistics:
        """Gather the statistics that it needs; see :meth:`PruningState.statistics`.

        Raises:
            TwoAxisError: there are none, or those that there are hold less.
        """
        try:
            return state.statistics(*self.extras, also=also, target=self.reads_task, enough=self.enough_images)
        except MissingInputError as error:
            raise TwoAxisError(f"criterion {self.name!r}: {error}") from None

    def build(self, state: PruningState) -> Importance:
        """Build the importance for the network as it is, to be handed to Torch-Pruning; anew for every step.

        Args:
            state: the network, and what there is to look at it with.

        Raises:
            TwoAxisError: something that the criterion needs is not there; or what gathering it raises.
        """
        try:
            return self.factory(state, **self.bound)
        except MissingInputError as error:
            raise TwoAxisError(f"criterion {self.name!r}: {error}") from None


def parse_expression(expression: str) -> tuple[str, dict[str, Any]]:
    """Split a criterion expression, ``composite-local(b=0.3, normalizer="gaussian")``, into name and options.

    Args:
        expression: a name, or a name with keyword arguments in parentheses; values are Python literals (numbers,
            strings, None, tuples of them). Nothing is evaluated.

    Returns:
        The name, and the options by keyword.

    Raises:
        TwoAxisError: the parentheses do not hold keyword arguments with literal values.

    Example:
        >>> parse_expression("hull"), parse_expression("hull(strength=1.0, normalizer='max')")
        (('hull', {}), ('hull', {'strength': 1.0, 'normalizer': 'max'}))
    """
    name, bracket, rest = expression.partition("(")
    if not bracket:
        return expression.strip(), {}
    try:
        # a stand-in for the name, which may hold hyphens and colons
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
        if len(options) < len(call.keywords):
            raise ValueError
    except (ValueError, SyntaxError) as error:
        raise TwoAxisError(
            f"criterion {expression!r}: expected a name, or options like name(b=0.3, normalizer='mean'), "
            "could not read it"
        ) from error
    return name.strip(), options


def option_names(*callables: Callable[..., Any]) -> tuple[str, ...]:
    """List the keywords of functions or classes that are options, base classes included.

    Example:
        >>> option_names(lambda stats, *, normalizer="mean", seed=0: None)
        ('normalizer',)
    """
    names: dict[str, None] = {}
    for made in callables:
        bases: Iterable[Callable[..., Any]] = [made]
        if isinstance(made, type):
            bases = [vars(base)["__init__"] for base in made.__mro__ if "__init__" in vars(base) and base is not object]
        for parameter in (p for base in bases for p in inspect.signature(base).parameters.values()):
            variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if not variadic and parameter.name not in _GIVEN:
                names[parameter.name] = None
    return tuple(names)


def criterion_from_factory(name: str, made: Any, options: Mapping[str, Any] | None = None) -> Criterion:
    """Turn anybody's function that makes an importance into a criterion.

    Args:
        name: of the criterion.
        made: a function or class. It is called with those of the keywords ``stats``, ``model``, ``loader`` and
            ``seed`` that it has (a function of ``**keywords`` alone has all), and with the statistics in the place of a
            first parameter of another name without default. Statistics are gathered only for those that take them.
        options: further keywords.

    Raises:
        TwoAxisError: it cannot be called, or has no such option; when built, what it returned cannot be called.

    Example:
        >>> criterion_from_factory("mine", lambda seed: lambda group: seed).build(PruningState(seed=3))(None)
        3
    """
    if not callable(made):
        raise TwoAxisError(f"criterion {name!r}: expected a function that makes an importance, got {made!r}")
    signature, bound = inspect.signature(made), dict(options or {})
    variadic = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    parameters = [p for p in signature.parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if not variadic:
        for option in bound:
            check_name(
                f"criterion {name!r}: option",
                option,
                [p.name for p in parameters if p.name not in ("stats", "model", "loader")],
            )
    takes = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY} & {"stats", "model", "loader", "seed"}
    takes -= bound.keys()
    first = next((p for p in parameters if p.default is p.empty and p.name not in bound), None)
    positional = first is not None and first.name not in takes
    if variadic and not parameters:
        takes = {"stats", "model", "loader", "seed"} - bound.keys()

    def factory(state: PruningState, **keywords: Any) -> Importance:
        given: dict[str, Any] = {name: getattr(state, name) for name in ("model", "loader", "seed") if name in takes}
        if "stats" in takes:
            given["stats"] = state.statistics()
        arguments = [state.statistics()] if positional else []
        try:
            signature.bind(*arguments, **given, **keywords)
        except TypeError as error:
            raise TwoAxisError(
                f"criterion {name!r}: expected a function of some of stats, model, loader and seed, got one with "
                f"another signature ({error}); give its other parameters defaults"
            ) from error
        importance: Importance = made(*arguments, **given, **keywords)
        if not callable(importance) or isinstance(importance, nn.Module):
            raise TwoAxisError(
                f"criterion {name!r}: expected an importance, group -> scores, got {type(importance).__name__}; "
                "return it from the factory"
            )
        return importance.with_removed(state) if hasattr(importance, "with_removed") else importance

    needs: tuple[Need, ...] = ("statistics",) if positional or "stats" in takes else ()
    return Criterion(name, f"made by {name}", factory, needs, options=tuple(bound), bound=bound)


def criterion_from_importance(importance: Importance) -> Criterion:
    """Turn an importance that was built already into a criterion.

    For the network that it was built for it stays as it is, unless it has an attribute ``is_ready`` that is false. For
    a later state of the network, one with a method ``build(state)``, such as ours, is replaced by what that returns,
    with new statistics; any other is called again as it is, as Torch-Pruning's pruners do.

    Raises:
        TwoAxisError: it cannot be called.

    Example:
        >>> criterion = criterion_from_importance(lambda group: 1.0)
        >>> criterion.build(PruningState())(None)
        1.0
    """
    if isinstance(importance, type):
        raise TwoAxisError(f"importance: expected an object, got the class {importance.__name__}; make one of it")
    if not callable(importance) or isinstance(importance, nn.Module):
        raise TwoAxisError(
            "importance: expected a Torch-Pruning importance or a criterion's name, got "
            f"{type(importance).__name__}; such as 'hull', or LocalImportance(stats)"
        )
    build: Callable[[PruningState], Importance] | None = getattr(importance, "build", None)

    def factory(state: PruningState) -> Importance:
        stays = state.is_dense and getattr(importance, "is_ready", True)
        return importance if stays or build is None else build(state)

    described = repr(importance)
    if build is None or " at 0x" in described:  # no words of its own
        described = type(importance).__name__
    return Criterion(described, "an importance that was given", factory)
