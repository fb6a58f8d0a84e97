"""``tp-twoaxis explain``: what a layer's peers can replace, in words, as a table and as a picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch.utils.data import Subset

from tp_twoaxis.cli import options as opt
from tp_twoaxis.cli.inputs import DataOptions, ModelOptions, check_outputs, evaluation_options, names, show_progress
from tp_twoaxis.data import ArrayDataset, make_loader
from tp_twoaxis.diagnostics.explain import Removal, explain
from tp_twoaxis.diagnostics.peers import PEERS
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.files import write_bytes
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.layers import channel_layers
from tp_twoaxis.statistics.store import CalibrationStatistics

_EXPLAIN = "Explanation"


def explain_command(
    model: opt.Model,
    layer: Annotated[str, typer.Argument(help="Layer to explain: layer1.0.conv1.", show_default=False)],
    channel: Annotated[
        str | None,
        typer.Option(
            help="Channels to explain in detail: 13,14; each is removed once. Default an overview of the layer.",
            rich_help_panel=_EXPLAIN,
        ),
    ] = None,
    lesion_images: Annotated[
        int, typer.Option(help="Images to measure lesions on, none of --images.", rich_help_panel=_EXPLAIN, min=1)
    ] = 1000,
    eval_split: Annotated[
        str | None,
        typer.Option(
            help="Split of the lesions' images; damage is small on images learnt by heart. Default --split.",
            rich_help_panel=_EXPLAIN,
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(help="Where they are, if not in --data: then a file of its own.", rich_help_panel=_EXPLAIN),
    ] = None,
    removal: Annotated[
        str, typer.Option(help="What stands in a removed channel's place: mean, zero.", rich_help_panel=_EXPLAIN)
    ] = "mean",
    peers: Annotated[
        int, typer.Option(help="Peers that predict a channel, at most.", rich_help_panel=_EXPLAIN, min=1)
    ] = PEERS,
    checkpoint: opt.Checkpoint = None,
    num_classes: opt.NumClasses = None,
    pretrained: opt.Pretrained = False,
    device: opt.Device = "cpu",
    stats: Annotated[
        Path | None,
        typer.Option(help="Statistics that `calibrate` wrote, instead of --images.", rich_help_panel="Statistics"),
    ] = None,
    data: opt.OptionalData = None,
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
    out: Annotated[
        Path | None, typer.Option(help="Write one HTML file that opens offline.", rich_help_panel="Output")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write the two axes with the channels marked.", rich_help_panel="Output")
    ] = None,
    json_output: opt.Json = False,
    force: opt.Force = False,
) -> None:
    """Say which peers can replace a channel, how well, what it tells of the task, and what its removal costs.

    Images of the statistics and of the lesions are drawn at random and do not overlap. Time: one pass over
    --images, and over --lesion-images two passes a channel and one more.
    """
    check_outputs(force, out, png)
    wanted = _channels(channel)
    if removal not in ("mean", "zero"):
        raise TwoAxisError(f"--removal: expected mean or zero, got {removal!r}")
    if data is None and (stats is None or wanted is not None):
        what = "the lesions" if stats is not None else "the statistics"
        raise TwoAxisError(f"--data: {what} need images, got none; name them")
    model_options = ModelOptions(model, checkpoint, num_classes, pretrained, device)
    network = model_options.build()
    channel_layers(network, [layer])  # a typo is told before images are read
    progress = show_progress(json_output)
    gathered = None if stats is None else CalibrationStatistics.load(stats)
    if png is not None and (target == "none" if gathered is None else gathered.target is None):
        raise TwoAxisError("--png: the picture needs two axes, the statistics have no target; leave it out")
    score_loader = lesion_loader = None
    notes: list[str] = []
    if data is not None:
        source = DataOptions(data, split, images, batch_size, workers, seed, image_size, mean, std, label_column)
        others = None
        if eval_data is not None or eval_split not in (None, split):
            others = evaluation_options(source, eval_split, eval_data, lesion_images)
        held_out = 0 if wanted is None else lesion_images
        score_loader, lesion_loader, notes = _loaders(source, others, held_out, score=gathered is None)
    if gathered is None:
        gathered = calibrate(
            network,
            score_loader or (),
            target=None if target == "none" else target,
            layers=[layer],
            max_images=None,
            progress=progress,
        )
    result = explain(
        network,
        layer,
        lesion_loader,
        stats=gathered,
        channels=wanted,
        removal=cast(Removal, removal),
        peers=peers,
        progress=progress,
    )
    result = dataclasses.replace(result, notes=[*result.notes, *notes, *model_options.notes()])
    written = []
    if out is not None or png is not None:
        from tp_twoaxis.diagnostics.explain_page import explanation_figure, explanation_html
        from tp_twoaxis.html_page import png_bytes

        files = {} if png is None else {png: png_bytes(explanation_figure(result))}
        files |= {} if out is None else {out: explanation_html(result).encode()}
        for path, content in files.items():
            write_bytes(path, content)
            written.append(path)
    if json_output:
        typer.echo(result.to_json())
        return
    typer.echo(str(result))
    if written:
        typer.echo("wrote " + " and ".join(map(str, written)), err=True)


def _channels(text: str | None) -> list[int] | None:
    parts = names(text)
    if parts is None:
        return None
    if not parts or not all(part.isdecimal() for part in parts):
        raise TwoAxisError(f"--channel: expected numbers such as 13,14, got {text!r}")
    return [int(part) for part in parts]


def _loaders(
    source: DataOptions, others: DataOptions | None, held_out: int, *, score: bool
) -> tuple[Any, Any, list[str]]:
    """Images for the statistics and for the lesions, None where they are not needed; and what there is to note.

    Args:
        source: where images of the statistics are.
        others: where those of the lesions are, if not there too.
        held_out: how many images lesions are measured on; 0 without lesions.
        score: whether the statistics are still to be gathered.
    """
    if not held_out:
        return source.loader() if score else None, None, []
    if others is not None:
        return source.loader() if score else None, others.loader(), []
    if not score:
        note = "images of the lesions may be among those of --stats"
        return None, dataclasses.replace(source, images=held_out).loader(), [note]
    wanted = held_out + (source.images or 0)
    dataset = dataclasses.replace(source, images=wanted).open()
    notes = []
    if len(dataset) < wanted:  # of few images both get a share
        held_out = min(held_out, len(dataset) // 2)
        notes.append(f"{source.spec}: {len(dataset)} images, {held_out} of them for lesions")
    # what is drawn comes in the data's order, which is often by class
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(source.seed))
    rows = order[held_out:].sort().values, order[:held_out].sort().values
    if isinstance(dataset, ArrayDataset):
        loaders: list[Any] = [dataset.loader(source.batch_size, part) for part in rows]
    else:
        parts = (Subset(dataset, part.tolist()) for part in rows)
        loaders = [make_loader(part, source.batch_size, workers=source.workers) for part in parts]
    return loaders[0], loaders[1], notes
