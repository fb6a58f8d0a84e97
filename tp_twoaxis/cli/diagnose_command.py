"""``tp-twoaxis diagnose``: what the paper claims, on a network of one's own or on several, as one page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tp_twoaxis.cli import completion
from tp_twoaxis.cli.held_out import calibration_and_held_out
from tp_twoaxis.cli.option_groups import omit, override, panel
from tp_twoaxis.cli.option_values import names
from tp_twoaxis.cli.options import (
    DataOptions,
    EvaluationOptions,
    ModelOptions,
    OutputOptions,
    StatisticsOptions,
    noted,
)
from tp_twoaxis.errors import TwoAxisError, check_name
from tp_twoaxis.known_names import SECTIONS

if TYPE_CHECKING:
    # pandas and matplotlib: not for a help page
    from tp_twoaxis.diagnostics.evidence_store import EvidenceFolder, SectionRecord

_first, _evidence, _runs, _output = panel(None), panel("Evidence"), panel("Several runs"), panel("Output")


@dataclass(frozen=True, kw_only=True)
class EvidenceOptions:
    """Which questions are answered, and from what besides the calibration; unknown sections are refused."""

    sections: Annotated[
        str | None,
        _first(f"Only these: {', '.join(SECTIONS)}. Default all.", autocompletion=completion.several_of(SECTIONS)),
    ] = None
    snapshots: Annotated[
        Path | None, _evidence("Folder that `train --snapshots` wrote, for learning and gradients.")
    ] = None
    held_out: Annotated[int, _evidence("Images for lesions, none of --images.", min=1)] = 1000
    removal: Annotated[str, _evidence("What stands in a removed channel's place: mean, zero.")] = "mean"
    training_seed: Annotated[
        str | None, _evidence("Which of several trainings it is; default the checkpoint's name.")
    ] = None

    def __post_init__(self) -> None:
        for name in self.chosen:
            check_name("section", name, SECTIONS)
        check_name("--removal", self.removal, ("mean", "zero"))

    @property
    def chosen(self) -> list[str]:
        """The sections to answer."""
        return list(SECTIONS) if self.sections is None else names(self.sections) or []


def diagnose_command(
    *,
    model: ModelOptions | None,
    source: DataOptions | None,
    evidence: EvidenceOptions,
    evaluation: Annotated[
        EvaluationOptions,
        omit("eval_images"),
        override(
            eval_split=_first("Split of the held-out images. Default --split, images that --images leaves."),
            eval_data=_evidence("Where they are, if not in --data: then a file of its own."),
        ),
    ],
    statistics: Annotated[StatisticsOptions, omit("layers")],
    combine: Annotated[
        str | None, _runs("Folders of tables that earlier calls left beside their pages: a_tables,b_tables.")
    ] = None,
    results: Annotated[str | None, _runs("Folders that `bench` wrote, for the claims about pruning.")] = None,
    out: Annotated[Path, _first("The page; tables and figures go to NAME_tables beside it.", show_default=False)],
    markdown: Annotated[Path | None, _output("Write the claims as Markdown.")] = None,
    output: OutputOptions,
) -> None:
    """Judge every claim of the paper on your network, and say what follows for pruning and where it fails.

    Finished sections are kept: the same call goes on after an interruption, and --sections adds to a page. With
    --combine, runs of several networks are judged together instead.
    """
    output.check(out, markdown)
    if combine is not None:
        if model is not None or source is not None:
            raise TwoAxisError("--combine: takes folders alone, got a model or --data too; leave them out")
        _combine(names(combine) or [], names(results) or [], out, markdown, output)
        return
    if model is None or source is None:
        raise TwoAxisError("expected MODEL and --data, or --combine with folders of earlier runs; got neither")
    if results is not None:
        raise TwoAxisError("--results: expected with --combine; leave it out, or combine the run with it afterwards")

    from tp_twoaxis.diagnostics.evidence_store import EvidenceFolder

    folder = EvidenceFolder(out.with_name(f"{out.stem}_tables"))
    notes = [*_gather(model, source, evidence, evaluation, statistics, folder, output), *model.notes()]
    _write(folder, out, markdown, notes, output)


def _write(folder: EvidenceFolder, out: Path, markdown: Path | None, notes: list[str], output: OutputOptions) -> None:
    from tp_twoaxis.diagnostics.evidence_page import claims_markdown, counted, described, evidence_html
    from tp_twoaxis.runtime.serialization import write_bytes

    records = folder.records(SECTIONS, key=folder.description()["key"])
    write_bytes(out, evidence_html(folder, records).encode())
    if markdown is not None:
        text = f"{described(folder.description())}\n\n{claims_markdown(records)}\n"
        write_bytes(markdown, text.encode())
    output.show(
        {"out": str(out), "tables": str(folder.path), **_payload(records), "notes": notes},
        *(_line(record) for record in records),
        f"claims: {counted(claim for record in records for claim in record.claims)}",
        f"wrote {out}, tables and figures in {folder.path}",
        *noted(notes),
    )


def _gather(
    model: ModelOptions,
    source: DataOptions,
    evidence: EvidenceOptions,
    evaluation: EvaluationOptions,
    statistics: StatisticsOptions,
    folder: EvidenceFolder,
    output: OutputOptions,
) -> list[str]:
    """Compute what is not finished yet, and give what there is to note."""
    from tp_twoaxis.benchmark.trial import provenance
    from tp_twoaxis.diagnostics.evidence import EvidenceInputs
    from tp_twoaxis.diagnostics.evidence_report import evidence_key, finished_section, gather_evidence
    from tp_twoaxis.statistics import calibrate
    from tp_twoaxis.training.snapshots import read_snapshots

    network = model.build()
    snapshots = {} if evidence.snapshots is None else read_snapshots(evidence.snapshots)
    others = None
    if evaluation.eval_data is not None or evaluation.eval_split not in (None, source.split):
        others = replace(evaluation, eval_images=evidence.held_out).beside(source)
    calibration, held_out, notes = calibration_and_held_out(source, others, evidence.held_out)
    if others is None:
        notes.append("lesions cost little on images learnt by heart: name others with --eval-split or --eval-data")
    settings = {**_read_as(source), "lesions": _read_as(others or source), **statistics.keywords()}
    if evidence.removal != "mean":  # what pages before there was a choice have keeps its key
        settings["removal"] = evidence.removal
    key = evidence_key(network, calibration, held_out, snapshots, **settings)
    same = folder.described and folder.description()["key"] == key
    if folder.described and not same and not output.force:
        raise TwoAxisError(
            f"{folder.path}: holds evidence of another network, other images or options; choose another --out, or "
            "--force to replace it"
        )
    if same and all(finished_section(folder, name, key) is not None for name in evidence.chosen):
        return [*notes, "all sections were finished before; nothing was computed"]
    gathered = calibrate(network, calibration, max_images=None, progress=output.progress, **statistics.keywords())
    run = {
        "network": model.model,
        "seed": evidence.training_seed or (model.checkpoint.stem if model.checkpoint else "no checkpoint"),
        "data": Path(source.data.partition(":/")[0]).name,
        "images": gathered.num_images,
        "held_out": [len(held_out.sampler), (others or source).split],
    }
    folder.describe({**run, "key": key, **provenance(model.device)})
    inputs = EvidenceInputs(
        network,
        gathered,
        calibration,
        held_out,
        snapshots,
        removal="zero" if evidence.removal == "zero" else "mean",
        seed=source.seed,
        progress=output.progress,
    )

    def report(record: SectionRecord) -> None:
        if output.progress:
            typer.echo(_line(record), err=True)

    gather_evidence(inputs, folder, sections=evidence.chosen, key=key, on_section=report)
    return notes


def _read_as(source: DataOptions) -> dict[str, Any]:
    """What images are, but for which rows are drawn."""
    return {
        name: getattr(source, name) for name in ("data", "split", "seed", "image_size", "mean", "std", "label_column")
    }


def _combine(folders: list[str], results: list[str], out: Path, markdown: Path | None, output: OutputOptions) -> None:
    from tp_twoaxis.benchmark.pruning_claims import pruning_claims
    from tp_twoaxis.diagnostics.evidence_page import counted
    from tp_twoaxis.diagnostics.evidence_runs import OVER, combine_evidence, combined_html
    from tp_twoaxis.diagnostics.evidence_store import SectionRecord
    from tp_twoaxis.runtime.serialization import write_bytes

    pruning = [SectionRecord("pruning", claims=tuple(pruning_claims(results)))] if results else []
    combined = combine_evidence(folders, pruning)
    write_bytes(out, combined_html(combined).encode())
    if markdown is not None:
        write_bytes(markdown, combined.markdown().encode())
    tables = out.with_name(f"{out.stem}_tables")
    combined.write(tables)
    records = [*((run.label, run.records) for run in combined.runs), *combined.by_network.items()]
    records.append((OVER, combined.over))
    output.show(
        {
            "out": str(out),
            "tables": str(tables),
            "runs": [run.label for run in combined.runs],
            "over_runs": _payload(combined.over),
        },
        *(f"{label}: {counted(claim for record in own for claim in record.claims)}" for label, own in records),
        f"wrote {out}, tables and figures in {tables}",
    )


def _line(record: SectionRecord) -> str:
    from tp_twoaxis.diagnostics.evidence_page import counted

    if record.skipped is not None:
        return f"{record.name}: skipped, {record.skipped}"
    return f"{record.name}: {counted(record.claims)}; {record.seconds:.1f} s"


def _payload(records: list[SectionRecord]) -> dict[str, Any]:
    """Give sections as JSON-able values; numbers that are not there are null."""
    return {
        "sections": [
            {"name": r.name, "skipped": r.skipped, "seconds": r.seconds, "cpu_seconds": r.cpu_seconds} for r in records
        ],
        "claims": [
            {
                "section": record.name,
                "sentence": claim.sentence,
                "paper": claim.paper,
                "value": _number(claim.estimate.value),
                "lower": _number(claim.estimate.lower),
                "upper": _number(claim.estimate.upper),
                "verdict": claim.verdict,
                "note": claim.note,
            }
            for record in records
            for claim in record.claims
        ],
    }


def _number(value: float) -> float | None:
    return None if value != value else float(value)
