"""The demo end to end, in its quick form: files, numbers, and the promises its report makes."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.data import digits
from tp_twoaxis.demo import DemoResult, run_demo
from tp_twoaxis.demo.demo_page import CODE
from tp_twoaxis.demo.network import DigitsResNet, one_thread, shifted
from tp_twoaxis.demo.result import METHODS, bar

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Strict(HTMLParser):
    """Checks that every element is closed, and gathers what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_attributes(tag, attributes)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_attributes(tag, attributes)

    def handle_attributes(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name.endswith("href") and (value or "").startswith("#"):
                self.references.append((value or "")[1:])
            elif name in ("src", "srcset", "data") or (name.endswith("href") and tag != "a"):
                self.loads.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        # browsers close these by themselves
        while self.open[-1] in ("tr", "td", "th", "tbody") and self.open[-1] != tag:
            self.open.pop()
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo") / "new" / "folder", quick=True, progress=False)


def test_report_opens_without_anything_else(demo: DemoResult) -> None:
    text = demo.report_path.read_text(encoding="utf-8")
    page = Strict()
    page.feed(text)
    page.close()
    assert page.open == []
    # pictures are inside the page
    assert len(page.loads) == 2
    assert all(loads.startswith("img src=data:image/png;base64,") for loads in page.loads)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|<script", text)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    # light and dark are the browser's choice
    assert "color-scheme: light dark" in text
    assert "the order means nothing" in text
    for part in ("is best with", "worst to best network", "rank_correlation", "save_pruned", "made", "layer1.0.conv1"):
        assert part in text
    assert text.index("<td>dense</td>") < min(text.index(f"<td>{method}</td>") for method in METHODS)


def test_results_hold_all_methods_at_their_targets(demo: DemoResult) -> None:
    result = json.loads(demo.to_json())
    assert {run["method"] for run in result["runs"]} == set(METHODS)
    assert len(result["runs"]) == len(METHODS) * len(result["settings"]["targets"])
    for run in result["runs"]:
        assert run["achieved"] == pytest.approx(run["target"], rel=0.01)
        assert 0 <= run["accuracy"] <= 1
        assert run["seconds"] >= 0
    assert result["dense"][0]["accuracy"] > 0.6
    assert {"call", "command", "torch", "machine", "data"} <= set(result["provenance"])
    assert sorted(path.name for path in demo.report_path.parent.iterdir()) == ["report.html", "results.json"]


def test_removed_channels_agree_with_kept_counts(demo: DemoResult) -> None:
    result = json.loads(demo.to_json())
    plan = next(run for run in result["runs"] if (run["method"], run["target"]) == ("capture", 0.5))
    layers: dict[str, list[dict]] = {}
    for channel in result["channels"]:
        layers.setdefault(channel["layer"], []).append(channel)
    assert set(plan["kept"]) < set(layers)
    prefixes = 0
    for name, (kept, size) in plan["kept"].items():
        capture = [channel["capture"] for channel in layers[name]]
        removed = {channel["channel"] for channel in layers[name] if channel["removed"]}
        assert len(capture) == size
        assert len(removed) == size - kept
        if name.endswith(".conv1") and 0 < kept < size:
            # one producer: the plan removes a prefix in capture's order, but for channels that fill the last gap
            order = sorted(range(size), key=capture.__getitem__)
            assert set(order[: size - kept]) == removed
            prefixes += 1
    assert prefixes > 0


def test_table_is_plain_and_sorted(demo: DemoResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert max(map(len, demo.table.splitlines())) <= 80
    shares = [float(match) for match in re.findall(r"([\d.]+)% ±", demo.table)]
    assert len(shares) == len(METHODS)
    assert shares == sorted(shares, reverse=True)
    assert "dense" in demo.table.splitlines()[4]
    demo.show()
    shown = capsys.readouterr().out
    assert demo.report_path.as_uri() in shown
    for method in METHODS:
        assert method in shown


def test_show_without_rich(
    demo: DemoResult, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    demo.show()
    assert capsys.readouterr().out == f"{demo}\n"


def test_equal_seeds_give_equal_numbers(demo: DemoResult, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    again = run_demo(tmp_path, quick=True, progress=False)
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads
    first, second = json.loads(demo.to_json()), json.loads(again.to_json())
    for result in (first, second):
        for entry in [*result["runs"], *result["dense"], *result["summary"]]:
            del entry["seconds"]
        del result["provenance"]
    assert first == second


def test_the_code_shown_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loader = digits("calibration").loader(batch_size=100)
    names: dict[str, object] = {"model": DigitsResNet().eval(), "loader": loader}
    exec(CODE, names)
    assert (tmp_path / "pruned.safetensors").is_file()


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TwoAxisError, match="expected a folder"):
        run_demo(tmp_path / "file", quick=True, progress=False)


def test_missing_package_is_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tp_twoaxis.demo.run.find_spec", lambda name: None if name == "sklearn" else name)
    with pytest.raises(TwoAxisError, match="needs scikit-learn"):
        run_demo(tmp_path / "out", quick=True)
    assert not (tmp_path / "out").exists()


def test_shifts_move_by_one_pixel_and_fill_with_background() -> None:
    image = torch.zeros(64, 1, 5, 5)
    image[:, :, 2, 2] = 1
    moved = shifted(image, torch.Generator().manual_seed(0))
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(64))
    places = {tuple(where[2:].tolist()) for where in moved.nonzero()}
    assert places == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}


def test_one_thread_comes_back_on_errors() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError), one_thread():
        raise RuntimeError
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("share", [0.0, 0.031, 0.5, 0.999, 1.0])
def test_bars_have_one_length(share: float) -> None:
    assert len(bar(share)) == len(bar(1.0))
    assert bar(share).rstrip() == "" or share > 0


def test_network_is_residual() -> None:
    network = DigitsResNet().eval()
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 15
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("conv2.weight"):
                parameter.zero_()
        # with every branch silenced the shortcuts still carry the image to the head
        logits = network(torch.rand(2, 1, 8, 8))
    assert not torch.allclose(logits[0], logits[1])
