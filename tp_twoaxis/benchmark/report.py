"""The report of a results folder: tables, curves, one HTML file that opens offline, a table for a README."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from tp_twoaxis.benchmark import tables
from tp_twoaxis.benchmark.curves import curves_figure
from tp_twoaxis.benchmark.families import axis_table, selector_summary, selector_table, sign_table
from tp_twoaxis.benchmark.family_figure import family_figure
from tp_twoaxis.benchmark.results import ResultsFolder, open_folder
from tp_twoaxis.diagnostics.html_page import image_element, page, png_bytes, table_element
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.pruning.pruning_report import UNITS
from tp_twoaxis.repair import REPAIRS
from tp_twoaxis.runtime.serialization import write_bytes

REPORT = "report"


@dataclass(frozen=True)
class Report:
    """All tables of a results folder.

    Attributes:
        folder: where the results are.
        trials: a row a trial; see :func:`~tp_twoaxis.benchmark.tables.trial_table`.
        summary: means over seeds.
        auc: areas under curves.
        axes: families compared; see :func:`~tp_twoaxis.benchmark.families.axis_table`.
        signs: on how many networks a family is ahead.
        selector: the local score chosen without the seed it is judged on.
        selected: the same summed up over networks and seeds.
        wins: the win matrix.
        timing: seconds by phase.
        failures: failed trials.
        notes: what a reader must know.
        provenance: of the trial that ran last.
    """

    folder: ResultsFolder
    trials: pd.DataFrame
    summary: pd.DataFrame
    auc: tables.AucResult
    axes: pd.DataFrame
    signs: pd.DataFrame
    selector: pd.DataFrame
    selected: pd.DataFrame
    wins: pd.DataFrame
    timing: pd.DataFrame
    failures: pd.DataFrame
    notes: list[str]
    provenance: dict[str, Any]

    def markdown(self) -> str:
        """Return tables for a README: accuracy in percent, mean and sample standard deviation over seeds."""
        parts = []
        for network in self.trials.network.unique():
            own = self.summary[self.summary.network == network]
            if own.empty:
                continue
            unit = UNITS[self.folder.config.grid]
            parts.append(f"{network} (dense {100 * own.dense.mean():.1f} %), accuracy in % by share of {unit} kept\n")
            parts.append(markdown_table(wide_table(own)) + "\n")
        where = self.provenance
        machine = where.get("machine", {})
        seeds = _seeds(self.trials)
        parts.append(
            f"Seeds {seeds}; mean ± sample standard deviation over seeds; measured on the "
            f"{self.folder.config.data.evaluate_on} images. `{where.get('command')}`, commit {where.get('commit')}, "
            f"torch {where.get('versions', {}).get('torch')}, {machine.get('cores')} cores {machine.get('processor')}, "
            f"{machine.get('device')}, {where.get('date')}."
        )
        return "\n".join(parts) + "\n"


def make_report(folder: str | Path) -> Report:
    """Read a results folder, finished or not.

    Raises:
        TwoAxisError: it is no results folder, holds foreign records, or none yet.
    """
    results = open_folder(folder)
    records = results.read_all()
    if not records:
        raise TwoAxisError(f"{results.path}: expected at least one trial, got none; run `tp-twoaxis bench` first")
    trials = tables.trial_table(records)
    auc = tables.auc_table(trials)
    absent = len(results.config.trials()) - len(records)
    failures = tables.failure_table(trials)
    notes = [f"{absent} of {len(records) + absent} trials were not run yet"] if absent else []
    notes += [f"{len(failures)} trials failed"] if len(failures) else []
    repairs = {name for repair in trials.repair for name in repair.split("+")}
    if training := sorted(name for name in repairs & set(REPAIRS) if REPAIRS[name].trains):
        notes.append(f"{', '.join(training)} trains without labels: compare it with itself, not with other repairs")
    axes, selector = axis_table(auc, trials), selector_table(auc, trials)
    latest = max((record["provenance"] for record in records), key=lambda p: str(p["date"]))
    return Report(
        results,
        trials,
        tables.summary_table(trials),
        auc,
        axes,
        sign_table(axes),
        selector,
        selector_summary(selector),
        tables.win_matrix(trials),
        tables.timing_table(trials),
        failures,
        notes + tables.warnings_of(trials) + auc.notes,
        latest,
    )


def write_report(report: Report, folder: str | Path | None = None) -> list[Path]:
    """Write CSV, Parquet, PNG, Markdown and HTML.

    Args:
        report: of :func:`make_report`.
        folder: where to; default ``report/`` in the results folder. Files of equal names are replaced.

    Returns:
        The files, ``report.html`` first.

    Raises:
        TwoAxisError: a file could not be written.
    """
    target = report.folder.path / REPORT if folder is None else Path(folder)
    try:
        target.mkdir(exist_ok=True)
    except OSError as error:
        raise TwoAxisError(f"{target}: could not be made a folder ({error}); choose another") from error
    figures = {
        network: png_bytes(curves_figure(report.summary, network)) for network in report.summary.network.unique()
    }
    families = {
        network: png_bytes(family_figure(report.auc.table, report.trials, network))
        for network in report.auc.table.network.unique()
    }
    parquet = io.BytesIO()
    report.trials.to_parquet(parquet)
    files = {"report.html": _html(report, figures, families).encode(), "report.md": report.markdown().encode()}
    files |= {"cells.parquet": parquet.getvalue()}
    frames = {
        "cells": report.trials,
        "summary": report.summary,
        "auc": report.auc.table,
        "axes": report.axes,
        "signs": report.signs,
        "selector": report.selector,
        "selected": report.selected,
        "wins": report.wins.reset_index(),
        "timing": report.timing,
    }
    files |= {f"{name}.csv": frame.to_csv(index=False).encode() for name, frame in frames.items()}
    for kind, drawn in (("curves", figures), ("families", families)):
        for network, png in drawn.items():
            safe = re.sub(r"[^\w.-]", "_", network)
            files[f"{kind}-{safe}.png"] = png
    for name, data in files.items():
        write_bytes(target / name, data)
    return [target / name for name in files]


def wide_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Turn one network's summary into a row a method and a column a share kept, as text in percent.

    Where fewer seeds were measured than elsewhere in the table, the text says how many.
    """
    most = summary.seeds.max()
    text = [
        f"{100 * mean:.1f}"
        + ("" if math.isnan(std) else f" ± {100 * std:.1f}")
        + ("" if seeds == most else f" ({seeds} of {most} seeds)")
        for mean, std, seeds in zip(summary.accuracy, summary["std"], summary.seeds, strict=True)
    ]
    wide = summary.assign(text=text).pivot_table(
        index="method", columns="keep", values="text", aggfunc="first", sort=False
    )
    wide = wide[sorted(wide.columns, reverse=True)].fillna("-").reset_index()
    wide.columns = [f"{name:g}" if isinstance(name, float) else str(name) for name in wide.columns]
    return wide


def markdown_table(frame: pd.DataFrame) -> str:
    """Write a frame of text as a Markdown table.

    Example:
        >>> print(markdown_table(pd.DataFrame({"method": ["l2"], "0.5": ["58.1"]})))
        | method | 0.5 |
        | --- | --- |
        | l2 | 58.1 |
    """
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _html(report: Report, figures: dict[str, bytes], families: dict[str, bytes]) -> str:
    config = report.folder.config
    failures = report.failures
    return page(
        "tp-twoaxis benchmark",
        [
            f"<h1>Pruning at equal {UNITS[config.grid]}</h1>",
            f"<p class='soft'>{len(report.trials)} trials, seeds {_seeds(report.trials)}; accuracy on the "
            f"{config.data.evaluate_on} images. Calibration, selection and test images do not overlap; how they are "
            "split, the config below shows.</p>",
            *(f"<p class='note'>{escape(note)}</p>" for note in report.notes),
            *_accuracy_sections(report, figures),
            *_comparison_sections(report, families),
            "<h2>Three counters</h2><p class='soft'>Mean share of MACs kept by our counter, by Torch-Pruning's and by "
            "thop's.</p>",
            _table(_counters(report.trials)),
            "<h2>Time</h2><p class='soft'>Mean seconds a trial. Statistics and gradients are gathered once for a "
            "network and seed and shared.</p>",
            _table(report.timing, "{:.2f}"),
            *(["<h2>Failed trials</h2>", f"<div class='text'>{_table(failures)}</div>"] if len(failures) else []),
            f"<h2>Provenance</h2><pre>{escape(json.dumps(report.provenance, indent=1))}</pre>",
            f"<details><summary>Config {config.digest()}</summary>"
            f"<pre>{escape(json.dumps(config.to_dict(), indent=1))}</pre></details>",
        ],
    )


def _accuracy_sections(report: Report, figures: dict[str, bytes]) -> Iterator[str]:
    """Draw each network's curves and table."""
    unit = UNITS[report.folder.config.grid]
    for network, png in figures.items():
        own = report.summary[report.summary.network == network]
        yield f"<h2>{escape(str(network))}: accuracy over MACs</h2>"
        yield image_element(png, f"accuracy over MACs of {network}")
        yield (
            f"<p class='soft'>Accuracy in %, mean ± sample standard deviation over seeds, by share of {unit} kept. "
            f"Dense: {100 * own.dense.mean():.2f} %.</p>" + _table(wide_table(own))
        )


def _comparison_sections(report: Report, families: dict[str, bytes]) -> Iterator[str]:
    """Compare methods by areas, by families, by the chosen local score and by wins."""
    yield "<h2>Area under accuracy retention</h2>"
    yield _auc_words(report.auc)
    yield _table(report.auc.table)
    for network, png in families.items():
        yield image_element(png, f"areas of {network} by family of criteria")
    yield (
        "<h2>Families</h2><p class='soft'>The best score of a family against the best of another, in points of area; "
        "“best” is by the mean over these seeds, so a family of more members has an advantage.</p>"
    )
    yield f"<div class='text'>{_table(report.axes, '{:.1f}')}</div>"
    if len(report.signs):
        yield (
            "<p class='soft'>On how many networks the difference is positive, and its mean over networks; intervals "
            "are Student's, over networks.</p>"
        )
        yield f"<div class='text'>{_table(report.signs, '{:.1f}')}</div>"
    if len(report.selector):
        yield (
            "<h2>Choosing a local score</h2><p class='soft'>For each held-out seed the local score that was best on "
            "the other seeds, against the best local score of that seed and against others, in points of area.</p>"
        )
        yield f"<div class='text'>{_table(report.selector, '{:.2f}')}</div>"
        yield "<p class='soft'>The same over all networks and held-out seeds.</p>"
        yield f"<div class='text'>{_table(report.selected, '{:.2f}')}</div>"
    yield (
        f"<h2>Wins</h2><p class='soft'>Share of trials (%) of equal network, seed and "
        f"{UNITS[report.folder.config.grid]} in which the row's method is more accurate than the column's; ties count "
        "half.</p>"
    )
    yield _table((100 * report.wins).round(0).reset_index(), "{:.0f}")


def _seeds(trials: pd.DataFrame) -> str:
    """List the seeds that have results: a suite may name more."""
    return ", ".join(map(str, sorted(trials.seed.unique())))


def _auc_words(auc: tables.AucResult) -> str:
    ends = "; ".join(f"{name}: {100 * low:.1f} to {100 * high:.1f} %" for name, (low, high) in auc.intervals.items())
    return (
        "<p class='soft'>Mean of accuracy over dense accuracy on the interval of MACs removed that all methods cover "
        f"({escape(ends) or 'there is none'}); Student's 95 % intervals over seeds, differences paired. They cover the "
        "mean of further seeds where these differ as normal numbers do, and hold for no other networks. A method with "
        "unmeasured trials has no area on their seeds and comes after those that have all.</p>"
    )


def _counters(trials: pd.DataFrame) -> pd.DataFrame:
    good = tables.measured(trials)
    shares = {name: good[name] / good[f"dense_{name}"] for name in tables.COUNTERS}
    return good.assign(**shares).groupby(["network", "keep"], sort=False)[list(shares)].mean().reset_index()


def _table(frame: pd.DataFrame, number: str = "{:.4f}") -> str:
    return table_element(frame, number, whole=["keep"])
