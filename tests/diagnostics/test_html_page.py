"""Pages hold everything they show, show text as text, and fit phones and desks."""

from __future__ import annotations

import re
import sys
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from tp_twoaxis.diagnostics.html_page import _TEMPLATES, Picture, png_bytes, render, table, themed_picture

TEMPLATES = files("tp_twoaxis.diagnostics") / "templates"
PAGES = {"explain.html", "pruning.html", "evidence.html", "evidence_runs.html", "benchmark.html", "demo.html"}


def drawn(frame: pd.DataFrame) -> str:
    """A table on a page: the macro that all pages draw tables with."""
    return _TEMPLATES.from_string('{% from "parts.html" import table %}{{ table(t) }}').render(t=table(frame, "{:.3f}"))


def test_every_page_is_made_from_one_template():
    texts = {path.name: path.read_text() for path in TEMPLATES.iterdir()}
    assert set(texts) == PAGES | {"base.html", "parts.html", "page.css"}
    for name in PAGES:
        assert texts[name].startswith('{% extends "base.html" %}')
        assert "| safe" not in texts[name]
    for text in texts.values():
        assert not re.search(r"@import|url\(|<script|https?:", text)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the standard library reads TOML since 3.11")
def test_the_templates_are_in_the_wheel():
    import tomllib

    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "diagnostics/templates/*" in settings["tool"]["setuptools"]["package-data"]["tp_twoaxis"]


def test_a_page_has_a_viewport_and_follows_light_and_dark():
    html = render("base.html", title='a <b> "größe" 層')
    assert "<title>a &lt;b&gt; &#34;größe&#34; 層</title>" in html
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "color-scheme: light dark" in html


def test_what_a_template_lacks_is_an_error():
    with pytest.raises(Exception, match="title"):
        render("base.html")


def test_tables_escape_format_and_align():
    frame = pd.DataFrame({"name": ["<i>"], "share": [0.25], "keep": [0.5], "some": [float("nan")], "mean": "1.0 ± 0.1"})
    made = table(frame, "{:.3f}", whole=["keep"])
    assert made.rows == [["<i>", "0.250", "0.5", "1.0 ± 0.1"]]  # the empty column is left out
    assert [column.text for column in made.columns] == [True, False, False, False]
    html = drawn(frame)
    assert '<td class="text">&lt;i&gt;</td><td>0.250</td>' in html
    assert '<div class="wide"><table>' in html
    assert "nothing to show" in drawn(frame[:0])


@pytest.mark.parametrize("cell", ["", "-", "12", "-0.5", "+3", "1,234", "50.0 %", "50%", "3 of 16", "0.5 [0.4, 0.6]"])
def test_numbers_stand_at_the_right(cell):
    assert not table(pd.DataFrame({"a": ["x"], "b": ["1"], "cell": [cell]})).columns[-1].text


@pytest.mark.parametrize("cell", ["1, 4, 7", "conv1", "layer1.0", "2026-01-02"])
def test_words_stand_at_the_left(cell):
    assert table(pd.DataFrame({"cell": [cell]})).columns[0].text


def test_pictures_keep_letters_legible():
    picture = Picture(png_bytes(Figure(figsize=(4.5, 2))), "a curve")
    assert picture.style == "width: 540px; max-width: 100%; min-width: 360px"  # a phone's page is 361 pixels wide
    assert picture.light.startswith("data:image/png;base64,")
    assert picture.dark is None
    themed = themed_picture(Figure, "a curve")
    assert themed.dark is not None
    assert themed.dark.startswith("data:image/png;base64,")
