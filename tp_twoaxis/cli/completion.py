"""What a shell offers for the value of an option when the tab key is pressed; needs no PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from tp_twoaxis.known_names import ALIASES, AUTO, FAMILIES, NO_REPAIR, REPAIRS, criterion_names


def one_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Offer the names that start as what was typed.

    Example:
        >>> one_of(["margin", "none"])("ma")
        ['margin']
    """

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def several_of(names: Iterable[str], separators: str = ",") -> Callable[[str], list[str]]:
    """Offer names for the last part of a list.

    Example:
        >>> several_of(["ridge", "bn"], "+")("ridge+b")
        ['ridge+bn']
    """
    last = one_of(names)

    def complete(incomplete: str) -> list[str]:
        head, part = re.fullmatch(rf"(.*[{re.escape(separators)}])?(.*)", incomplete, re.DOTALL).groups("")  # type: ignore[union-attr]
        return [head + name for name in last(part)]

    return complete


def criterion(incomplete: str) -> list[str]:
    """Offer criteria, those of installed entry points too.

    Example:
        >>> criterion("anti")
        ['anticipating']
    """
    return one_of([*criterion_names(), *ALIASES])(incomplete)


def criteria(incomplete: str) -> list[str]:
    """Offer criteria and families of them, for the last of several.

    Example:
        >>> criteria("l2,all-l")
        ['l2,all-local']
    """
    return several_of([*criterion_names(), *ALIASES, *FAMILIES])(incomplete)


repair = several_of((AUTO, *REPAIRS, NO_REPAIR), "+,")
"""Offer repairs, for the last of several."""
