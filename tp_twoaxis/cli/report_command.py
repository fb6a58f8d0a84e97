"""``tp-twoaxis report``: tables and pictures of a sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tp_twoaxis.cli.options import JsonOptions, noted

if TYPE_CHECKING:
    # pandas and matplotlib: not for a help page
    from tp_twoaxis.benchmark.report import Report


def report_command(
    *,
    folder: Annotated[Path, typer.Argument(help="A folder that `bench` wrote.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Where to write; default FOLDER/report.")] = None,
    output: JsonOptions,
) -> None:
    """Write tables, curves and one HTML file of a sweep, finished or not."""
    from tp_twoaxis.benchmark.report import make_report, write_report

    report = make_report(folder)
    files = write_report(report, out)
    output.show(
        {"files": [str(file) for file in files], **report_payload(report)},
        *report_lines(report),
        f"wrote {files[0]} and {len(files) - 1} more files beside it",
    )


def report_payload(report: Report) -> dict[str, Any]:
    """Give the tables of a report as JSON-able values."""
    return {
        "summary": json.loads(report.summary.to_json(orient="records")),
        "auc": json.loads(report.auc.table.to_json(orient="records")),
        "failures": json.loads(report.failures.to_json(orient="records")),
        "notes": report.notes,
    }


def report_lines(report: Report) -> list[str]:
    """Give the tables of a report as text, then what failed and what to note."""
    # often one cause fails every trial of a method
    failures = report.failures.groupby(["network", "method", "error"], sort=False)
    failed = [
        f"failed: {network}, {method}, {len(trials)} trial{'s' if len(trials) > 1 else ''}: {error}"
        for (network, method, error), trials in failures
    ]
    return [report.markdown(), *failed, *noted(report.notes)]
