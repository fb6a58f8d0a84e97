"""What the demo gives back: where its files are, and the table for a terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from tp_twoaxis.benchmark import Method
from tp_twoaxis.demo.verdict import verdict
from tp_twoaxis.pruning.recipe import BEST_REPAIR, SELECTING
from tp_twoaxis.runtime.serialization import Json

# what prune_to_flops does where nothing is named
RECOMMENDED = Method(SELECTING, repair=(BEST_REPAIR,)).name
NEXT = "tp-twoaxis prune resnet50 --pretrained --data DIR --flops 0.5 --out pruned.safetensors"
QUICK_NOTE = "quick run: hardly trained, the order means nothing"


@dataclass(frozen=True)
class DemoResult:
    """What :func:`~tp_twoaxis.demo.run_demo` found and wrote.

    Attributes:
        report_path: the HTML report.
        results_path: the same numbers and their provenance as JSON.
        title: what the table is of.
        header: of the table's columns.
        lines: the table, as text: the dense network, then methods from the best to the worst.
        notes: how to read it.
        verdict: what it shows, in two sentences.
    """

    report_path: Path
    results_path: Path
    title: str
    header: tuple[str, ...]
    lines: list[tuple[str, ...]] = field(repr=False)
    notes: list[str]
    verdict: list[str]

    @classmethod
    def of(cls, out: Path, result: Json) -> DemoResult:
        """Take the table from what ``results.json`` holds.

        Args:
            out: the folder of both files.
            result: content of ``results.json``.
        """
        header, lines = accuracy_lines(result)
        return cls(
            out / "report.html",
            out / "results.json",
            "digits: test accuracy by share of the multiply-adds kept; not fine-tuned",
            header,
            lines,
            [error_note(result), *([QUICK_NOTE] if result["quick"] else [])],
            verdict(result, RECOMMENDED),
        )

    @property
    def table(self) -> str:
        """The results as plain text."""
        lines = [self.header, *self.lines]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        text.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.title, "", *(line.rstrip() for line in text), "", *self.notes])

    @property
    def ending(self) -> str:
        """What the table shows, where the report lies, as a path and as an address for a browser, and what to do next.

        Paths and commands stay on one line each, so that a terminal can open and copy them.
        """
        path = self.report_path.resolve()
        where = f"report: {path}\n        {path.as_uri()}"
        return "\n\n".join(["\n".join(self.verdict), where, f"Next, on your own network:\n  {NEXT}"])

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.ending}"

    def to_json(self) -> str:
        """Return what ``results.json`` holds."""
        return self.results_path.read_text(encoding="utf-8")

    def show(self) -> None:
        """Print the table and what follows it; in colour where rich is installed and the terminal can."""
        try:
            from rich import box
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            print(self)
            return
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in self.header:
            table.add_column(name, no_wrap=True)
        styles = {"dense": "bold", RECOMMENDED: "cyan"}
        for line in self.lines:
            table.add_row(*line, style=styles.get(line[0]))
        Console(highlight=False).print(self.title, table, *self.notes, "", sep="\n")
        print(self.ending)


def accuracy_lines(result: Json) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Lay the summary out as text: a line a method, a column a share kept, seconds last.

    Args:
        result: content of ``results.json``.

    Returns:
        The header, and the lines: dense networks first, then methods by their mean accuracy over the shares.
    """
    shares = [f"{share:.0%}" for share in result["settings"]["targets"]]
    methods: dict[str, list[Json]] = {}
    for row in result["summary"]:
        methods.setdefault(row["method"], []).append(row)
    order = sorted(methods, key=lambda method: -sum(row["accuracy"] for row in methods[method]))
    dense = dense_accuracy(result)
    lines = [("dense", *([f"{dense:.1%}"] + [""] * (len(shares) - 1)), "")]
    for method in order:
        rows = methods[method]
        cells = (f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}" for row in rows)
        lines.append((method, *cells, f"{rows[0]['seconds']:.1f}"))
    return ("method", *shares, "seconds"), lines


def error_note(result: Json) -> str:
    """Say what the numbers are means and errors of."""
    count, images = len(result["dense"]), result["test_images"]
    return (
        f"Accuracy in %: mean of {count} network{'s' if count > 1 else ''} ± one binomial standard error\n"
        f"of {count} x {images} test images. Seconds: to rank, prune and repair, after calibration."
    )


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
