"""What a named criterion is: what it needs, which options it takes, and how it is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from tp_twoaxis.errors import TwoAxisError

Importance = Callable[[Any], Any]
"""A Torch-Pruning importance: group -> [root channels] scores, larger keeps, or None to leave the group whole."""
Need = Literal["stats", "gradient-stats", "consumer-stats", "labels", "images", "none"]
"""``stats``: calibration statistics; ``gradient-stats``, ``consumer-stats``: those of ``calibrate(gradients=True)``,
``calibrate(consumers=True)``; ``labels``: a model and a loader with labels, for a backward pass that may leave
gradients on the model; ``images``: a model and a loader, labels not used; ``none``: weights alone."""
Needs = Need | tuple[Need, ...]
Axis = Literal["local", "target", "both", "baseline"]

# what is handed over by whoever builds a criterion, and is no option of it
_GIVEN = {"self", "cls", "stats", "statistics", "layer", "model", "loader", "max_images", "progress", "seed"}


def requires(needs: Needs, need: Need) -> bool:
    """Tell whether a need is among several; ``"stats"`` is also met by statistics that hold more.

    Example:
        >>> requires("gradient-stats", "stats"), requires(("stats", "labels"), "gradient-stats")
        (True, False)
    """
    all_needs = (needs,) if isinstance(needs, str) else needs
    richer = need == "stats" and not {"gradient-stats", "consumer-stats"}.isdisjoint(all_needs)
    return need in all_needs or richer


@dataclass(frozen=True)
class ImportanceEntry:
    """A named criterion.

    Attributes:
        needs: one :data:`Need` or several.
        summary: what it is, in one line.
        build: makes the importance. Called with the statistics where they are needed, then with the model and the
            loader (and ``max_images=``, ``progress=``) where labels or images are; otherwise with nothing, or with
            ``seed=`` where ``seeded``.
        axis: what it looks at: ``local``, ``target``, ``both``; ``baseline`` for criteria of others.
        options: keywords that ``build`` takes besides.
        seeded: whether it draws random numbers.
    """

    needs: Needs
    summary: str
    build: Callable[..., Importance]
    axis: Axis = "baseline"
    options: tuple[str, ...] = ()
    seeded: bool = False

    def configured(self, name: str, options: dict[str, Any]) -> ImportanceEntry:
        """Return the criterion with options set.

        Raises:
            TwoAxisError: it has no such option; the message lists those that it has.

        Example:
            >>> entry = ImportanceEntry("none", "a norm", dict, options=("p",))
            >>> entry.configured("norm", {"p": 1}).build()
            {'p': 1}
        """
        unknown = [option for option in options if option not in self.options]
        if unknown:
            raise TwoAxisError(
                f"criterion {name!r}: expected options among {', '.join(self.options) or 'none'}, got {unknown[0]!r}"
            )
        needs = self.needs
        if options.get("site") == "consumer":
            needs = (*((needs,) if isinstance(needs, str) else needs), "consumer-stats")
        return replace(self, needs=needs, build=partial(self.build, **options)) if options else self


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
        for base in bases:
            for parameter in inspect.signature(base).parameters.values():
                variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
                if not variadic and parameter.name not in _GIVEN:
                    names[parameter.name] = None
    return tuple(names)
