"""Mistakes of users: each is refused in a line that says what to do, leaves nothing behind, and is on the page."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "misuses.py"))
MISUSES = [misuse for group in SCRIPT["MISUSES"].values() for misuse in group]
PAGE = (ROOT / "docs" / "misuses.md").read_text()


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    with SCRIPT["scratch"](tmp_path_factory.mktemp("misuses")) as names:
        yield names


@pytest.fixture(scope="module")
def said():
    """What each mistake was answered, filled by the tests in their order."""
    return {}


@pytest.mark.parametrize("misuse", MISUSES, ids=lambda misuse: misuse.what.replace(" ", "-"))
def test_a_mistake_is_refused_in_a_line_and_leaves_nothing_behind(misuse, names, said):
    said[misuse] = SCRIPT["answer"](misuse.code, names)
    assert misuse.said in said[misuse]


def test_the_page_is_what_the_script_writes(said):
    """To the letter where the libraries are those of the page, whose words stand in some answers."""
    assert all(f"| {misuse.what}<br>" in PAGE for misuse in MISUSES)
    assert PAGE.count("<br>`") == len(MISUSES) == 60
    if SCRIPT["versions"]() in PAGE and len(said) == len(MISUSES):
        assert SCRIPT["page"](said) == PAGE


@pytest.mark.parametrize("code", [code for _, code in SCRIPT["TAKEN"]])
def test_what_is_no_mistake_is_taken(code, names, capsys):
    model = names["model"]
    exec(code, {**names})
    model.eval()


def test_the_checks_of_an_answer_can_fail(names, monkeypatch):
    with pytest.raises(AssertionError, match="was not refused"):
        SCRIPT["answer"]("1 + 1", names)
    with pytest.raises(AssertionError, match="files were left"):
        SCRIPT["answer"]("open('left.txt', 'w').close(); calibrate(model, [])", names)
    Path("left.txt").unlink()
    with pytest.raises(AssertionError, match="the mode changed"):
        SCRIPT["answer"]("model.train(); calibrate(model, [])", names)
    names["model"].eval()
