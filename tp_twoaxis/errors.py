"""The package's exceptions. Every message says what was expected, what came, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

INSTALL = 'pip install "tp-twoaxis[cli]"'
"""How the packages that the command line, plots and tables need are installed."""


class TwoAxisError(ValueError):
    """Something handed to tp-twoaxis does not fit; the message says what to do.

    Example:
        >>> from tp_twoaxis import TwoAxisError
        >>> issubclass(TwoAxisError, ValueError)
        True
    """


class StaleStatisticsError(TwoAxisError):
    """Statistics describe another state of the model: it was pruned or trained after calibration."""


class UnreachableTargetError(TwoAxisError):
    """No allowed removal reaches the target; the message gives the reachable range."""


class FileFormatError(TwoAxisError):
    """A file is corrupted, foreign, of an unknown version, or a pickle."""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """Join names for a message, at most ``limit`` of them.

    Example:
        >>> listing(["a", "b", "c"], limit=2)
        'a, b, ... (3 in all)'
    """
    items = list(names)
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown}, ... ({len(items)} in all)"


def check_name(what: str, name: str, valid: Iterable[str], *, more: str = "") -> None:
    """Refuse an unknown name, with the valid ones and those near it; the same message wherever a name is given.

    Args:
        what: what is named, for the message.
        name: what was given.
        valid: the names there are.
        more: what may be given besides, such as ``" or module:factory"``.

    Raises:
        TwoAxisError: the name is none of the valid ones.

    Example:
        >>> check_name("repair", "rigde", ["bias", "ridge"])
        Traceback (most recent call last):
        tp_twoaxis.errors.TwoAxisError: repair: expected one of bias, ridge, got 'rigde'; did you mean 'ridge'?
    """
    names = list(valid)
    if name in names:
        return
    near = difflib.get_close_matches(str(name), names, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "choose one of them"
    raise TwoAxisError(f"{what}: expected one of {', '.join(names) or 'none'}{more}, got {name!r}; {hint}")
