"""Drawings of cells: what is drawn where, and what is missing."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from tp_twoaxis.diagnostics.cell_figures import against_depth, matrix, panels, strips


def test_dots_lie_at_their_depths_and_lines_at_means():
    _, (axes,) = panels(1, 2.0)
    cells = pd.DataFrame({"depth": [0.0, 0.5, 1.0], "rho": [0.1, math.nan, 0.3], "empty": math.nan})
    against_depth(axes, cells, {"rho": "correlation", "empty": "nothing"})
    dots, mean = axes.lines[:2]
    assert dots.get_xdata().tolist() == [0.0, 0.5, 1.0]
    assert mean.get_ydata() == pytest.approx([0.2, 0.2])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["correlation (mean 0.20)", "nothing"]


def test_strips_leave_out_what_is_missing():
    figure, (axes,) = panels(1, 2.0)
    strips(axes, {"some": [0.1, math.nan, 0.3], "none": [math.nan], "negative": [-0.001]}, label="share")
    figure.draw_without_rendering()
    assert sorted(axes.lines[0].get_xdata()) == [0.1, 0.3]
    assert [text.get_text() for text in axes.texts] == ["0.20", "", "0.00"]
    assert axes.yaxis_inverted()  # the first row above


def test_a_matrix_has_its_numbers():
    figure, (axes,) = panels(1, 3.0)
    matrix(axes, [[1.0, math.nan], [math.nan, 1.0]], ["margin", "loss"])
    figure.draw_without_rendering()
    assert [text.get_text() for text in axes.texts] == ["1.00", "", "", "1.00"]
