"""The demo's numbers: one record a pruned network, their summary, and the table for a terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from tp_twoaxis.demo.methods import METHODS, Method

BAR = 14  # characters; with it the table fits into 80 columns
HEADER = ("method", "looks at", "kept MACs", "test accuracy", "to rank")


@dataclass(frozen=True)
class Measurement:
    """One network, pruned once.

    Attributes:
        method: the criterion's name.
        seed: of the network and its split.
        target: share of MACs asked for.
        achieved: share of MACs left, by :func:`~tp_twoaxis.pruning.macs.count_macs`.
        accuracy: on the test images, in [0, 1].
        seconds: to rank the channels, its calibration or backward pass included.
        kept: root layer of each group -> (channels kept, channels of the dense network).
        removed: layer -> output channels that left it.
    """

    method: str
    seed: int
    target: float
    achieved: float
    accuracy: float
    seconds: float
    kept: dict[str, tuple[int, int]]
    removed: dict[str, list[int]]


@dataclass(frozen=True)
class Dense:
    """One trained network before pruning: its seed, its test accuracy in [0, 1], MACs, seconds of training."""

    seed: int
    accuracy: float
    macs: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """A method at one target, over the networks.

    Attributes:
        method: the criterion's name.
        target: share of MACs asked for.
        achieved: mean share of MACs left.
        accuracy: mean test accuracy.
        standard_error: binomial, of that mean: from the number of test images alone, not from the networks.
        lowest: accuracy of the worst network.
        highest: accuracy of the best network.
        seconds: mean time to rank.
    """

    method: str
    target: float
    achieved: float
    accuracy: float
    standard_error: float
    lowest: float
    highest: float
    seconds: float


@dataclass(frozen=True)
class Group:
    """One group of coupled channels of the first network, on both axes.

    Attributes:
        name: the root layer.
        stream: whether the channels run along a residual stream, shared by several layers.
        capture: [C] local capture in nats, mean over the layers that write the channel.
        task: [C] task information in nats, likewise.
        removed: channels that the local plan removes at the main target.
    """

    name: str
    stream: bool
    capture: list[float]
    task: list[float]
    removed: list[int]


@dataclass(frozen=True)
class DemoResult:
    """What :func:`~tp_twoaxis.demo.run_demo` found and wrote.

    Attributes:
        report_path: the HTML report.
        results_path: the same numbers and their provenance as JSON.
        title: what the table is of.
        note: how to read it.
        rows: the main target's summaries.
        dense: mean test accuracy of the dense networks.
    """

    report_path: Path
    results_path: Path
    title: str
    note: str
    rows: list[Summary] = field(repr=False)
    dense: float

    @property
    def table(self) -> str:
        """The main target's results as plain text: the dense network on top, then from best to worst."""
        lines = [HEADER, *(cells for _, cells in _cells(self.rows, self.dense))]
        widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        text.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.title, "", *(line.rstrip() for line in text), "", self.note])

    @property
    def where(self) -> str:
        """Where the report lies, as a path and, on a second line, as an address for a browser."""
        path = self.report_path.resolve()
        return f"report: {path}\n        {path.as_uri()}"

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.where}"

    def to_json(self) -> str:
        """Return what ``results.json`` holds."""
        return self.results_path.read_text(encoding="utf-8")

    def show(self) -> None:
        """Print the table and where the report lies; in colour where rich is installed and the terminal can."""
        try:
            from rich import box
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            print(self)
            return
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in HEADER:
            table.add_column(name, no_wrap=True)
        styles = {"local axis": "cyan", "task axis": "yellow"}
        for method, cells in _cells(self.rows, self.dense):
            table.add_row(*cells, style="bold" if method is None else styles.get(method.kind))
        console = Console(highlight=False)
        # paths stay on one line each, so that a terminal can open them
        console.print(self.title, table, self.note, "", sep="\n")
        print(self.where)


def summarise(runs: list[Measurement], images: int) -> list[Summary]:
    """Average over networks.

    Args:
        runs: all measurements.
        images: test images of each network.

    Example:
        >>> runs = [Measurement("l2", seed, 0.5, 0.5, p, 0.1, {}, {}) for seed, p in ((0, 0.85), (1, 0.95))]
        >>> row = summarise(runs, images=400)[0]
        >>> round(row.accuracy, 3), round(row.standard_error, 4), row.lowest
        (0.9, 0.0106, 0.85)
    """
    rows = []
    for method in METHODS:
        for target in sorted({run.target for run in runs}, reverse=True):
            same = [run for run in runs if (run.method, run.target) == (method.name, target)]
            if not same:
                continue
            n, right = len(same), [run.accuracy for run in same]
            rows.append(
                Summary(
                    method.name,
                    target,
                    sum(run.achieved for run in same) / n,
                    sum(right) / n,
                    binomial_error(sum(right) / n, n * images),
                    min(right),
                    max(right),
                    sum(run.seconds for run in same) / n,
                )
            )
    return rows


def binomial_error(share: float, count: int) -> float:
    """Return the standard error of a share of ``count`` independent trials.

    Example:
        >>> binomial_error(0.9, 400)
        0.015
    """
    return math.sqrt(max(share * (1 - share), 0.0) / count)


def by_accuracy(rows: list[Summary]) -> list[Summary]:
    """Order rows from the best to the worst."""
    return sorted(rows, key=lambda row: -row.accuracy)


def method_of(name: str) -> Method:
    """Return the method of that name."""
    return next(method for method in METHODS if method.name == name)


def _cells(rows: list[Summary], dense: float) -> list[tuple[Method | None, tuple[str, ...]]]:
    lines: list[tuple[Method | None, tuple[str, ...]]] = [
        (None, ("dense", "", "100.0 %", f"{bar(dense)} {dense:6.1%}", ""))
    ]
    for row in by_accuracy(rows):
        method = method_of(row.method)
        accuracy = f"{bar(row.accuracy)} {row.accuracy:6.1%} ± {row.standard_error:.1%}"
        cells = (method.label, method.kind, f"{100 * row.achieved:.1f} %", accuracy, f"{row.seconds:.2f} s")
        lines.append((method, cells))
    return lines


def bar(share: float) -> str:
    """Draw a share of 0..1 in eighths of a character.

    Example:
        >>> bar(0.5)
        '███████       '
    """
    eighths = round(8 * BAR * min(max(share, 0.0), 1.0))
    full, part = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")).ljust(BAR)
