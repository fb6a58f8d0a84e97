"""What the demo gives back: where its files are, and the table for a terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from tp_twoaxis.runtime.serialization import Json

# what each criterion looks at
METHODS = {
    "capture": "local axis",
    "hull": "local axis",
    "task-mi": "task axis",
    "l2": "weights",
    "fpgm": "weights",
    "taylor": "gradients",
    "random": "chance",
}
HALF, LOCAL = 0.5, "capture"  # the main target, and the criterion whose choice is shown
STYLES = {"local axis": "cyan", "task axis": "yellow"}
BAR = 14  # characters; with it the table fits into 80 columns
HEADER = ("method", "looks at", "kept MACs", "test accuracy", "to rank")
RANKING = ("statistics", "gradients", "activations", "importance", "score")
QUICK_NOTE = "quick run: hardly trained, the order means nothing"


@dataclass(frozen=True)
class DemoResult:
    """What :func:`~tp_twoaxis.demo.run_demo` found and wrote.

    Attributes:
        report_path: the HTML report.
        results_path: the same numbers and their provenance as JSON.
        title: what the table is of.
        note: how to read it.
        rows: a summary a method at the main target, from the best to the worst.
        dense: mean test accuracy of the dense networks.
    """

    report_path: Path
    results_path: Path
    title: str
    note: str
    rows: list[Json] = field(repr=False)
    dense: float

    @classmethod
    def of(cls, out: Path, result: Json) -> DemoResult:
        """Take the table at half the MACs from what ``results.json`` holds.

        Args:
            out: the folder of both files.
            result: content of ``results.json``.
        """
        count = len(result["dense"])
        note = (
            f"mean of {count} network{'s' if count > 1 else ''}; ± one binomial standard error of {count} x "
            f"{result['test_images']} test images"
        ) + (f"\n{QUICK_NOTE}" if result["quick"] else "")
        title = f"digits, {HALF:.0%} of the MACs kept, BatchNorm re-estimated, not fine-tuned"
        rows = at_target(result["summary"], HALF)
        return cls(out / "report.html", out / "results.json", title, note, rows, dense_accuracy(result))

    @property
    def table(self) -> str:
        """The main target's results as plain text: the dense network on top, then from best to worst."""
        lines = [HEADER, *self._lines()]
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
        for line in self._lines():
            table.add_row(*line, style="bold" if line[0] == "dense" else STYLES.get(line[1]))
        # paths stay on one line each, so that a terminal can open them
        Console(highlight=False).print(self.title, table, self.note, "", sep="\n")
        print(self.where)

    def _lines(self) -> list[tuple[str, ...]]:
        dense = ("dense", "", "100.0 %", f"{bar(self.dense)} {self.dense:6.1%}", "")
        pruned = (
            (
                row["method"],
                METHODS[row["method"]],
                f"{100 * row['achieved']:.1f} %",
                f"{bar(row['accuracy'])} {row['accuracy']:6.1%} ± {row['standard_error']:.1%}",
                f"{row['seconds']:.2f} s",
            )
            for row in self.rows
        )
        return [dense, *pruned]


def at_target(summary: list[Json], target: float) -> list[Json]:
    """Choose the rows of a target, ordered from the best to the worst.

    Example:
        >>> at_target([{"target": 0.5, "accuracy": 0.8}, {"target": 0.5, "accuracy": 0.9}], 0.5)[0]["accuracy"]
        0.9
    """
    return sorted((row for row in summary if row["target"] == target), key=lambda row: -row["accuracy"])


def rank_seconds(record: Json) -> float:
    """Seconds that a trial took to rank the channels, its calibration or backward pass included.

    Example:
        >>> rank_seconds({"seconds": {"statistics": 1.0, "score": 0.5, "remove": 2.0}})
        1.5
    """
    seconds: dict[str, float] = record["seconds"]
    return sum(seconds.get(phase, 0.0) for phase in RANKING)


def dense_accuracy(result: Json) -> float:
    """Mean test accuracy of the networks before pruning."""
    accuracies: list[float] = [network["accuracy"] for network in result["dense"]]
    return sum(accuracies) / len(accuracies)


def binomial_error(share: float, count: int) -> float:
    """Return the standard error of a share of ``count`` independent attempts.

    Example:
        >>> binomial_error(0.9, 400)
        0.015
    """
    return math.sqrt(max(share * (1 - share), 0.0) / count)


def bar(share: float) -> str:
    """Draw a share of 0..1 in eighths of a character.

    Example:
        >>> bar(0.5)
        '███████       '
    """
    eighths = round(8 * BAR * min(max(share, 0.0), 1.0))
    full, part = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")).ljust(BAR)
