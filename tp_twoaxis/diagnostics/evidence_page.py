"""The evidence as one HTML file that opens offline, and its claims as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tp_twoaxis.diagnostics.evidence import Claim
from tp_twoaxis.diagnostics.evidence_sections import SECTIONS
from tp_twoaxis.diagnostics.evidence_store import EvidenceFolder, SectionRecord
from tp_twoaxis.diagnostics.html_page import Picture, Table, render, table

TITLE = "Evidence on two axes of channel information"
READING = (
    "HOLDS: the whole interval lies where the claim puts it; DOES NOT: the whole interval lies outside; UNDECIDED: it "
    "crosses a bound, or there is none. Information is measured by Gaussian formulas on correlations unless a section "
    "says otherwise: proxies, not literal mutual information. Raw scores, capture and weight norm among them, move "
    "when weights before BatchNorm are rescaled, which the network does not notice. Intervals of one network are over "
    "its layers, channels or images, and do not say what another training would give."
)
SHOWN_ROWS = 100


def evidence_html(folder: EvidenceFolder, records: Sequence[SectionRecord]) -> str:
    """Build the page of one network: claims first, then section by section.

    Args:
        folder: with figures, tables, and the run's description.
        records: in the paper's order.

    Returns:
        A complete HTML document without references to anything outside itself.
    """
    run = folder.description()
    return render(
        "evidence.html",
        title=f"{TITLE}: {run.get('network', '')}",
        heading=TITLE,
        described=described(run),
        total=counted(claim for record in records for claim in record.claims),
        reading=READING,
        skipped=_skipped(records),
        sections=[_section(folder, record) for record in records],
        provenance=provenance(run),
    )


def described(run: Mapping[str, Any]) -> str:
    """Say what a run is of, in a line.

    Example:
        >>> described({"network": "net", "seed": "a", "data": "cifar10", "images": 2000, "held_out": [1000, "test"]})
        'net (a) on cifar10: 2000 calibration images; lesions on 1000 others of test'
    """
    images = f"{run['images']} calibration images" if run.get("images") else "images unknown"
    held_out = "; lesions on {} others of {}".format(*run["held_out"]) if run.get("held_out") else ""
    return f"{run.get('network')} ({run.get('seed')}) on {run.get('data')}: {images}{held_out}"


def provenance(run: Mapping[str, Any]) -> str:
    """Say what made a run, in a line."""
    machine, versions = run.get("machine", {}), run.get("versions", {})
    return (
        f"{run.get('command')}; commit {run.get('commit')}, torch {versions.get('torch')}, {machine.get('processor')}, "
        f"{machine.get('cores')} cores, {machine.get('device')}, {run.get('date')}"
    )


def counted(claims: Iterable[Claim]) -> str:
    """Count claims by verdict, in words.

    Example:
        >>> from tp_twoaxis.diagnostics.evidence import Estimate
        >>> counted([Claim("a", "", Estimate(1.0, 0.5, 2.0), above=0.0)])
        '1 holds, 0 do not, 0 undecided'
    """
    count = Counter(claim.verdict for claim in claims)
    verb = "holds" if count["HOLDS"] == 1 else "hold"
    return f"{count['HOLDS']} {verb}, {count['DOES NOT']} do not, {count['UNDECIDED']} undecided"


@dataclass(frozen=True)
class FoldedTable:
    """A table that a page shows the first rows of.

    Attributes:
        name: of the table.
        length: its rows.
        first: those that are shown.
        file: where all are.
    """

    name: str
    length: int
    first: Table
    file: str

    @classmethod
    def of(cls, name: str, frame: pd.DataFrame, file: str) -> FoldedTable:
        """Take the first rows of a frame."""
        return cls(name, len(frame), table(frame.head(SHOWN_ROWS)), file)


def markdown_row(cells: Iterable[str]) -> str:
    r"""Join cells to a row of a Markdown table.

    Example:
        >>> print(markdown_row(["|w|", "0.1"]))
        | \|w\| | 0.1 |
    """
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def claims_markdown(records: Iterable[SectionRecord]) -> str:
    """Claims as a Markdown table, a row each; then what was skipped.

    Example:
        >>> print(claims_markdown([SectionRecord("learning", skipped="no snapshots")]))
        | section | claim | paper | here | verdict |
        |---|---|---|---|---|
        <BLANKLINE>
        Skipped: learning (no snapshots).
    """
    records = list(records)
    rows = [
        markdown_row([record.name, claim.sentence, claim.paper, str(claim.estimate), claim.verdict])
        for record in records
        for claim in record.claims
    ]
    skipped = _skipped(records)
    lines = ["| section | claim | paper | here | verdict |", "|---|---|---|---|---|", *rows]
    return "\n".join(lines + (["", f"Skipped: {skipped}."] if skipped else []))


def _skipped(records: Iterable[SectionRecord]) -> str:
    return "; ".join(f"{record.name} ({record.skipped})" for record in records if record.skipped is not None)


def _section(folder: EvidenceFolder, record: SectionRecord) -> dict[str, Any]:
    def file(name: str) -> str:
        return f"{folder.path.name}/{record.name}-{name}.csv"

    return {
        "record": record,
        "title": section_title(record.name),
        "pictures": [Picture(folder.png(record, figure), figure.caption) for figure in record.figures],
        "tables": [FoldedTable.of(name, folder.table(record, name), file(name)) for name in record.tables],
    }


def section_title(name: str) -> str:
    """Section's name and its place in the paper; of one from elsewhere the name alone.

    Example:
        >>> section_title("calibration-size"), section_title("pruning")
        ('Calibration size (appendix D)', 'Pruning')
    """
    words = name.replace("-", " ").capitalize()
    return f"{words} ({SECTIONS[name].place})" if name in SECTIONS else words
