"""Rows of text as aligned lines, and the choice among them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from tp_twoaxis.errors import TwoAxisError

Row = Sequence[str]


def text_table(heads: Row, rows: Sequence[Row]) -> list[str]:
    """Align columns, the last of which may be long.

    Example:
        >>> text_table(("name", "what"), [("bn", "norms"), ("ridge", "weights")])
        ['name   what', 'bn     norms', 'ridge  weights']
    """
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (heads, *rows))
    return ["  ".join(cells).rstrip() for cells in padded]


def matching(rows: Sequence[Row], text: str | None) -> list[int]:
    """Find the rows that contain a text, whatever the case; all without one.

    Raises:
        TwoAxisError: none does.

    Example:
        >>> matching([("bn",), ("ridge",)], "ID")
        [1]
    """
    found = [i for i, row in enumerate(rows) if text is None or any(text.lower() in cell.lower() for cell in row)]
    if not found:
        near = difflib.get_close_matches(str(text), [row[0] for row in rows], n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "leave it out for all"
        raise TwoAxisError(f"expected a text that one of {len(rows)} rows contains, got {text!r}; {hint}")
    return found
