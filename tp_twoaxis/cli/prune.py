"""``tp-twoaxis prune``: a smaller network, and what was lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tp_twoaxis.batches import split_batch
from tp_twoaxis.borrow import unwrap
from tp_twoaxis.cli import options as opt
from tp_twoaxis.cli.inputs import (
    DataOptions,
    ModelOptions,
    check_outputs,
    evaluation_options,
    names,
    show_progress,
)
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.evaluation import accuracy
from tp_twoaxis.files import write_bytes
from tp_twoaxis.importance.entry import Importance, requires
from tp_twoaxis.importance.registry import IMPORTANCES, find_importance, make_importance
from tp_twoaxis.pruning.apply import prune_to_flops
from tp_twoaxis.pruning.checkpoint import save_pruned
from tp_twoaxis.scores.registry import DEFAULT_SCORE
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.store import CalibrationStatistics

_PRUNING, _EVALUATION = "Pruning", "Evaluation"


def prune_command(
    model: opt.Model,
    data: opt.Data,
    out: Annotated[
        Path, typer.Option(help="The pruned network, .safetensors.", rich_help_panel="Output", show_default=False)
    ],
    flops: Annotated[
        float, typer.Option(help="Share of the MACs to keep, above 0 and up to 1.", rich_help_panel=_PRUNING)
    ] = 0.5,
    steps: Annotated[
        int,
        typer.Option(help="Remove in so many steps; each scores what the last one left.", rich_help_panel=_PRUNING),
    ] = 1,
    score: Annotated[
        str, typer.Option(help=f"What ranks channels: {', '.join(IMPORTANCES)}.", rich_help_panel=_PRUNING)
    ] = DEFAULT_SCORE,
    stats: Annotated[
        Path | None,
        typer.Option(help="Statistics that `calibrate` wrote; default calibrate now.", rich_help_panel=_PRUNING),
    ] = None,
    repair: Annotated[
        str,
        typer.Option(help="bn, bias, ridge, patch, sequential, joint, or ridge+bn; none.", rich_help_panel=_PRUNING),
    ] = "bn",
    min_keep: Annotated[
        float, typer.Option(help="Share of every group's channels that always stays.", rich_help_panel=_PRUNING)
    ] = 0.1,
    round_to: Annotated[
        int | None, typer.Option(help="Keep multiples of this many channels.", rich_help_panel=_PRUNING)
    ] = None,
    attention: opt.Attention = "heads",
    ignore: Annotated[
        str | None, typer.Option(help="Layers that keep their channels: conv1,fc.", rich_help_panel=_PRUNING)
    ] = None,
    checkpoint: opt.Checkpoint = None,
    num_classes: opt.NumClasses = None,
    pretrained: opt.Pretrained = False,
    device: opt.Device = "cpu",
    split: opt.Split = "train",
    images: opt.Images = 5000,
    batch_size: opt.BatchSize = 64,
    workers: opt.Workers = 0,
    seed: opt.Seed = 0,
    image_size: opt.ImageSize = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    label_column: opt.LabelColumn = None,
    target: opt.Target = "margin",
    eval_split: Annotated[
        str | None,
        typer.Option(help="Split to measure accuracy on, before and after.", rich_help_panel=_EVALUATION),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(help="Where it is, if not in --data: then a file of its own.", rich_help_panel=_EVALUATION),
    ] = None,
    eval_images: Annotated[
        int | None, typer.Option(help="Images to draw from it; default all.", rich_help_panel=_EVALUATION, min=1)
    ] = None,
    latency: Annotated[
        bool,
        typer.Option("--latency", help="Time batches of 1 and of 64, before and after.", rich_help_panel=_EVALUATION),
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write what --json prints to a file.", rich_help_panel="Output")
    ] = None,
    json_output: opt.Json = False,
    force: opt.Force = False,
) -> None:
    """Remove channels until a share of the MACs is left, repair, and write the smaller network.

    Load it again with tp_twoaxis.load_pruned, or hand it to --checkpoint.
    """
    entry = find_importance(score)
    if not 0.0 < flops <= 1.0:
        raise TwoAxisError(f"--flops: expected the share of MACs to keep, above 0 and up to 1, got {flops:g}")
    if steps < 1:
        raise TwoAxisError(f"--steps: expected a whole number of at least 1, got {steps}")
    check_outputs(force, out, report)
    source = DataOptions(data, split, images, batch_size, workers, seed, image_size, mean, std, label_column)
    evaluation = evaluation_options(source, eval_split, eval_data, eval_images)
    model_options = ModelOptions(model, checkpoint, num_classes, pretrained, device)
    progress = show_progress(json_output)
    network = model_options.build()
    needed = requires(entry.needs, "stats")
    loaded = CalibrationStatistics.load(stats) if stats is not None and needed else None
    if loaded is not None:
        loaded.verify(network)
    loader = source.loader()
    if needed and loaded is None:
        loaded = calibrate(
            network,
            loader,
            target=None if target == "none" else target,
            max_images=None,
            gradients=requires(entry.needs, "gradient-stats"),
            consumers=any(name not in ("bn", "none") for name in repair.replace("+", ",").split(",")),
            progress=progress,
        )
    test = None if evaluation is None else evaluation.loader()
    before = None if test is None else accuracy(network, test, progress=progress)
    importance: str | Importance = score
    if steps == 1 or entry.seeded:  # by name it is built anew for every step, but without a seed
        importance = make_importance(score, stats=loaded, model=network, loader=loader, seed=seed, progress=progress)
    result = prune_to_flops(
        network,
        split_batch(next(iter(loader)))[0][:1],
        importance,
        flops=flops,
        steps=steps,
        stats=loaded if isinstance(importance, str) else None,
        repair=() if repair == "none" else (names(repair.replace("+", ",")) or ()),
        loader=loader,
        ignored_layers=names(ignore) or (),
        min_keep=min_keep,
        round_to=round_to,
        attention=attention,  # type: ignore[arg-type]  # it says which there are
        max_images=None,
        latency=latency,
        progress=progress,
    )
    # gradients of `taylor` are of no use any more
    unwrap(network).zero_grad(set_to_none=True)
    notes = model_options.notes()
    # the class alone would not tell l1 from l2
    result = dataclasses.replace(result, importance=score, notes=[*result.notes, *notes])
    measured: dict[str, Any] | None = None
    if test is not None and before is not None and evaluation is not None:
        after, count = accuracy(network, test, progress=progress)
        measured = {"before": before[0], "after": after, "images": count, "split": evaluation.split}
    save_pruned(network, out, result)
    payload = json.dumps(
        {"model": model, "out": str(out), "score": score, "accuracy": measured, "report": json.loads(result.to_json())}
    )
    if report is not None:
        write_bytes(report, f"{payload}\n".encode())
    if json_output:
        typer.echo(payload)
        return
    typer.echo(str(result))
    if measured is not None:
        typer.echo(
            f"top-1 accuracy on {measured['images']} images ({measured['split']}): "
            f"{measured['before']:.2%} before, {measured['after']:.2%} after, without fine-tuning"
        )
    typer.echo(f"wrote {out}" + (f" and {report}" if report is not None else ""))
