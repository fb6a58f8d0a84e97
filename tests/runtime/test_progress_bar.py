"""Lines where there is no terminal: how often, of which bar, and with what in them."""

from __future__ import annotations

import sys

import pytest
from tqdm.auto import tqdm

from tp_twoaxis.runtime import progress_bar as bars
from tp_twoaxis.runtime.progress_bar import LineProgress, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""

    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(bars, "_clock", bars._LineClock())
    monkeypatch.setattr(bars.time, "monotonic", made)
    return made


def test_a_line_every_thirty_seconds(clock, capsys):
    with progress_bar(total=100, desc="calibrate", unit="image", show=True) as bar:
        for _ in range(100):
            clock.now += 1.0
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"calibrate: image {30 * i} of 100, ") for i, line in enumerate(lines, 1))


def test_many_short_bars_share_the_clock(clock, capsys):
    for _ in range(10):
        for _ in progress_bar(range(5), desc="repair", unit="layer", show=True):
            clock.now += 2.0
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_what_a_line_says():
    bar = LineProgress(desc="training", unit="batch", mininterval=0.0)
    bar.set_postfix(loss=0.25)
    assert bar.line() == "training: batch 0, 00:00 elapsed, loss=0.25"
    bar.total, bar.n, bar.start_t = 40, 10, bar._time() - 60
    bar.set_description("epoch 2")
    assert bar.line() == "epoch 2: batch 10 of 40, 01:00 elapsed, about 03:00 left, loss=0.25"


def test_nothing_is_printed_unless_asked_for(clock, capsys):
    for _ in progress_bar(range(3), desc="repair", unit="layer", show=False):
        clock.now += 100
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(total=2, desc="calibrate", unit="image", show=True) as bar:
        assert isinstance(bar, tqdm)
        assert not isinstance(bar, LineProgress)
