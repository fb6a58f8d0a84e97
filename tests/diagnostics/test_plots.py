"""Pictures hold every channel where it belongs."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from cases import batches, conv_net
from PIL import Image

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.diagnostics.channel_table import channel_table
from tp_twoaxis.diagnostics.plots import colour_range, plot_layer, plot_overview, write_plots


@pytest.fixture(scope="module")
def table():
    net = conv_net()
    with torch.no_grad():
        net.conv1.weight[3] = 0.0
    return channel_table(calibrate(net, batches(), progress=False))


def test_layer_plot_shows_every_channel(table):
    part = table[table.layer == "conv1"]
    axes, bar = plot_layer(part).axes
    varying, constant = axes.collections
    shown = part[part.variance > 0]
    assert np.array_equal(varying.get_offsets(), shown[["capture", "task_mi"]])
    assert np.array_equal(varying.get_array(), shown.hull_explanation)
    assert varying.get_clim() == colour_range(part)
    assert len(constant.get_offsets()) == 1
    assert "nats" in axes.get_xlabel()
    assert "nats" in axes.get_ylabel()
    assert "hull" in bar.get_ylabel()
    assert axes.get_title(loc="left") == "conv1"
    assert "1 constant" in axes.texts[0].get_text()


def test_marks_are_of_channels_in_the_table(table):
    part = table[table.layer == "conv1"]
    points, _, ring, boxes = plot_layer(part, marked=[5], peers=[2, 7]).axes[0].collections
    assert len(points.get_offsets()) == len(part) - 1
    assert np.array_equal(ring.get_offsets(), part[["capture", "task_mi"]].to_numpy()[[5]])
    assert np.array_equal(boxes.get_offsets(), part[["capture", "task_mi"]].to_numpy()[[2, 7]])
    with pytest.raises(TwoAxisError, match="to mark, got 99"):
        plot_layer(part, marked=[99])


def test_colours_tell_channels_apart_that_are_alike():
    table = pd.DataFrame({"variance": 1.0, "hull_explanation": [0.91, 0.93, 0.97]})
    assert colour_range(table) == (0.9, 0.98)
    for value, between in {1.0: (0.99, 1.0), 0.0: (0.0, 0.01), 0.5: (0.49, 0.51)}.items():
        assert colour_range(table.assign(hull_explanation=value)) == pytest.approx(between)
    assert colour_range(table.assign(variance=0.0)) == (0.0, 1.0)


def test_numbers_of_neighbours_do_not_overlap():
    rows = {"layer": "$odd_層", "channel": range(6), "variance": 1.0, "hull_explanation": 0.5}
    near = [0.5, 0.501, 0.502, 0.1, 0.9, 0.3]
    figure = plot_layer(pd.DataFrame({**rows, "capture": near, "task_mi": [0.2, 0.2, 0.2, 0.1, 0.0, 0.0]}))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts[1:]]
    assert len(boxes) >= 4
    for first, second in itertools.combinations(boxes, 2):
        assert not first.overlaps(second)


def test_overview_has_a_panel_a_layer(table):
    axes = plot_overview(table).axes
    assert [panel.get_title().split(" ")[0] for panel in axes[:-1]] == list(dict.fromkeys(table.layer))


def test_files_are_pictures(table, tmp_path):
    paths = write_plots(table, tmp_path / "plots")
    assert len(paths) == 1 + table.layer.nunique()
    for path in paths:
        picture = Image.open(path).convert("RGB")
        assert min(picture.size) > 300
        assert len(picture.getcolors(1 << 24)) > 20


def test_odd_names_become_safe_files(table, tmp_path):
    odd = table[table.layer == "fc"].assign(layer="../a b/c")
    assert write_plots(odd, tmp_path)[1] == tmp_path / "01_.._a_b_c.png"


@pytest.mark.parametrize("plot", [plot_layer, plot_overview])
def test_what_cannot_be_drawn_is_refused(table, plot):
    with pytest.raises(TwoAxisError, match="empty"):
        plot(table[:0])
    with pytest.raises(TwoAxisError, match="target"):
        plot(table.assign(task_mi=np.nan))


def test_a_file_is_no_folder(table, tmp_path):
    (tmp_path / "plots").write_text("")
    with pytest.raises(TwoAxisError, match="folder"):
        write_plots(table, tmp_path / "plots")


def test_a_single_channel_can_be_drawn():
    row = {"layer": "a", "channel": 0, "variance": 0.0, "capture": 0.0, "task_mi": 0.0, "hull_explanation": 0.0}
    assert plot_layer(pd.DataFrame([row])).axes
