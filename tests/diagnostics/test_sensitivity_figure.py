"""The figure of any number of groups, with names of any letters, and the files of a report."""

from itertools import pairwise

import pandas as pd
import pytest
from PIL import Image

from tp_twoaxis import TwoAxisError
from tp_twoaxis.diagnostics import SensitivityReport
from tp_twoaxis.diagnostics.html_page import png_bytes
from tp_twoaxis.diagnostics.sensitivity_figure import sensitivity_figure, write_sensitivity
from tp_twoaxis.importance import DistortionCurve, DistortionCurves


def report_of(count, name="stufe{}.größe.層.$x_{}$"):
    curves = [
        DistortionCurve(
            name.format(k, k), 16, (0, 8, 15), (0.0, 1e-4 * k, 1e-3 * k), (0.0, 1e-5, 2e-4), (0, 0.01, 0.02), 32
        )
        for k in range(count)
    ]
    return SensitivityReport(DistortionCurves(curves))


@pytest.mark.parametrize("count", [1, 2, 20, 24])
def test_few_groups_have_a_panel_each(count):
    figure = sensitivity_figure(report_of(count))
    assert len(figure.axes) == count
    assert figure.axes[-1].get_title(loc="left").endswith(f"\\u5c64.$x_{count - 1}$")
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert png_bytes(figure)[:4] == b"\x89PNG"  # warnings of missing letters would be errors here


def test_many_groups_have_a_row_each():
    figure = sensitivity_figure(report_of(60))
    left, right, _ = figure.axes
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert len(labels) == len(right.patches) == 60
    assert labels[59].endswith("$x_59$")
    assert labels[0].endswith("(flat)")
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in left.get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))  # none covers another


def test_a_report_becomes_files(tmp_path):
    report = report_of(3)
    paths = write_sensitivity(report, tmp_path / "out")
    assert [path.name for path in paths] == ["groups.csv", "points.csv", "curves.json", "sensitivity.png"]
    assert list(pd.read_csv(paths[0]).group) == list(report.curves)
    assert len(pd.read_csv(paths[1])) == 9
    assert DistortionCurves.load(paths[2]) == report.curves
    with Image.open(paths[3]) as picture:
        assert picture.size[0] > 400
    with pytest.raises(TwoAxisError, match="could not be made a folder"):
        write_sensitivity(report, tmp_path / "no" / "such")
