"""Pages hold everything they show, and show text as text."""

from __future__ import annotations

import pandas as pd

from tp_twoaxis.diagnostics.html_page import image_element, page, table_element


def test_a_page_refers_to_nothing_outside():
    html = page("a <b>", ["<h1>x</h1>", image_element(b"png", 'say "hi" & <b>')])
    assert "<title>a &lt;b&gt;</title>" in html
    assert 'alt="say &quot;hi&quot; &amp; &lt;b&gt;"' in html
    assert "http" not in html
    assert html.count("src=") == html.count('src="data:') == 1


def test_tables_escape_and_format():
    frame = pd.DataFrame({"name": ["<i>"], "share": [0.25], "keep": [0.5], "missing": [float("nan")]})
    html = table_element(frame, "{:.3f}", whole=["keep"])
    assert "&lt;i&gt;" in html
    assert "<td>0.250</td>" in html
    assert "<td>0.5</td>" in html
    assert "nan" not in html.lower()
    assert "nothing" in table_element(frame[:0])
