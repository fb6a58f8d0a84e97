"""Pictures mark the right points, and the page says what the explanation says."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from cases import batches, conv_net

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.diagnostics.channel_table import channel_table
from tp_twoaxis.diagnostics.explain import explain, explain_statistics
from tp_twoaxis.diagnostics.explain_page import explanation_figure, explanation_html, profile_table
from tp_twoaxis.diagnostics.plots import plot_layer


@pytest.fixture(scope="module")
def net():
    return conv_net()


@pytest.fixture(scope="module")
def stats(net):
    return calibrate(net, batches(96), progress=False)


def test_profiles_are_the_channel_tables_numbers(net, stats):
    table, expected = profile_table(explain(net, "conv2", stats=stats)), channel_table(stats, layers=["conv2"])
    for name in set(table.columns) - {"peers", "layer"}:
        np.testing.assert_allclose(table[name], expected[name], rtol=1e-12, err_msg=name)


def test_one_channel_is_marked_with_its_peers(net, stats):
    result = explain(net, "conv2", batches(16), stats=stats, channels=3, progress=False)
    figure = explanation_figure(result)
    points, ring, boxes = figure.axes[0].collections
    table = profile_table(result)[["capture", "task_mi"]].to_numpy()
    assert np.array_equal(points.get_offsets(), table)
    assert np.array_equal(ring.get_offsets(), table[[3]])
    assert np.array_equal(boxes.get_offsets(), table[list(result.profiles[3].hull)])
    assert [text.get_text() for text in figure.axes[0].texts[1:]] == ["3", *map(str, result.profiles[3].hull)]
    assert [text.get_text() for text in figure.legends[0].texts] == ["channel 3", "its peers"]


def test_numbers_lie_inside_the_frame_and_apart(net, stats):
    result = explain(net, "conv1", batches(16), stats=stats, channels=list(range(16)), progress=False)
    figure = explanation_figure(result)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts[1:]]
    assert len(boxes) == 16
    for box in boxes:
        assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1
        assert axes.bbox.y0 <= box.y0 < box.y1 <= axes.bbox.y1
    assert figure.legends[0].texts[0].get_text().startswith("channels 0, 1")


def test_the_page_holds_words_pictures_and_tables(net, stats):
    result = explain(net, "conv2", batches(16), stats=stats, channels=[3, 7], progress=False)
    html = explanation_html(result)
    assert "http" not in html
    assert len(re.findall('src="data:image/png;base64,', html)) == html.count("src=") == 2
    text = unescape(html)
    for channel in (3, 7):
        for sentence in result.sentences(channel):
            assert sentence in text
    assert "<h2>Lesions</h2>" in html
    assert html.count("<tr>") > 16
    assert explanation_html(explain(net, "conv2", stats=stats)).count("src=") == 1


def test_removed_channels_take_the_place_of_the_extreme_ones(net, stats):
    overview = explain_statistics(stats, "conv2")
    assert overview == explain(net, "conv2", stats=stats)
    html = explanation_html(overview, removed=[3, 7], back="../report.html")
    assert "Removed: 2 of 16 channels" in html
    assert "Easiest" not in html
    assert html.count("href=") == html.count('href="../report.html"') == 1
    figure = plot_layer(profile_table(overview), removed=[3, 7])
    points, rings = figure.axes[0].collections
    assert np.array_equal(rings.get_offsets(), points.get_offsets()[[3, 7]])
    assert [text.get_text() for text in figure.legends[0].texts] == ["removed"]


def test_names_are_text(net, stats):
    odd = replace(explain_statistics(stats, "conv2"), layer="<script>größe.層$_$")
    html = explanation_html(odd)
    assert "<script" not in html
    assert "&lt;script&gt;größe.層$_$" in html


def test_without_a_second_axis_there_is_a_page_but_no_picture(net):
    stats = calibrate(net, batches(32), target=None, progress=False)
    result = explain(net, "conv2", batches(16), stats=stats, channels=3, progress=False)
    assert "no second axis" in explanation_html(result)
    with pytest.raises(TwoAxisError, match="no target"):
        explanation_figure(result)
