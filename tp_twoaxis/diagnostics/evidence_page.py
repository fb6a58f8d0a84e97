"""The evidence as one HTML file that opens offline, and its claims as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd

from tp_twoaxis.diagnostics.evidence import Claim
from tp_twoaxis.diagnostics.evidence_sections import SECTIONS
from tp_twoaxis.diagnostics.evidence_store import EvidenceFolder, SectionRecord
from tp_twoaxis.diagnostics.html_page import image_element, page, table_element

TITLE = "Evidence on two axes of channel information"
READING = (
    "HOLDS: the whole interval lies where the claim puts it; DOES NOT: the whole interval lies outside; UNDECIDED: it "
    "crosses a bound, or there is none. Information is measured by Gaussian formulas on correlations unless a section "
    "says otherwise: proxies, not literal mutual information. Raw scores, capture and weight norm among them, move "
    "when weights before BatchNorm are rescaled, which the network does not notice. Intervals of one network are over "
    "its layers, channels or images, and do not say what another training would give."
)
SHOWN_ROWS = 100
VERDICTS = {"HOLDS": "holds", "DOES NOT": "fails", "UNDECIDED": "open"}
STYLE = """<style>
.claims td, .claims th { text-align: left; white-space: normal; vertical-align: top; }
.claims { width: 100%; } .claims th:first-child { width: 40%; } h3 a { color: inherit; }
.claims th:nth-child(2) { min-width: 8rem; }
.claims td.number { white-space: nowrap; } .claims .soft { display: block; }
.verdict { font-weight: 600; font-size: .8rem; padding: .1rem .45rem; border-radius: .3rem; }
.verdict { color: #fff; white-space: nowrap; }
.holds { background: #1a6e33; } .fails { background: #a3241d; } .open { background: #6b5b1e; }
details { margin: .5rem 0; } summary { cursor: pointer; } figure { margin: 1rem 0; } figcaption { max-width: 52rem; }
section { border-top: 1px solid #8884; margin-top: 2rem; overflow-wrap: anywhere; }
@media (max-width: 700px) {
  body { padding: 1rem .8rem 3rem; }
  .stack thead { display: none; } .stack tr { display: block; padding: .6rem 0; border-bottom: 1px solid #8884; }
  .stack td { display: block; border: 0; padding: .1rem 0; }
  .stack td[data-label]::before { content: attr(data-label) ": "; opacity: .75; }
}
</style>"""


def evidence_html(folder: EvidenceFolder, records: Sequence[SectionRecord]) -> str:
    """Build the page of one network: claims first, then section by section.

    Args:
        folder: with figures, tables, and the run's description.
        records: in the paper's order.

    Returns:
        A complete HTML document without references to anything outside itself.
    """
    run = folder.description()
    heading = f"<h1>{TITLE}</h1><p>{escape(described(run))}</p>"
    parts = [STYLE, heading, _claims_page(records), *(_section(folder, record) for record in records)]
    parts.append(f"<p class='soft'>{escape(provenance(run))}</p>")
    return page(f"{TITLE}: {run.get('network', '')}", parts)


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


def verdict_element(claim: Claim) -> str:
    """A verdict in words and colour.

    Example:
        >>> from tp_twoaxis.diagnostics.evidence import Estimate
        >>> verdict_element(Claim("a", "", Estimate(1.0)))
        '<span class="verdict open">UNDECIDED</span>'
    """
    return f'<span class="verdict {VERDICTS[claim.verdict]}">{claim.verdict}</span>'


def claims_element(claims: Iterable[Claim]) -> str:
    """A table of claims, which becomes a list where the window is narrow.

    Example:
        >>> from tp_twoaxis.diagnostics.evidence import Estimate
        >>> claims_element([Claim("a < b", "0.1", Estimate(1.0))]).count("<tr>")
        2
    """
    rows = "".join(
        f"<tr><td>{escape(claim.sentence)}"
        + (f"<span class='soft'>{escape(claim.note)}</span>" if claim.note else "")
        + f"</td><td data-label='Paper'>{escape(claim.paper) or 'no number'}</td>"
        f"<td data-label='Here' class='number'>{escape(str(claim.estimate))}</td><td>{verdict_element(claim)}</td></tr>"
        for claim in claims
    )
    head = "<thead><tr><th>Claim</th><th>Paper</th><th>Here</th><th>Verdict</th></tr></thead>"
    return f"<table class='claims stack'>{head}<tbody>{rows}</tbody></table>"


def table_details(name: str, table: pd.DataFrame, file: str) -> str:
    """A folded table; of a long one the first rows, and where the others are."""
    more = f"<p class='soft'>The first {SHOWN_ROWS} of {len(table):,} rows; all are in {escape(file)}.</p>"
    return (
        f"<details><summary>{escape(name.replace('_', ' '))}: {len(table):,} rows</summary>"
        f"{table_element(table.head(SHOWN_ROWS))}{more if len(table) > SHOWN_ROWS else ''}</details>"
    )


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
    skipped = [f"{record.name} ({record.skipped})" for record in records if record.skipped is not None]
    lines = ["| section | claim | paper | here | verdict |", "|---|---|---|---|---|", *rows]
    return "\n".join(lines + (["", f"Skipped: {'; '.join(skipped)}."] if skipped else []))


def _claims_page(records: Sequence[SectionRecord]) -> str:
    parts = [
        f"<h3><a href='#{record.name}'>{escape(section_title(record.name))}</a></h3>{claims_element(record.claims)}"
        for record in records
        if record.claims
    ]
    skipped = [f"{record.name} ({record.skipped})" for record in records if record.skipped is not None]
    note = f"<p class='note'>Skipped: {escape('; '.join(skipped))}.</p>" if skipped else ""
    total = counted(claim for record in records for claim in record.claims)
    return f"<h2>Claims: {total}</h2><p class='soft'>{escape(READING)}</p>{note}{''.join(parts)}"


def _section(folder: EvidenceFolder, record: SectionRecord) -> str:
    head = f"<section id='{record.name}'><h2>{escape(section_title(record.name))}</h2>"
    if record.skipped is not None:
        return f"{head}<p class='note'>Skipped: {escape(record.skipped)}.</p></section>"
    figures = "".join(
        f"<figure>{image_element(folder.png(record, figure), figure.caption)}"
        f"<figcaption class='soft'>{escape(figure.caption)}</figcaption></figure>"
        for figure in record.figures
    )
    tables = "".join(
        table_details(name, folder.table(record, name), f"{folder.path.name}/{record.name}-{name}.csv")
        for name in record.tables
    )
    return (
        f"{head}<p><b>{escape(record.question)}</b></p>{claims_element(record.claims)}{figures}"
        f"<p><b>What follows for pruning.</b> {escape(record.follows)}</p>"
        f"<p><b>Where it fails.</b> {escape(record.fails)}</p>{tables}"
        f"<p class='soft'>{record.seconds:.1f} s ({record.cpu_seconds:.1f} CPU seconds)</p></section>"
    )


def section_title(name: str) -> str:
    """Section's name and its place in the paper; of one from elsewhere the name alone.

    Example:
        >>> section_title("calibration-size"), section_title("pruning")
        ('Calibration size (appendix D)', 'Pruning')
    """
    words = name.replace("-", " ").capitalize()
    return f"{words} ({SECTIONS[name].place})" if name in SECTIONS else words
