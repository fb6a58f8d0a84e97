"""The package's exceptions. Every message says what was expected, what came, and what to do next."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from numbers import Integral, Real

INSTALL = 'pip install "tp-twoaxis[cli]"'
"""How the packages that the command line, plots and tables need are installed."""


PICKLE_SUFFIXES = (".pth", ".pt", ".pkl", ".pickle", ".ckpt")


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


def reason(error: BaseException, limit: int = 200) -> str:
    """Say what somebody else's error says: its class and its words, in one line without addresses of memory.

    Example:
        >>> reason(RuntimeError("cannot read <_io.BytesIO object at 0x7f01>"))
        'RuntimeError: cannot read BytesIO'
    """
    words = re.sub(r"<(?:\w+\.)*(\w+) object at 0x\w+>", r"\1", str(error))
    words = " ".join(words.split()).removesuffix(".")
    name = type(error).__name__
    return f"{name}: {words if len(words) <= limit else words[:limit].rstrip() + ' ...'}" if words else name


def is_number(value: object, kind: type = Real) -> bool:
    """Whether a value is a number (a whole one: ``kind=Integral``); True and False are none.

    Example:
        >>> is_number(0.5), is_number("0.5"), is_number(True), is_number(0.5, Integral)
        (True, False, False, False)
    """
    return isinstance(value, kind) and not isinstance(value, bool)


def check_count(what: str, value: object, *, least: int = 1, more: str = "") -> None:
    """Refuse what is no whole number, or one below ``least``.

    Args:
        what: what is counted, for the message.
        value: what was given.
        least: the smallest that is accepted.
        more: what may be given besides, such as ``" or None"``.

    Raises:
        TwoAxisError: it is none.

    Example:
        >>> check_count("steps", 2.5)
        Traceback (most recent call last):
        tp_twoaxis.errors.TwoAxisError: steps: expected a whole number of at least 1, got 2.5
    """
    if not (is_number(value, Integral) and value >= least):  # type: ignore[operator]
        raise TwoAxisError(f"{what}: expected a whole number of at least {least}{more}, got {value!r}")


def refuse_pickle_name(path: str | os.PathLike[str]) -> None:
    """Refuse to write a file under a name that ``torch.load`` is used on: no file of this package is a pickle.

    Raises:
        TwoAxisError: the name ends like a pickle's.

    Example:
        >>> refuse_pickle_name("net.pth")
        Traceback (most recent call last):
        tp_twoaxis.errors.TwoAxisError: net.pth: expected a name for a safetensors file, which torch.load cannot read,
        got one of a pickle; end it in .safetensors
    """
    if os.path.splitext(path)[1].lower() in PICKLE_SUFFIXES:
        raise TwoAxisError(
            f"{path}: expected a name for a safetensors file, which torch.load cannot read, got one of a pickle; "
            "end it in .safetensors"
        )


def check_name(what: str, name: str, valid: Iterable[str], *, more: str = "") -> None:
    """Refuse an unknown name, with the valid ones and those near it; the same message wherever a name is given.

    Of many valid names only the first are listed.

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
    shown = listing(names, 15) or "none"
    raise TwoAxisError(f"{what}: expected one of {shown}{more}, got {name!r}; {hint}")
