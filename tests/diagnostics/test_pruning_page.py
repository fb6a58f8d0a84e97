"""The page of a pruning: what, who, how well, at what price; for odd networks too."""

from __future__ import annotations

import re
from html import unescape

import pytest
import torch
from cases import batches, conv_net

from tp_twoaxis import PruningReport, TwoAxisError, calibrate, prune_to_flops
from tp_twoaxis.diagnostics.pruning_page import pruning_html, write_pruning_page
from tp_twoaxis.importance import DistortionCurve
from tp_twoaxis.pruning.pruning_report import GroupReport, Size
from tp_twoaxis.repair.repair_report import ConsumerRepair, RemovedChannel

ACCURACY = {"before": 0.91, "after": 0.87, "images": 1000, "split": "test"}


def report(names, *, readers=True, curves=True, **changes):
    """A report of groups with given names, of 8 channels each, of which 2 leave."""
    consumers = [
        ConsumerRepair(f"{name}.next", "joint", "", 640, 6, [RemovedChannel(1, 0.9, [(3, -0.5)]),
                       RemovedChannel(5, 0.4, [])], 0.02, 0.03, 0.05)
        for name in names
    ]  # fmt: skip
    curve = {"removed": (0, 4, 7), "distortion": (0.0, 0.1, 0.5), "standard_error": (0.0, 0.01, 0.1)}
    values = {
        "importance": "anticipating",
        "flops": 0.5,
        "achieved": 0.498,
        "before": Size(2_000_000, 1000),
        "after": Size(996_000, 400),
        "groups": [
            GroupReport(name, [f"{name} (producer)", f"{name}.next (consumer)"], [0, 2, 3, 4, 6, 7], [1, 5])
            for name in names
        ],
        "removed_channels": {name: [1, 5] for name in names},
        "repair": ["joint"] if readers else [],
        "seconds": {"plan": 0.25, "repair/joint": 1.5},
        "consumers": consumers if readers else [],
        "sensitivity": [DistortionCurve(name, 8, macs_saved=(0.0, 0.2, 0.35), images=32, **curve) for name in names]
        if curves
        else [],
        **changes,
    }
    return PruningReport(**values)


def words(html):
    return unescape(re.sub(r"<[^>]+>", " ", re.sub(r"base64,[^\"]*|<style>.*?</style>", "", html, flags=re.DOTALL)))


def test_the_page_answers_all_four_questions():
    html = pruning_html(report(["conv1"], notes=["fc keeps its outputs"]), name="net", accuracy=ACCURACY)
    text = re.sub(r"\s+", " ", words(html))
    for part in (
        "anticipating ranked the channels; joint repaired",  # how
        "49.80% of the MACs are left; 50.00% were asked for",
        "conv1 6 of 8 25%",  # what
        "10.0% 65% 0.050",  # its MACs, how well it is predicted, what is missing
        "2 inputs removed",
        "5 40.0% 1 90.0% 3 (-0.50)",  # who, the worst first
        "91.00% before, 87.00% after",  # at what price
        "2,000,000 996,000 49.8%",
        "plan 0.25",
        "fc keeps its outputs",
    ):
        assert part in text, part
    assert html.count("src=") == html.count('src="data:') == 1
    assert not re.search(r"href=|<script", html)
    assert "nan" not in text


def test_what_was_not_measured_is_said_and_leaves_no_columns():
    text = words(pruning_html(report(["conv1"], readers=False, curves=False)))
    assert "Accuracy was not measured" in text
    assert "no layer was refitted" in text
    assert "nothing repaired the layers" in text
    assert "MACs saved" not in text
    assert "predicted" not in text


def test_names_are_text():
    odd = ["größe.層", "<script>alert(1)</script>", 'a"b&c', "$x_1$"]
    html = pruning_html(report(odd), name="<b>net</b>", links={odd[0]: "pages/1_gr%C3%B6%C3%9Fe.html"})
    assert "<script" not in html
    assert "<b>net" not in html
    for name in odd:
        assert name in words(html)
    assert '<a href="pages/1_gr%C3%B6%C3%9Fe.html">größe.層</a>' in html


@pytest.mark.parametrize("count", [0, 1, 300])
def test_any_number_of_groups(count):
    names = [f"features.stage{i // 100}.block{i}.conv" for i in range(count)]
    html = pruning_html(report(names), name="net")
    assert html.count('class="bar"') == count
    assert html.count("inputs removed</summary>") == count
    assert ("What each group would have cost" in html) == (count > 0)


def test_long_lists_of_inputs_are_cut_and_it_is_said():
    removed = [RemovedChannel(k, k / 64, []) for k in range(50)]
    reader = ConsumerRepair("conv2", "ridge", "", 640, 14, removed)
    html = pruning_html(report(["conv1"], consumers=[reader]))
    assert re.sub(r"\s+", " ", html).count("The 20 that are predicted worst, of 50;") == 1


def test_a_pruning_links_to_pages_of_its_layers(tmp_path):
    net = conv_net()
    stats = calibrate(net, batches(64), progress=False)
    result = prune_to_flops(
        net, torch.randn(1, 3, 8, 8), "l2", flops=0.6, repair="ridge", loader=batches(64), progress=False
    )
    path = tmp_path / "größe.html"
    first, *pages = write_pruning_page(result, path, name="net", accuracy=ACCURACY, stats=stats)
    assert first == path
    assert [page.name for page in pages] == [f"{n}_{layer}.html" for n, layer in enumerate(result.removed_channels, 1)]
    html = path.read_text()
    for page, (layer, removed) in zip(pages, result.removed_channels.items(), strict=True):
        assert f'<a href="gr%C3%B6%C3%9Fe_layers/{page.name}">{layer}</a>' in html
        text = page.read_text()
        assert '<a href="../gr%C3%B6%C3%9Fe.html">' in text
        assert f"Removed: {len(removed)} of " in text
    assert write_pruning_page(result, tmp_path / "alone.html") == [tmp_path / "alone.html"]
    assert not (tmp_path / "alone_layers").exists()


def test_a_file_is_no_folder(tmp_path):
    net = conv_net()
    stats = calibrate(net, batches(32), progress=False)
    (tmp_path / "r_layers").write_text("")
    result = report(["conv1"], removed_channels={"conv1": [1]})
    with pytest.raises(TwoAxisError, match="folder"):
        write_pruning_page(result, tmp_path / "r.html", stats=stats)
    assert not (tmp_path / "r.html").exists()
