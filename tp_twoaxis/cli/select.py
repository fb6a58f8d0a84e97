"""``tp-twoaxis select``: which score to prune this network by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tp_twoaxis.batches import split_batch
from tp_twoaxis.cli import options as opt
from tp_twoaxis.cli.inputs import DataOptions, ModelOptions, check_outputs, names, numbers, show_progress
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.files import write_bytes
from tp_twoaxis.importance.registry import IMPORTANCES, find_importance
from tp_twoaxis.pruning.selection import select_score
from tp_twoaxis.scores.registry import LOCAL_FAMILY

_SELECTION, _PRUNING = "Selection", "Pruning"


def select_command(
    model: opt.Model,
    data: opt.Data,
    flops: Annotated[
        str, typer.Option(help="Shares of the MACs to keep: 0.5, or 0.7,0.5.", rich_help_panel=_SELECTION)
    ] = "0.5",
    candidates: Annotated[
        str,
        typer.Option(
            help=f"What to try: {', '.join(IMPORTANCES)}; local stands for {', '.join(LOCAL_FAMILY)}.",
            rich_help_panel=_SELECTION,
        ),
    ] = "local",
    exclude: Annotated[str | None, typer.Option(help="Candidates to leave out.", rich_help_panel=_SELECTION)] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the images that judge; the others calibrate.", rich_help_panel=_SELECTION)
    ] = 0.5,
    repair: Annotated[
        str,
        typer.Option(help="bn re-estimates BatchNorm statistics on the images; none.", rich_help_panel=_PRUNING),
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
    report: Annotated[
        Path | None, typer.Option(help="Write what --json prints to a file.", rich_help_panel="Output")
    ] = None,
    json_output: opt.Json = False,
    force: opt.Force = False,
) -> None:
    """Try scores on copies of the network and judge them on images held out of the calibration; changes nothing.

    Training images are enough: keep test images for the end. Continue with: tp-twoaxis prune --score BEST.
    """
    wanted = _wanted(candidates, exclude)
    check_outputs(force, report)
    shares = numbers("--flops", flops) or []
    source = DataOptions(data, split, images, batch_size, workers, seed, image_size, mean, std, label_column)
    model_options = ModelOptions(model, checkpoint, num_classes, pretrained, device)
    network = model_options.build()
    loader = source.loader()
    result = select_score(
        network,
        split_batch(next(iter(loader)))[0][:1],
        loader,
        wanted,
        flops=shares,
        repair=() if repair == "none" else (names(repair) or ()),
        held_out=held_out,
        max_images=None,
        target=None if target == "none" else target,
        ignored_layers=names(ignore) or (),
        min_keep=min_keep,
        round_to=round_to,
        attention=attention,  # type: ignore[arg-type]  # it says which there are
        seed=seed,
        progress=show_progress(json_output),
    )
    notes = model_options.notes()
    payload = json.dumps({"model": model, **json.loads(result.to_json()), "notes": notes})
    if report is not None:
        write_bytes(report, f"{payload}\n".encode())
    if json_output:
        typer.echo(payload)
        return
    typer.echo(str(result))
    for note in notes:
        typer.echo(f"note: {note}")
    if report is not None:
        typer.echo(f"wrote {report}")


def _wanted(candidates: str, exclude: str | None) -> list[str]:
    named = names(candidates) or []
    wanted = [name for item in named for name in (LOCAL_FAMILY if item == "local" else (item,))]
    left_out = names(exclude) or []
    for name in (*wanted, *left_out):
        find_importance(name)
    if strangers := [name for name in left_out if name not in wanted]:
        raise TwoAxisError(f"--exclude: {strangers[0]!r} is no candidate; they are {', '.join(wanted)}")
    return [name for name in dict.fromkeys(wanted) if name not in left_out]
