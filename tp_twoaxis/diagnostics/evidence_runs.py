"""Evidence of several networks together: tables below each other, claims over runs, and every run's own verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tp_twoaxis.diagnostics.evidence import Claim, Drawing
from tp_twoaxis.diagnostics.evidence_page import (
    READING,
    TITLE,
    FoldedTable,
    counted,
    described,
    markdown_row,
    provenance,
    section_title,
)
from tp_twoaxis.diagnostics.evidence_sections import SECTIONS
from tp_twoaxis.diagnostics.evidence_store import EvidenceFolder, SectionRecord, write_table
from tp_twoaxis.diagnostics.html_page import Picture, png_bytes, render
from tp_twoaxis.diagnostics.run_aggregates import FEWEST_MODELS
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.serialization import write_bytes

OVER = "over runs"
MOST_RUNS = 6
"""Columns of single runs at most; networks of several runs stand in their place where there are more."""


@dataclass(frozen=True)
class Run:
    """The evidence of one network.

    Attributes:
        label: the network, with the seed where runs are of several trainings of it.
        network: the backbone, with the data where runs are of several.
        seed: of several trainings of one backbone, which.
        folder: its sections.
        records: of them.
    """

    label: str
    network: str
    seed: str
    folder: EvidenceFolder
    records: list[SectionRecord]


@dataclass(frozen=True)
class CombinedEvidence:
    """Several runs.

    Attributes:
        runs: in the order of the folders.
        over: claims over all runs, a record a section.
        tables: section -> name of a table -> rows of all runs, with the columns ``network`` and ``seed``, or condensed
            from these.
        by_network: where there are several networks, network -> claims over its runs, of those that have several.
        drawings: section -> figures of all runs.
    """

    runs: list[Run]
    over: list[SectionRecord]
    tables: dict[str, dict[str, pd.DataFrame]]
    by_network: dict[str, list[SectionRecord]] = field(default_factory=dict)
    drawings: dict[str, list[Drawing]] = field(default_factory=dict)

    def columns(self) -> dict[str, list[SectionRecord]]:
        """What stands side by side: each run, networks of several runs, and all runs together.

        Of more than six runs those that a network's column stands for are left out.
        """
        shown = [run for run in self.runs if len(self.runs) <= MOST_RUNS or run.network not in self.by_network]
        return {**{run.label: run.records for run in shown}, **self.by_network, OVER: self.over}

    def matched(self, name: str) -> list[list[Claim | None]]:
        """Claims of a section side by side.

        Args:
            name: of the section.

        Returns:
            A row a sentence: a claim for each of :meth:`columns`; None where there is none.
        """
        columns = [
            {claim.sentence: claim for record in own if record.name == name for claim in record.claims}
            for own in self.columns().values()
        ]
        sentences = dict.fromkeys(sentence for column in columns for sentence in column)
        return [[column.get(sentence) for column in columns] for sentence in sentences]

    def markdown(self) -> str:
        """All claims as a table: a row each, and :meth:`columns`."""
        labels = list(self.columns())
        lines = [f"| section | claim | paper | {' | '.join(labels)} |", "|---" * (3 + len(labels)) + "|"]
        for name in self.sections():
            for row in self.matched(name):
                claim = next(claim for claim in row if claim is not None)
                cells = ["" if found is None else f"{found.estimate} {found.verdict}" for found in row]
                lines.append(markdown_row([name, claim.sentence, claim.paper, *cells]))
        return "\n".join(lines) + "\n"

    def sections(self) -> list[str]:
        """Names of sections in the paper's order, then those from elsewhere."""
        return list(dict.fromkeys([*SECTIONS, *(record.name for record in self.over)]))

    def write(self, folder: Path) -> None:
        """Write every table as CSV and Parquet, and every figure, ``SECTION-NAME``; files of these names are replaced.

        Raises:
            TwoAxisError: a file cannot be written.
        """
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise TwoAxisError(f"{folder}: could not be made a folder ({error}); choose another --out") from error
        for section, tables in self.tables.items():
            for name, table in tables.items():
                write_table(table, folder / f"{section}-{name}")
            for drawing in self.drawings.get(section, ()):
                write_bytes(folder / f"{section}-{drawing.name}.png", png_bytes(drawing.draw()))


def combine_evidence(folders: Sequence[str | Path], more: Iterable[SectionRecord] = ()) -> CombinedEvidence:
    """Read what several calls of ``tp-twoaxis diagnose`` left beside their pages, and judge it together.

    Args:
        folders: of tables, one a network.
        more: sections from elsewhere, for example of pruning results.

    Raises:
        TwoAxisError: there is no folder, one holds no evidence, or two are of the same network.
    """
    if not folders:
        raise TwoAxisError("expected at least one folder of evidence, got none")
    runs = _runs([EvidenceFolder(Path(folder)) for folder in folders])
    tables = {name: _joined(runs, name) for name in SECTIONS}
    names = [run.network for run in runs]
    several = [name for name in dict.fromkeys(names) if 1 < names.count(name) < len(names)]
    by_network = {name: _judged(_of_network(tables, name)) for name in several}
    over, drawings = [], {}
    if len(runs) > 1:
        over = _judged(tables)
        drawings = {name: SECTIONS[name].drawn(own) for name, own in tables.items() if own}
        tables = {name: own | (SECTIONS[name].condensed(own) if own else {}) for name, own in tables.items()}
    return CombinedEvidence(runs, [*over, *more], tables, by_network, drawings)


def _joined(runs: Sequence[Run], section: str) -> dict[str, pd.DataFrame]:
    """A section's tables of all runs below each other."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for run in runs:
        for record in (record for record in run.records if record.name == section):
            for table in record.tables:
                own = run.folder.table(record, table)
                own.insert(0, "network", run.network)
                own.insert(1, "seed", run.seed)
                parts.setdefault(table, []).append(own)
    return {table: pd.concat(own, ignore_index=True) for table, own in parts.items()}


def _of_network(tables: dict[str, dict[str, pd.DataFrame]], network: str) -> dict[str, dict[str, pd.DataFrame]]:
    parts = {
        name: {table: rows[rows.network == network].reset_index(drop=True) for table, rows in own.items()}
        for name, own in tables.items()
    }
    return {name: {table: rows for table, rows in own.items() if len(rows)} for name, own in parts.items()}


def _judged(tables: dict[str, dict[str, pd.DataFrame]]) -> list[SectionRecord]:
    return [SectionRecord(name, claims=tuple(SECTIONS[name].over_runs(own))) for name, own in tables.items() if own]


def combined_html(combined: CombinedEvidence) -> str:
    """Build the dashboard: every run's verdict on every claim, and the one over runs; then figures and all tables.

    Returns:
        A complete HTML document without references to anything outside itself.
    """
    sections = [
        {
            "name": name,
            "title": section_title(name),
            "rows": rows,
            "pictures": [Picture(png_bytes(own.draw()), own.caption) for own in combined.drawings.get(name, ())],
            "tables": [
                FoldedTable.of(table, frame, f"{name}-{table}.csv")
                for table, frame in combined.tables.get(name, {}).items()
            ],
        }
        for name in combined.sections()
        if (rows := combined.matched(name))
    ]
    return render(
        "evidence_runs.html",
        title=f"{TITLE}: {len(combined.runs)} runs",
        reading=READING,
        fewest=FEWEST_MODELS,
        labels=list(combined.columns()),
        overview=_overview(combined),
        sections=sections,
        provenances=[provenance(run.folder.description()) for run in combined.runs],
    )


def _runs(folders: Sequence[EvidenceFolder]) -> list[Run]:
    descriptions = [folder.description() for folder in folders]
    several = len({run["data"] for run in descriptions}) > 1
    networks = [f"{run['network']} on {run['data']}" if several else run["network"] for run in descriptions]
    runs = []
    for folder, run, network in zip(folders, descriptions, networks, strict=True):
        label = network if networks.count(network) == 1 else f"{network} ({run['seed']})"
        runs.append(Run(label, network, run["seed"], folder, folder.records(SECTIONS, key=run["key"])))
    labels = [run.label for run in runs]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise TwoAxisError(
            f"expected runs of different networks or trainings, got {twice[0]} twice; give each its --training-seed"
        )
    return runs


def _overview(combined: CombinedEvidence) -> list[dict[str, Any]]:
    runs = [(run.label, run.records, described(run.folder.description())) for run in combined.runs]
    together = [(label, records, "") for label, records in [*combined.by_network.items(), (OVER, combined.over)]]
    return [
        {
            "label": label,
            "counted": counted(claim for record in records for claim in record.claims),
            "skipped": [record.name for record in records if record.skipped is not None],
            "described": what,
        }
        for label, records, what in [*runs, *together]
    ]
