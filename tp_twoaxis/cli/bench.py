"""``tp-twoaxis bench`` and ``tp-twoaxis report``: a comparison of one's own, and what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tp_twoaxis.cli import options as opt
from tp_twoaxis.cli.inputs import names, numbers, show_progress
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.ranks import process_group

if TYPE_CHECKING:
    # pandas and matplotlib: not for commands that do without
    from tp_twoaxis.benchmark import BenchmarkConfig
    from tp_twoaxis.benchmark.engines import Engine
    from tp_twoaxis.benchmark.report import Report

_SWEEP, _SCALE = "Sweep", "Scale"


def bench_command(
    out: Annotated[Path, typer.Option(help="Folder of the results; an unfinished sweep in it goes on.")],
    config: Annotated[
        Path | None, typer.Option(help="A sweep as JSON, instead of all options of model, data and sweep.")
    ] = None,
    model: Annotated[str | None, typer.Option(help=opt.MODEL_HELP, rich_help_panel="Model")] = None,
    checkpoint: opt.Checkpoint = None,
    num_classes: opt.NumClasses = None,
    pretrained: opt.Pretrained = False,
    device: opt.Device = "cpu",
    data: opt.OptionalData = None,
    test_data: Annotated[
        str | None, typer.Option(help="Test images, if not in --data.", rich_help_panel="Data")
    ] = None,
    split: opt.Split = "train",
    test_split: Annotated[str, typer.Option(help="Split of the test images.", rich_help_panel="Data")] = "test",
    images: opt.Images = 5000,
    test_images: Annotated[
        int | None, typer.Option(help="Test images to draw; default all.", rich_help_panel="Data", min=1)
    ] = None,
    selection_images: Annotated[
        int, typer.Option(help="Training images to hold out for choices.", rich_help_panel="Data", min=0)
    ] = 0,
    evaluate_on: Annotated[
        str, typer.Option(help="What accuracies are measured on: test, selection.", rich_help_panel="Data")
    ] = "test",
    batch_size: opt.BatchSize = 128,
    image_size: opt.ImageSize = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    label_column: opt.LabelColumn = None,
    methods: Annotated[
        str,
        typer.Option(help="Criteria: local,taylor,l2, entry points or module:factory; all.", rich_help_panel=_SWEEP),
    ] = "local,taylor,l2",
    allocation: Annotated[
        str, typer.Option(help="Who decides how many: global, uniform.", rich_help_panel=_SWEEP)
    ] = "global",
    keep: Annotated[str, typer.Option(help="Shares to keep.", rich_help_panel=_SWEEP)] = "0.7,0.5,0.35",
    grid: Annotated[
        str,
        typer.Option(help="What --keep is a share of: macs, or channels (the paper's levels).", rich_help_panel=_SWEEP),
    ] = "macs",
    repair: Annotated[
        str, typer.Option(help="Repairs to cross with: none,bn; join several by a +.", rich_help_panel=_SWEEP)
    ] = "bn",
    steps: Annotated[str, typer.Option(help="Steps of pruning; 1,3 compares both.", rich_help_panel=_SWEEP)] = "1",
    finetune_batches: Annotated[
        str, typer.Option(help="Training batches after pruning; 0,200 compares both.", rich_help_panel=_SWEEP)
    ] = "0",
    finetune_amp: Annotated[
        str, typer.Option(help="Precision of that training: none, bf16, fp16 (CUDA).", rich_help_panel=_SWEEP)
    ] = "none",
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Memory layout; often faster.", rich_help_panel=_SWEEP)
    ] = False,
    seeds: Annotated[
        str, typer.Option(help="Seeds of calibration images and training.", rich_help_panel=_SWEEP)
    ] = "42,123,456,789,1011",
    workers: Annotated[
        int | None, typer.Option(help="Processes, or Ray actors; default 1.", rich_help_panel=_SCALE, min=1)
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="local processes, or ray: a cluster at RAY_ADDRESS, else this machine.", rich_help_panel=_SCALE
        ),
    ] = "local",
    cpus_per_cell: Annotated[float, typer.Option(help="Of a Ray actor.", rich_help_panel=_SCALE)] = 1,
    gpus_per_cell: Annotated[
        float, typer.Option(help="Of a Ray actor; 0.25 puts four on a GPU.", rich_help_panel=_SCALE)
    ] = 0,
    retries: Annotated[
        int, typer.Option(help="How often a Ray actor that died is started again.", rich_help_panel=_SCALE, min=0)
    ] = 3,
    part: Annotated[
        str | None,
        typer.Option(help="2/4: the second quarter of the sweep, for several machines.", rich_help_panel=_SCALE),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure failed cells again.", rich_help_panel=_SWEEP)
    ] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Add methods, shares or seeds to a folder.", rich_help_panel=_SWEEP)
    ] = False,
    json_output: opt.Json = False,
) -> None:
    """Compare criteria at equal MACs on your network: prune, repair, fine-tune, test, for every seed.

    Each cell is a file in OUT; run the same command again after an interruption and it goes on. Several GPUs at one
    cell: torchrun --nproc-per-node 4 -m tp_twoaxis bench ... --device cuda.
    """
    from tp_twoaxis.benchmark import load_config, run_benchmark
    from tp_twoaxis.benchmark.report import make_report

    if config is not None:
        if model is not None or data is not None:
            raise TwoAxisError("--config: expected it alone, got --model or --data as well; write them into the file")
        sweep = load_config(config)
    else:
        if model is None or data is None:
            raise TwoAxisError("expected --model and --data, or --config; give them")
        values: dict[str, Any] = {
            "networks": [
                {
                    "name": model if checkpoint is None else checkpoint.stem,
                    "model": model,
                    "data": data,
                    "checkpoint": None if checkpoint is None else str(checkpoint),
                    "num_classes": num_classes,
                    "pretrained": pretrained,
                    "test_data": test_data,
                    "image_size": image_size,
                    "mean": numbers("--mean", mean),
                    "std": numbers("--std", std),
                    "label_column": label_column,
                }
            ],
            "methods": {
                "criteria": "all" if methods == "all" else names(methods),
                "allocation": names(allocation),
                "repair": [[] if r == "none" else r.split("+") for r in names(repair) or ()],
                "finetune_batches": _integers("--finetune-batches", finetune_batches),
                "steps": _integers("--steps", steps),
            },
            "keep": numbers("--keep", keep),
            "grid": grid,
            "finetune_amp": None if finetune_amp == "none" else finetune_amp,
            "channels_last": channels_last,
            "seeds": _integers("--seeds", seeds),
            "data": {
                "train_split": split,
                "test_split": test_split,
                "calibration_images": images,
                "selection_images": selection_images,
                "test_images": test_images,
                "evaluate_on": evaluate_on,
                "batch_size": batch_size,
            },
        }
        sweep = _sweep(values)
    chosen = _engine(engine, workers, cpus_per_cell, gpus_per_cell, retries)
    with process_group(device) as place:
        summary = run_benchmark(
            sweep,
            out,
            engine=chosen,
            device=place.device,
            part=_part(part),
            retry_failed=retry_failed,
            extend=extend,
            progress=show_progress(json_output),
        )
    if place.rank:
        return
    report = make_report(out)
    if len(summary.failed) == summary.total:
        raise TwoAxisError(f"all {summary.total} cells failed, the first with {report.failures.error.iloc[0]}")
    if json_output:
        counts = {"cells": summary.total, "ran": summary.ran, "skipped": summary.skipped, "failed": summary.failed}
        typer.echo(json.dumps({"out": str(out), **counts, **_payload(report)}))
        return
    typer.echo(report.markdown())
    _notes(report)
    typer.echo(f"{summary.ran} cells measured, {summary.skipped} were there; tp-twoaxis report {out} draws them")


def report_command(
    folder: Annotated[Path, typer.Argument(help="A folder that `bench` wrote.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Where to write; default FOLDER/report.")] = None,
    json_output: opt.Json = False,
) -> None:
    """Write tables, curves and one HTML file of a sweep, finished or not."""
    from tp_twoaxis.benchmark.report import make_report, write_report

    report = make_report(folder)
    files = write_report(report, out)
    if json_output:
        typer.echo(json.dumps({"files": [str(file) for file in files], **_payload(report)}))
        return
    typer.echo(report.markdown())
    _notes(report)
    typer.echo(f"wrote {files[0]} and {len(files) - 1} more files beside it")


def _sweep(values: dict[str, Any]) -> BenchmarkConfig:
    from tp_twoaxis.benchmark import BenchmarkConfig

    return BenchmarkConfig.from_dict(values)


def _engine(name: str, workers: int | None, cpus: float, gpus: float, retries: int) -> Engine | None:
    from tp_twoaxis.benchmark.engines import LocalEngine
    from tp_twoaxis.benchmark.ray_engine import RayEngine

    if name == "ray":
        return RayEngine(workers or 1, cpus, gpus, retries)
    if name != "local":
        raise TwoAxisError(f"--engine: expected local or ray, got {name!r}")
    return None if workers is None else LocalEngine(workers)


def _payload(report: Report) -> dict[str, Any]:
    return {
        "summary": json.loads(report.summary.to_json(orient="records")),
        "auc": json.loads(report.auc.table.to_json(orient="records")),
        "failures": json.loads(report.failures.to_json(orient="records")),
        "notes": report.notes,
    }


def _notes(report: Report) -> None:
    # often one cause fails every cell of a method
    for (network, method, error), cells in report.failures.groupby(["network", "method", "error"], sort=False):
        typer.echo(f"failed: {network}, {method}, {len(cells)} cell{'s' if len(cells) > 1 else ''}: {error}")
    for note in report.notes:
        typer.echo(f"note: {note}")


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise TwoAxisError(f"{option}: expected whole numbers such as 42,123, got {text!r}") from error


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise TwoAxisError(f"--part: expected k/n such as 2/4, got {text!r}")
    return int(number), int(count)
