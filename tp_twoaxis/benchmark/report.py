"""The report of a results folder: tables, curves, one HTML file that opens offline, a table for a README."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tp_twoaxis.benchmark import tables
from tp_twoaxis.benchmark.curves import curves_figure, shown_network
from tp_twoaxis.benchmark.families import axis_table, selector_summary, selector_table, sign_table
from tp_twoaxis.benchmark.family_figure import family_figure
from tp_twoaxis.benchmark.results import ResultsFolder, open_folder
from tp_twoaxis.diagnostics.html_page import Picture, Table, png_bytes, render, table
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.pruning.pruning_report import UNITS
from tp_twoaxis.repair import REPAIRS
from tp_twoaxis.runtime.serialization import write_bytes

REPORT = "report"
TRIALS = "cells.csv"
# columns whose names do not speak for themselves
WORDS = {
    "keep": "share kept",
    "treatment": "repair, training",
    "auc": "accuracy retained",
    "unmeasured": "trials without result",
    "behind_best": "behind the best",
    "first": "best of the first",
    "second": "best of the other",
    "positive": "ahead on",
    "networks": "of networks",
    "held_out": "held-out seeds",
    "behind_oracle": "over the best local",
    "over_target": "over the best target",
    "over_taylor": "over taylor",
    "over_chip": "over chip",
    "macs": "our counter",
    "host_macs": "Torch-Pruning's",
    "thop_macs": "thop's",
    "params": "parameters",
}


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
            name, dense = shown_network(network), 100 * own.dense.mean()
            parts.append(f"{name} (dense {dense:.1f} %), accuracy in % by share of {unit} kept\n")
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
    """Read a results folder, finished or not; where its trials are not there, the table of them that a report wrote.

    Raises:
        TwoAxisError: it is no results folder, holds foreign records, or none yet.
    """
    results = open_folder(folder)
    records = results.read_all()
    if records:
        trials = tables.trial_table(records)
        latest = max((record["provenance"] for record in records), key=lambda p: str(p["date"]))
    elif (results.path / TRIALS).is_file():
        trials = tables.read_trial_table(results.path / TRIALS)
        latest = tables.latest_provenance(trials)
    else:
        raise TwoAxisError(f"{results.path}: expected at least one trial, got none; run `tp-twoaxis bench` first")
    auc = tables.auc_table(trials)
    absent = len(results.config.trials()) - len(trials)
    failures = tables.failure_table(trials)
    notes = [f"{absent} of {len(trials) + absent} trials were not run yet"] if absent else []
    notes += [f"{len(failures)} trials failed"] if len(failures) else []
    repairs = {name for repair in trials.repair for name in repair.split("+")}
    if training := sorted(name for name in repairs & set(REPAIRS) if REPAIRS[name].trains):
        notes.append(f"{', '.join(training)} trains without labels: compare it with itself, not with other repairs")
    axes, selector = axis_table(auc, trials), selector_table(auc, trials)
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


def _html(report: Report, curves: dict[str, bytes], families: dict[str, bytes]) -> str:
    config = report.folder.config
    percent = [f"{name}: {100 * low:.1f} to {100 * high:.1f} %" for name, (low, high) in report.auc.intervals.items()]
    return render(
        "benchmark.html",
        title="tp-twoaxis benchmark",
        report=report,
        unit=UNITS[config.grid],
        trials=len(report.trials),
        seeds=_seeds(report.trials),
        config=config,
        networks=[_network_part(report, network, png) for network, png in curves.items()],
        intervals="; ".join(percent),
        areas=_table(
            report.auc.table.pipe(_with_intervals, "auc").pipe(_with_intervals, "behind_best", "behind"), "{:.3f}"
        ),
        families=[
            Picture(
                png,
                f"{shown_network(name)}: areas by family of criteria; intervals are cut at 0 and 110 %.",
            )
            for name, png in families.items()
        ],
        axes=_table(_with_intervals(report.axes, "points", number="{:.1f}"), "{:.1f}"),
        signs=_table(_with_intervals(report.signs, "points", number="{:.1f}"), "{:.1f}"),
        selector=_table(report.selector, "{:.2f}"),
        selected=_table(report.selected, "{:.2f}"),
        wins=_table((100 * report.wins).round(0).reset_index(), "{:.0f}"),
        counters=_table(_counters(report.trials), "{:.3f}"),
        timing=_table(report.timing, "{:.2f}"),
        failures=_table(report.failures),
        provenance=json.dumps(report.provenance, indent=1),
        settings=json.dumps(config.to_dict(), indent=1),
    )


def _network_part(report: Report, network: str, png: bytes) -> dict[str, Any]:
    """One network's curves and table."""
    own = report.summary[report.summary.network == network]
    unit = UNITS[report.folder.config.grid]
    shown = shown_network(network)
    return {
        "name": shown,
        "curves": Picture(png, f"{shown}: accuracy over MACs kept, a line a criterion, a panel a repair."),
        "dense": 100 * own.dense.mean(),
        "accuracy": table(wide_table(own).rename(columns=lambda name: _share_kept(name, unit))),
    }


def _share_kept(column: str, unit: str) -> str:
    return f"{100 * float(column):g} % of {unit}" if column != "method" else column


def _with_intervals(frame: pd.DataFrame, value: str, prefix: str = "", *, number: str = "{:.3f}") -> pd.DataFrame:
    """Write a number and the ends of its interval in one column; missing ones leave the number alone."""
    low, high = (f"{prefix}_{end}" if prefix else end for end in ("low", "high"))
    text = [
        number.format(mean) + ("" if math.isnan(a) else f" [{number.format(a)}, {number.format(b)}]")
        for mean, a, b in zip(frame[value], frame[low], frame[high], strict=True)
    ]
    return frame.assign(**{value: text}).drop(columns=[low, high])


def _seeds(trials: pd.DataFrame) -> str:
    """List the seeds that have results: a suite may name more."""
    return ", ".join(map(str, sorted(trials.seed.unique())))


def _counters(trials: pd.DataFrame) -> pd.DataFrame:
    good = tables.measured(trials)
    shares = {name: good[name] / good[f"dense_{name}"] for name in tables.COUNTERS}
    return good.assign(**shares).groupby(["network", "keep"], sort=False)[list(shares)].mean().reset_index()


def _table(frame: pd.DataFrame, number: str = "{:.4f}") -> Table:
    """Turn a table of the report into text, with words for the names of its columns."""
    named = frame.rename(columns=lambda name: WORDS.get(name, name.replace("_", " ").replace("/", ": ")))
    if "network" in named:
        named = named.assign(network=[shown_network(name) for name in named.network])
    return table(named, number, whole=[WORDS["keep"]])
