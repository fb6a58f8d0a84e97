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
    claims_element,
    claims_markdown,
    counted,
    described,
    provenance,
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
        label: tells it from the others.
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

    def markdown(self) -> str:
        """Claims over runs, then those of each."""
        parts = [f"## All runs\n\n{claims_markdown(self.over)}"]
        parts += [
            f"## {run.label}\n\n{described(run.folder.description())}. "
            f"{counted(claim for record in run.records for claim in record.claims)}.\n\n{claims_markdown(run.records)}"
            for run in self.runs
        ]
        return "\n\n".join(parts) + "\n"


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
    """Build the dashboard: claims over runs, every run's verdict on every claim, and all tables.

    Returns:
        A complete HTML document without references to anything outside itself.
    """
    names = list(dict.fromkeys([*SECTIONS, *(record.name for record in combined.over)]))
    parts = [STYLE, f"<h1>{TITLE}: {len(combined.runs)} runs</h1>", f"<p class='soft'>{escape(READING)} {OVER}</p>"]
    parts.append(_overview(combined))
    for name in names:
        body = _over(combined, name) + _side_by_side(combined, name)
        if not body:
            continue
        details = "".join(
            table_details(table, frame, f"{name}-{table}.csv of each run")
            for table, frame in combined.tables.get(name, {}).items()
        )
        parts.append(
            f"<section id='{name}'><h2>{escape(name.replace('-', ' ').capitalize())}</h2>{body}{details}</section>"
        )
    parts += [f"<p class='soft'>{escape(provenance(run.folder.description()))}</p>" for run in combined.runs]
    return page(f"{TITLE}: {len(combined.runs)} runs", parts)


def _runs(folders: Sequence[EvidenceFolder]) -> list[Run]:
    described_runs = [folder.description() for folder in folders]
    several = len({str(run.get("data")) for run in described_runs}) > 1
    runs = []
    for folder, run in zip(folders, described_runs, strict=True):
        network = f"{run.get('network')} on {run.get('data')}" if several else str(run.get("network"))
        seed = str(run.get("seed"))
        runs.append(Run(f"{network} ({seed})", network, seed, folder, folder.records(SECTIONS, key=run.get("key"))))
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
        rows.append(f"<li><b>{escape(run.label)}</b>: {counted(claims)}{escape(note)}</li>")
    over = [claim for record in combined.over for claim in record.claims]
    rows.append(f"<li><b>over runs</b>: {counted(over)}</li>")
    return f"<ul>{''.join(rows)}</ul>"


def _over(combined: CombinedEvidence, name: str) -> str:
    claims = [claim for record in combined.over if record.name == name for claim in record.claims]
    return f"<h3>Over runs</h3>{claims_element(claims)}" if claims else ""


def _side_by_side(combined: CombinedEvidence, name: str) -> str:
    """Every run's verdict on every claim; claims are matched by their sentences."""
    own = [
        {claim.sentence: claim for record in run.records if record.name == name for claim in record.claims}
        for run in combined.runs
    ]
    sentences: dict[str, Claim] = {}
    for claims in own:
        sentences = claims | sentences
    if not sentences:
        return ""
    head = "".join(f"<th>{escape(run.label)}</th>" for run in combined.runs)
    rows = "".join(
        f"<tr><td>{escape(sentence)}</td><td data-label='Paper'>{escape(claim.paper) or 'no number'}</td>"
        + "".join(
            f"<td data-label='{escape(run.label, quote=True)}'>{_cell(claims.get(sentence))}</td>"
            for run, claims in zip(combined.runs, own, strict=True)
        )
        + "</tr>"
        for sentence, claim in sentences.items()
    )
    head = f"<thead><tr><th>Claim</th><th>Paper</th>{head}</tr></thead>"
    return f"<h3>Run by run</h3><div class='wide'><table class='claims stack'>{head}<tbody>{rows}</tbody></table></div>"


def _cell(claim: Claim | None) -> str:
    return "" if claim is None else f"{verdict_element(claim)} {escape(str(claim.estimate))}"
