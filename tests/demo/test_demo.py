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
from tp_twoaxis.cli.commands import load_command
from tp_twoaxis.data import digits
from tp_twoaxis.demo import DemoResult, run_demo
from tp_twoaxis.demo.demo_page import CODE
from tp_twoaxis.demo.network import DigitsResNet, one_thread, shifted
from tp_twoaxis.demo.result import NEXT, RECOMMENDED
from tp_twoaxis.demo.run import FULL, QUICK, sweep
from tp_twoaxis.demo.verdict import verdict
from tp_twoaxis.known_names import AUTO
from tp_twoaxis.pruning.recipe import choose_recipe

VOID = {"meta", "link", "br", "img", "hr", "input", "source"}


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
    # pictures are inside the page, two of them, each for light and for dark
    inside = [loads.split("data:image/png;base64,")[0] for loads in page.loads]
    assert inside == ["source srcset=", "img src="] * 2
    assert len(set(page.loads)) == 4
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|<script", text)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    # a phone's own width, light and dark as the reader has it
    assert 'name="viewport" content="width=device-width' in text
    assert "color-scheme: light dark" in text
    assert "the order means nothing" in text
    for part in (*demo.verdict, "save_pruned", "layer1.0.conv1", "made", NEXT):
        assert part in text
    assert text.index(">dense</td>") < text.index(f">{RECOMMENDED}</td>")


def test_the_recommended_method_is_what_is_done_by_default() -> None:
    loader = digits("calibration").loader(batch_size=100)
    recipe = choose_recipe(DigitsResNet(), next(iter(loader))[0][:1], AUTO, AUTO, loader=loader)
    assert f"{recipe.importance}+{'+'.join(recipe.repair)}" == RECOMMENDED


def test_every_criterion_has_the_default_repair_and_bn_alone() -> None:
    names = {trial.method.name for trial in sweep(Path("weights"), [0], FULL).trials()}
    assert names == {f"{name}+{repair}" for name in FULL.criteria for repair in ("joint", "bn")}
    assert RECOMMENDED in names
    assert {"l2+joint", "taylor+bn", "fpgm+joint"} < names


def test_results_hold_all_methods_at_their_targets(demo: DemoResult) -> None:
    result = json.loads(demo.to_json())
    methods = {method.name for method in sweep(Path("weights"), [0], QUICK).methods}
    assert {run["method"] for run in result["runs"]} == {row["method"] for row in result["summary"]} == methods
    assert len(result["runs"]) == len(methods) * len(result["settings"]["targets"])
    for run in result["runs"]:
        assert run["achieved"] == pytest.approx(run["target"], rel=0.01)
        assert 0 <= run["accuracy"] <= 1
        assert run["rank_seconds"] > 0
        assert run["repair_seconds"] > 0
    assert result["dense"][0]["accuracy"] > 0.6
    assert {"call", "command", "torch", "machine", "data"} <= set(result["provenance"])
    assert sorted(path.name for path in demo.report_path.parent.iterdir()) == ["report.html", "results.json"]


def test_removed_channels_agree_with_kept_counts(demo: DemoResult) -> None:
    result = json.loads(demo.to_json())
    plan = next(run for run in result["runs"] if (run["method"], run["target"]) == (RECOMMENDED, 0.5))
    layers: dict[str, list[dict]] = {}
    for channel in result["channels"]:
        layers.setdefault(channel["layer"], []).append(channel)
    assert set(plan["kept"]) < set(layers)
    for name, (kept, size) in plan["kept"].items():
        assert len(layers[name]) == size
        assert sum(channel["removed"] for channel in layers[name]) == size - kept


def test_table_is_plain_and_sorted_and_the_next_command_is_last(
    demo: DemoResult, capsys: pytest.CaptureFixture[str]
) -> None:
    assert max(map(len, demo.table.splitlines())) <= 80
    assert "dense" in demo.table.splitlines()[4]
    means = [sum(float(cell.split()[0]) for cell in line[1:-1]) for line in demo.lines[1:]]
    assert means == sorted(means, reverse=True)
    demo.show()
    shown = capsys.readouterr().out
    assert demo.report_path.as_uri() in shown
    for line in demo.lines:
        assert line[0] in shown
    assert shown.splitlines()[-1].strip() == NEXT


def test_the_next_command_can_be_parsed() -> None:
    program, command, *arguments = NEXT.split()
    assert program == "tp-twoaxis"
    load_command(command).make_context(command, arguments)


ACCURACIES = {"a+joint": (0.9, 0.8), "b+joint": (0.9, 0.85), "a+bn": (0.7, 0.4), "b+bn": (0.8, 0.9)}


def words_of(accuracies: dict[str, tuple[float, float]]) -> list[str]:
    summary = [
        {
            "method": method,
            "criterion": method[0],
            "repair": method[2:],
            "target": target,
            "accuracy": accuracy,
            "standard_error": 0.01,
        }
        for method, own in accuracies.items()
        for target, accuracy in zip((0.5, 0.25), own, strict=True)
    ]
    return verdict({"summary": summary, "settings": {"targets": [0.5, 0.25]}}, "a+joint")


def test_verdict_says_what_the_numbers_say() -> None:
    criteria, repairs = words_of(ACCURACIES)
    assert "level with b, the best other, at 50% of the multiply-adds (within two standard errors, 2.8)" in criteria
    assert "5.0 points behind b at 25% (beyond two standard errors, 2.8)." in criteria
    assert "joint instead of bn changes the criteria by -5.0 to +40.0 points" in repairs
    assert "matters more" not in repairs
    _, repairs = words_of(ACCURACIES | {"b+bn": (0.8, 0.5)})
    assert "joint gives the criteria 35.0 to 40.0 points more than bn" in repairs
    assert "within 5.0 points of each other, so here the repair matters more" in repairs
    criteria, repairs = words_of({"a+joint": (0.9, 0.8), "b+joint": (0.8, 0.7), "a+bn": (0.9, 0.9), "b+bn": (0.8, 0.8)})
    assert "10.0 points ahead of b, the best other, at 50%" in criteria
    assert "joint gives the criteria 10.0 to 10.0 points less than bn" in repairs


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
            for name in [name for name in entry if "seconds" in name]:
                del entry[name]
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
