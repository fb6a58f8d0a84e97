"""How long runs are shown: a bar at a terminal or in a notebook, elsewhere a line every 30 seconds."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable
from typing import Any

from tqdm import TqdmWarning
from tqdm.std import tqdm as plain_bar

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # notebooks without ipywidgets show bars as text
    from tqdm.auto import tqdm as drawn_bar

INTERVAL = 30.0
"""Seconds between two lines, whichever bars they are of."""


class _LineClock:
    """When a line is due. One for all bars, since a run of many short ones shall be heard of too."""

    def __init__(self) -> None:
        self.last: float | None = None

    def due(self) -> bool:
        now = time.monotonic()
        if self.last is None:
            self.last = now
        if now - self.last < INTERVAL:
            return False
        self.last = now
        return True


_clock = _LineClock()


class LineProgress(plain_bar):  # type: ignore[misc]  # tqdm has no types
    """A tqdm bar that prints lines: what runs, how far it is, and how long it took and will take."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line where one is due; an empty message is tqdm's way to wipe a bar."""
        if msg != "" and _clock.due():
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """Say how far it is.

        Example:
            >>> LineProgress(total=10, desc="repair", unit="layer", mininterval=0).line()
            'repair: layer 0 of 10, 00:00 elapsed'
        """
        state = self.format_dict
        elapsed, rate, total = state["elapsed"], state["rate"], self.total
        if not rate and elapsed > 0:
            rate = (self.n - self.initial) / elapsed
        parts = [f"{self.desc.removesuffix(': ')}: {self.unit} {self.n}" + ("" if total is None else f" of {total}")]
        parts.append(f"{self.format_interval(elapsed)} elapsed")
        if total is not None and rate:
            parts.append(f"about {self.format_interval((total - self.n) / rate)} left")
        return ", ".join(parts + ([state["postfix"]] if state["postfix"] else []))


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    desc: str,
    unit: str,
    show: bool,
    initial: int = 0,
) -> Any:
    """Make a bar as tqdm does, which goes away at the end; without a terminal it prints lines instead.

    Args:
        items: what to go through; None where ``update`` is called.
        total: how much there is; None where it is not known.
        desc: what runs.
        unit: what is counted, in the singular.
        show: whether to print anything.
        initial: how much is done already.

    Example:
        >>> with progress_bar(total=2, desc="calibrate", unit="image", show=False) as bar:
        ...     bar.update(2)
        >>> list(progress_bar("ab", desc="read", unit="letter", show=False))
        ['a', 'b']
    """
    drawn = not show or sys.stderr.isatty() or "ipykernel" in sys.modules
    made = drawn_bar if drawn else LineProgress
    interval = {} if drawn else {"mininterval": 0.0}
    return made(items, total=total, desc=desc, unit=unit, initial=initial, disable=not show, leave=False, **interval)
