"""Evidence of several networks together: tables below each other, claims over runs, and every run's own verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd

from tp_twoaxis.diagnostics.evidence import Claim
from tp_twoaxis.diagnostics.evidence_page import (
    READING,
    STYLE,
    TITLE,
    counted,
    described,
    markdown_row,
    provenance,
    section_title,
    table_details,
    verdict_element,
)
from tp_twoaxis.diagnostics.evidence_sections import SECTIONS
from tp_twoaxis.diagnostics.evidence_store import EvidenceFolder, SectionRecord
from tp_twoaxis.diagnostics.html_page import page
from tp_twoaxis.errors import TwoAxisError

OVER = (
    "Over runs: the claim judged on the tables of all networks together, with intervals over models where a network "
    "was trained twice or more, otherwise over layers, channels or images of all. Sections whose claims are of one "
    "network's layers have none."
)


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
        labels = [*(run.label for run in self.runs), "over runs"]
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
    parts = [STYLE, f"<h1>{TITLE}: {len(combined.runs)} runs</h1>", f"<p class='soft'>{escape(READING)} {OVER}</p>"]
    parts.append(_overview(combined))
    for name in combined.sections():
        rows = combined.matched(name)
        if not rows:
            continue
        tables = "".join(
            table_details(table, frame, f"{name}-{table}.csv of each run")
            for table, frame in combined.tables.get(name, {}).items()
        )
        heading = f"<h2>{escape(section_title(name))}</h2>"
        parts.append(f"<section id='{name}'>{heading}{_claims_table(combined, rows)}{tables}</section>")
    parts += [f"<p class='soft'>{escape(provenance(run.folder.description()))}</p>" for run in combined.runs]
    return page(f"{TITLE}: {len(combined.runs)} runs", parts)


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


def _overview(combined: CombinedEvidence) -> str:
    rows = []
    for run in combined.runs:
        claims = [claim for record in run.records for claim in record.claims]
        skipped = [record.name for record in run.records if record.skipped is not None]
        note = f"; skipped: {', '.join(skipped)}" if skipped else ""
        what = described(run.folder.description())
        rows.append(f"<li><b>{escape(run.label)}</b>: {counted(claims)}{escape(note)}. {escape(what)}</li>")
    over = [claim for record in combined.over for claim in record.claims]
    rows.append(f"<li><b>over runs</b>: {counted(over)}</li>")
    return f"<ul>{''.join(rows)}</ul>"


def _claims_table(combined: CombinedEvidence, rows: Iterable[Sequence[Claim | None]]) -> str:
    labels = [*(run.label for run in combined.runs), "over runs"]
    body = ""
    for row in rows:
        claim = next(claim for claim in row if claim is not None)
        shared = len({found.note for found in row if found is not None}) == 1
        cells = "".join(
            f"<td data-label='{escape(label, quote=True)}'>{_cell(found, with_note=not shared)}</td>"
            for label, found in zip(labels, row, strict=True)
        )
        note = f"<span class='soft'>{escape(claim.note)}</span>" if shared else ""
        first = f"<td>{escape(claim.sentence)}{note}</td>"
        body += f"<tr>{first}<td data-label='Paper'>{escape(claim.paper) or 'no number'}</td>{cells}</tr>"
    head = "".join(f"<th>{escape(label)}</th>" for label in ("Claim", "Paper", *labels))
    table = f"<table class='claims stack'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='wide'>{table}</div>"


def _cell(claim: Claim | None, *, with_note: bool) -> str:
    if claim is None:
        return ""
    note = f"<span class='soft'>{escape(claim.note)}</span>" if with_note else ""
    return f"{verdict_element(claim)} {escape(str(claim.estimate))}{note}"
