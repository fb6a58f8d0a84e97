"""The package's exceptions. Every message says what was expected, what came, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable


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
    """No allowed removal reaches the MACs target; the message gives the reachable range."""


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
