"""Self-contained HTML pages of tables and pictures, for the benchmark's report and the explanations."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

import pandas as pd
from matplotlib.figure import Figure

CSS = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.2rem 4rem; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
.soft { opacity: .75; font-size: .9rem; max-width: 52rem; }
.note { border-left: 4px solid #c44500; padding-left: .8rem; }
.wide { overflow-x: auto; } img { max-width: 100%; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid #8884; font-size: .82rem; }
@media (max-width: 40rem) {
  body { padding: .8rem .9rem 3rem; } table { font-size: .82rem; } th, td { padding: .25rem .3rem; }
}
"""


def page(title: str, sections: Iterable[str]) -> str:
    """Put sections of HTML into a document that refers to nothing outside itself.

    Args:
        title: plain text.
        sections: HTML, one line or more each.

    Example:
        >>> page("a < b", ["<p>text</p>"]).splitlines()[-2:]
        ['<p>text</p>', '</body></html>']
    """
    viewport = "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    head = f"<meta charset='utf-8'>{viewport}<title>{escape(title)}</title><style>{CSS}</style>"
    return f"<!DOCTYPE html>\n<html lang='en'><head>{head}</head><body>\n" + "\n".join(sections) + "\n</body></html>\n"


def table_element(frame: pd.DataFrame, number: str = "{:.4f}", *, whole: Iterable[str] = ()) -> str:
    """Turn a frame into an HTML table that scrolls sideways where it is too wide.

    Args:
        frame: any table.
        number: format of floating-point columns.
        whole: columns that are shown as they are.

    Example:
        >>> "<td>0.50</td>" in table_element(pd.DataFrame({"share": [0.5]}), "{:.2f}")
        True
    """
    if frame.empty:
        return "<p class='soft'>nothing to show</p>"
    formats = {
        name: number.format for name in frame.columns if frame[name].dtype.kind == "f" and name not in set(whole)
    }
    html = frame.to_html(index=False, border=0, na_rep="", formatters=formats)
    return f"<div class='wide'>{html}</div>"


def png_bytes(figure: Figure) -> bytes:
    """Render a figure as PNG.

    Example:
        >>> png_bytes(Figure())[1:4]
        b'PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def image_element(png: bytes, description: str) -> str:
    """Make an HTML image that holds its own bytes.

    Args:
        png: the file's bytes.
        description: plain text, for readers who do not see it.

    Example:
        >>> image_element(b"x", "a curve")
        '<img alt="a curve" src="data:image/png;base64,eA==">'
    """
    return f'<img alt="{escape(description, quote=True)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
