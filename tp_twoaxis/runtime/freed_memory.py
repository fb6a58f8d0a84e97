"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back() -> bool:
    """Give memory that was freed back to the system, where the C library keeps it otherwise (glibc).

    The kernel counts what an allocator keeps as the process's own: after many tensors of different sizes that can be as
    much again as is in use. A call takes milliseconds, so it belongs behind steps that take seconds.

    Returns:
        Whether anything was given back; False where the C library has no such call.

    Example:
        >>> give_back() in (True, False)
        True
    """
    trim = _trim()
    return trim is not None and trim(0) == 1


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # macOS and musl have none, Windows no handle of the process
        return None
