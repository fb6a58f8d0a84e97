"""Evidence of several networks together: tables below each other, claims over runs, and every run's own verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tp_twoaxis.diagnostics.evidence import Claim
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
from tp_twoaxis.diagnostics.evidence_store import EvidenceFolder, SectionRecord
from tp_twoaxis.diagnostics.html_page import render
from tp_twoaxis.errors import TwoAxisError


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
        tables: section -> name of a table -> rows of all runs, with the columns ``network`` and ``seed``.
    """

    runs: list[Run]
    over: list[SectionRecord]
    tables: dict[str, dict[str, pd.DataFrame]]

    def matched(self, name: str) -> list[list[Claim | None]]:
        """Claims of a section, each run's and the one over runs side by side.

        Args:
            name: of the section.

        Returns:
            A row a sentence: a claim a run, then that over runs; None where there is none.
        """
        records = [*(run.records for run in self.runs), self.over]
        columns = [
            {claim.sentence: claim for record in own if record.name == name for claim in record.claims}
            for own in records
        ]
        sentences = dict.fromkeys(sentence for column in columns for sentence in column)
        return [[column.get(sentence) for column in columns] for sentence in sentences]

    def markdown(self) -> str:
        """All claims as a table: a row each, a column a run, and one over runs."""
        labels = self.labels()
        lines = [f"| section | claim | paper | {' | '.join(labels)} |", "|---" * (3 + len(labels)) + "|"]
        for name in self.sections():
            for row in self.matched(name):
                claim = next(claim for claim in row if claim is not None)
                cells = ["" if found is None else f"{found.estimate} {found.verdict}" for found in row]
                lines.append(markdown_row([name, claim.sentence, claim.paper, *cells]))
        return "\n".join(lines) + "\n"

    def labels(self) -> list[str]:
        """Names of the columns of :meth:`matched`."""
        return [*(run.label for run in self.runs), "over runs"]

    def sections(self) -> list[str]:
        """Names of sections in the paper's order, then those from elsewhere."""
        return list(dict.fromkeys([*SECTIONS, *(record.name for record in self.over)]))


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
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    over = []
    for name, row in SECTIONS.items():
        parts: dict[str, list[pd.DataFrame]] = {}
        for run in runs:
            for record in (record for record in run.records if record.name == name):
                for table in record.tables:
                    own = run.folder.table(record, table)
                    own.insert(0, "network", run.network)
                    own.insert(1, "seed", run.seed)
                    parts.setdefault(table, []).append(own)
        tables[name] = {table: pd.concat(own, ignore_index=True) for table, own in parts.items()}
        if row.over_runs is not None and parts and len(runs) > 1:
            over.append(SectionRecord(name, claims=tuple(row.over_runs(tables[name]))))
    return CombinedEvidence(runs, [*over, *more], tables)


def combined_html(combined: CombinedEvidence) -> str:
    """Build the dashboard: every run's verdict on every claim, and the one over runs; then all tables.

    Returns:
        A complete HTML document without references to anything outside itself.
    """
    sections = [
        {
            "name": name,
            "title": section_title(name),
            "rows": rows,
            "tables": [
                FoldedTable.of(table, frame, f"{name}-{table}.csv of each run")
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
        labels=combined.labels(),
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
    described_runs = [described(run.folder.description()) for run in combined.runs]
    rows = [*(run.records for run in combined.runs), combined.over]
    return [
        {
            "label": label,
            "counted": counted(claim for record in records for claim in record.claims),
            "skipped": [record.name for record in records if record.skipped is not None],
            "described": what,
        }
        for label, records, what in zip(combined.labels(), rows, [*described_runs, ""], strict=True)
    ]
