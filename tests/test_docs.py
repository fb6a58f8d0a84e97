"""The documentation: its code runs on a small network, its commands can be parsed, its reference is complete."""

from __future__ import annotations

import copy
import json
import re
import runpy
import shlex
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import torch_pruning
from cases import batches, conv_net

from tp_twoaxis import LocalImportance, calibrate
from tp_twoaxis.cli.commands import COMMANDS, load_command
from tp_twoaxis.demo.network import one_thread
from tp_twoaxis.training.evaluation import accuracy

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if "```" in path.read_text())]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
COMMANDS_PAGE = runpy.run_path(str(ROOT / "scripts" / "docs_commands.py"))


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_in_its_order(page, tmp_path, monkeypatch):
    """``model``, ``dense``, ``build``, ``loader`` and ``x`` are the reader's; published weights are not downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.models.resnet50", lambda weights=None: conv_net())
    loader = batches(64)
    names = {"build": conv_net, "model": conv_net(), "dense": conv_net(), "loader": loader, "x": loader[0][0][:1]}
    names |= {
        "tp": torch_pruning,
        "example_inputs": names["x"],
        "calibrate": calibrate,
        "LocalImportance": LocalImportance,
    }
    state = copy.deepcopy(names["model"].state_dict())
    for code in blocks(page, "python"):
        if "prune_to_flops(" in code or "BasePruner(" in code:  # each starts from a network of its own
            names["model"] = conv_net()
            names["model"].load_state_dict(state)
        exec(compile(code, str(page), "exec"), names)


def code_cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_tutorial_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    """Magic commands are a notebook's own; all other lines are executed, and what the text says is so."""
    monkeypatch.chdir(tmp_path)
    names = {}
    with one_thread(), plt.rc_context({"backend": "Agg"}):
        for cell in code_cells():
            code = "".join(line for line in cell["source"] if not line.startswith("%"))
            exec(compile(code, cell["id"], "exec"), names)
        plt.close("all")
        dense, bare, repaired, small = (
            accuracy(names[name], names["test"], progress=False)[0] for name in ("model", "pruned", "repaired", "small")
        )
    assert bare < 0.5 < 0.9 < min(dense, repaired, small)
    assert (names["report"].importance, names["report"].repair) == ("anticipating", ["joint"])
    assert torch.equal(names["loaded"](names["x"]), names["small"](names["x"]))


def test_the_tutorial_is_ten_cells_whose_outputs_are_small_and_clean():
    cells = code_cells()
    assert len(cells) == 10
    assert all(cell["outputs"] for cell in cells)
    assert not [output for cell in cells for output in cell["outputs"] if output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 250_000


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=lambda page: page.stem)
def test_the_commands_of_a_page_can_be_parsed(page):
    for line in "".join(blocks(page, "bash")).splitlines():
        program, *arguments = shlex.split(line)
        if program == "python":
            assert (ROOT / arguments[0]).is_file()
            continue
        assert program == "tp-twoaxis"
        load_command(arguments[0]).make_context(arguments[0], arguments[1:])


def test_links_to_files_of_the_repository_lead_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"tp-twoaxis/tp-twoaxis/blob/main/([^)\s]+)", path.read_text()):
            assert (ROOT / target).is_file(), f"{path.name}: {target}"


def test_the_reference_names_every_command_and_option():
    text = COMMANDS_PAGE["command_pages"]()
    for name in COMMANDS:
        assert f"## {name}\n" in text
        for option in load_command(name).params:
            assert option.name == "help" or (option.opts[0] in text or option.name.upper() in text)


def test_docstrings_become_links_and_examples(monkeypatch):
    pytest.importorskip("griffe")
    converted = runpy.run_path(str(ROOT / "scripts" / "docs_docstrings.py"))["converted"]
    text = converted("See :func:`~a.b.c` and :class:`D`.\n\n    Example:\n        >>> 1\n")
    assert '<autoref optional identifier="a.b.c"><code>c</code></autoref>' in text
    assert "<code>D</code>" in text
    assert "    Examples:\n" in text


def test_pictures_are_those_that_the_script_draws():
    figures = runpy.run_path(str(ROOT / "scripts" / "docs_figures.py"))
    for name in ("repairs", "idea"):
        assert figures[name]().axes
        assert (ROOT / "docs" / "pictures" / f"{name}.svg").stat().st_size < 50_000


def test_there_is_code_on_the_pages():
    assert len(PAGES) >= 9
    assert torch.is_tensor(batches()[0][0])
