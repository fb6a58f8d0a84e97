"""Pages that open offline: Jinja2's templates beside this file, with the tables and pictures that they hold."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jinja2
import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

# CSS pixels an inch of a figure: on phones the least at which its letters can be read, and on desks
PHONE, DESK = 80, 120
# of letters and grids, where the page is light and where it is dark
LIGHT, DARK = ("#222222", "#dddddd"), ("#e6e6e6", "#444444")

# what stands at the right of its column: nothing, a dash, 0.5, 50.0 %, 95.1 ± 0.3, 0.50 [0.40, 0.60], 12 of 16
NUMBER = re.compile(r"-?|[-+]?[\d.,]+ ?%?( of \d+)?( ± [\d.]+)?( [(\[].*[)\]])?")

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("tp_twoaxis.diagnostics"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Column:
    """A column's name, and whether it holds words, which start at the left and may be broken into lines."""

    name: str
    text: bool


@dataclass(frozen=True)
class Table:
    """A table as text, for the macro ``table``."""

    columns: list[Column]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A picture, for the macro ``picture``.

    Attributes:
        png: the file's bytes.
        caption: plain text below it; also for readers who do not see it.
        dark_png: drawn for dark pages; without it the picture is on white everywhere.
    """

    png: bytes
    caption: str
    dark_png: bytes | None = None

    @property
    def light(self) -> str:
        """The picture as an address that holds all of it."""
        return _address(self.png)

    @property
    def dark(self) -> str | None:
        """The same for dark pages."""
        return None if self.dark_png is None else _address(self.dark_png)

    @property
    def style(self) -> str:
        """CSS that keeps letters legible: a phone scrolls sideways over a figure that is wider than 4.5 inches.

        Example:
            >>> Picture(png_bytes(Figure(figsize=(4, 3))), "nothing").style
            'width: 480px; max-width: 100%; min-width: 320px'
        """
        image = Image.open(io.BytesIO(self.png))
        inches = image.width / image.info["dpi"][0]
        return f"width: {DESK * inches:.0f}px; max-width: 100%; min-width: {PHONE * inches:.0f}px"


def render(template: str, **content: Any) -> str:
    """Fill a template; all text of it is shown as text.

    Args:
        template: its file's name.
        content: what it names.

    Returns:
        A complete HTML document that refers to nothing outside itself but to pages it is linked with.

    Example:
        >>> render("base.html", title="a < b").splitlines()[3]
        '<title>a &lt; b</title>'
    """
    return _TEMPLATES.get_template(template).render(**content)


def table(frame: pd.DataFrame, number: str = "{:.4f}", *, whole: Iterable[str] = ()) -> Table:
    """Turn a frame into text; columns that hold nothing are left out.

    Args:
        frame: any table.
        number: format of floating-point columns; missing numbers are empty.
        whole: columns of numbers that are shown as they are.

    Example:
        >>> table(pd.DataFrame({"layer": ["a"], "share": [0.5], "note": [""]}), "{:.2f}").rows
        [['a', '0.50']]
    """
    kept = [place for place in range(frame.shape[1]) if not _is_empty(frame.iloc[:, place])]
    shown = frame.iloc[:, kept]
    formats = ["{}" if str(name) in set(whole) else number for name in shown.columns]
    rows = [
        [_text(value, form) for value, form in zip(row, formats, strict=True)]
        for row in shown.itertuples(index=False, name=None)
    ]
    columns = [
        Column(str(name), not all(NUMBER.fullmatch(cell) for cell in cells))
        for name, *cells in zip(shown.columns, *rows, strict=True)
    ]
    return Table(columns, rows)


def png_bytes(figure: Figure) -> bytes:
    """Render a figure as PNG.

    Example:
        >>> png_bytes(Figure())[1:4]
        b'PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def themed_picture(draw: Callable[[], Figure], caption: str) -> Picture:
    """Draw a figure for light and for dark pages, without a background.

    Args:
        draw: called once with matplotlib's settings for each.
        caption: of the picture.

    Example:
        >>> themed_picture(Figure, "nothing").dark[:21]
        'data:image/png;base64'
    """
    light, dark = (_themed_png(draw, *theme) for theme in (LIGHT, DARK))
    return Picture(light, caption, dark)


def _themed_png(draw: Callable[[], Figure], text: str, grid: str) -> bytes:
    parts = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    buffer = io.BytesIO()
    with mpl.rc_context({**dict.fromkeys(parts, text), "grid.color": grid, "font.size": 10, "legend.frameon": False}):
        draw().savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()


def _address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _is_empty(column: pd.Series) -> bool:
    return len(column) > 0 and bool((column.isna() | (column.astype(str) == "")).all())


def _text(value: Any, number: str) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else number.format(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None or value is pd.NA else str(value)
