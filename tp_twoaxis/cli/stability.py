"""``tp-twoaxis stability``: what other calibration images would change, and whether there are enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tp_twoaxis.cli import options as opt
from tp_twoaxis.cli.calibrate import position_rule
from tp_twoaxis.cli.inputs import DataOptions, ModelOptions, check_outputs, names, show_progress
from tp_twoaxis.diagnostics import calibration_is_enough, score_stability
from tp_twoaxis.scores.registry import DEFAULT_SCORE, SCORES, find_score
from tp_twoaxis.statistics.shards import calibrate_shards

_STABILITY = "Stability"


def stability_command(
    model: opt.Model,
    data: opt.Data,
    score: Annotated[
        str, typer.Option(help=f"Score in question: {', '.join(SCORES)}.", rich_help_panel=_STABILITY)
    ] = DEFAULT_SCORE,
    shards: Annotated[
        int, typer.Option(help="Parts that the images are dealt into.", rich_help_panel=_STABILITY, min=2)
    ] = 8,
    resamples: Annotated[
        int, typer.Option(help="Bootstrap resamples of the shards.", rich_help_panel=_STABILITY, min=2)
    ] = 200,
    level: Annotated[float, typer.Option(help="Level of the intervals.", rich_help_panel=_STABILITY)] = 0.95,
    reliability: Annotated[
        float,
        typer.Option(
            help="Rank correlation that two calibration sets of this size shall have.", rich_help_panel=_STABILITY
        ),
    ] = 0.95,
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
    layers: opt.Layers = None,
    positions: opt.Positions = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw both tables to a PNG.", rich_help_panel="Output")] = None,
    json_output: opt.Json = False,
    force: opt.Force = False,
) -> None:
    """Say how far scores and ranks would move with other calibration images, and whether these are enough.

    One pass over the images, in shards: a bootstrap over them gives an interval for every channel's score, and
    disjoint halves give the reliability of the ranks and the number of images that would reach --reliability.
    """
    find_score(score)
    where = position_rule(positions)
    check_outputs(force, plot)
    source = DataOptions(data, split, images, batch_size, workers, seed, image_size, mean, std, label_column)
    model_options = ModelOptions(model, checkpoint, num_classes, pretrained, device)
    progress = show_progress(json_output)
    parts = calibrate_shards(
        model_options.build(),
        source.loader(),
        shards=shards,
        seed=seed,
        target=None if target == "none" else target,
        layers=names(layers),
        max_images=None,
        positions=where,
        progress=progress,
    )
    size = calibration_is_enough(parts, score, reliability=reliability, seed=seed, progress=progress)
    stability = score_stability(parts, score, resamples=resamples, level=level, seed=seed, progress=progress)
    if plot is not None:
        from tp_twoaxis.diagnostics.figures import stability_figure
        from tp_twoaxis.plots import write_figure

        write_figure(stability_figure(stability, size), plot)
    notes = model_options.notes()
    if json_output:
        payload = {
            "model": model,
            "stability": json.loads(stability.to_json()),
            "size": json.loads(size.to_json()),
            "plot": None if plot is None else str(plot),
            "notes": notes,
        }
        typer.echo(json.dumps(payload))
        return
    typer.echo(f"{stability}\n\n{size}")
    for note in notes:
        typer.echo(f"note: {note}")
    if plot is not None:
        typer.echo(f"wrote {plot}")
