"""From the text of an option to names and numbers; what does not fit is refused before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from tp_twoaxis.errors import TwoAxisError, check_name

if TYPE_CHECKING:
    from tp_twoaxis.statistics.recorder import Positions


def names(text: str | None) -> list[str] | None:
    """Split ``a,b`` at commas outside parentheses; None stays None.

    Example:
        >>> names("conv1, layer1.0.conv1"), names("l2,hull(strength=1.0, peers=4)")
        (['conv1', 'layer1.0.conv1'], ['l2', 'hull(strength=1.0, peers=4)'])
    """
    if text is None:
        return None
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def numbers(option: str, text: str | None, kind: type[float] | type[int] = float) -> list[Any] | None:
    """Split ``0.5,0.5,0.5``; None stays None.

    Raises:
        TwoAxisError: a part is no number, or no whole one where ``kind`` is int.

    Example:
        >>> numbers("--mean", "0.5,0.25"), numbers("--seeds", "42,123", int)
        ([0.5, 0.25], [42, 123])
    """
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError as error:
        what = "whole numbers such as 42,123" if kind is int else "numbers such as 0.5,0.25"
        raise TwoAxisError(f"{option}: expected {what}, with a comma between them, got {text!r}") from error


def position_rule(text: str) -> Positions:
    """Read ``auto``, ``all`` or a number.

    Raises:
        TwoAxisError: it is none of these.

    Example:
        >>> position_rule("16")
        16
    """
    if text in ("auto", "all"):
        return cast("Positions", text)
    if not text.isdecimal() or int(text) < 1:
        check_name("--positions", text, ("auto", "all"), more=" or a positive number")
    return int(text)
