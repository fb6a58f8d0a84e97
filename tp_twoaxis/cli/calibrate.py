"""``tp-twoaxis calibrate``: statistics to a file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, cast

import typer

from tp_twoaxis.cli import options as opt
from tp_twoaxis.cli.inputs import DataOptions, ModelOptions, check_outputs, names, show_progress, statistics
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.recorder import Positions


def calibrate_command(
    model: opt.Model,
    data: opt.Data,
    out: Annotated[
        Path, typer.Option(help="Statistics file, .safetensors.", rich_help_panel="Output", show_default=False)
    ],
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
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients", help="Also gather gradients, for cap-qgw; needs labels.", rich_help_panel="Statistics"
        ),
    ] = False,
    json_output: opt.Json = False,
    force: opt.Force = False,
) -> None:
    """Run images through a trained model once and write what the scores need."""
    check_outputs(force, out)
    where = position_rule(positions)
    model_options = ModelOptions(model, checkpoint, num_classes, pretrained, device)
    source = DataOptions(data, split, images, batch_size, workers, seed, image_size, mean, std, label_column)
    start = time.perf_counter()
    stats = statistics(
        model_options.build(),
        None,
        source,
        show_progress(json_output),
        target=None if target == "none" else target,
        layers=names(layers),
        positions=where,
        gradients=gradients,
    )
    stats.save(out)
    seconds = time.perf_counter() - start
    if json_output:
        payload = {
            "model": model,
            "out": str(out),
            "images": stats.num_images,
            "target": stats.target,
            "seconds": round(seconds, 3),
            "layers": [
                {"name": s.name, "kind": s.kind, "channels": s.num_channels, "rows": s.num_rows}
                for s in stats.layers.values()
            ],
            "notes": model_options.notes(),
        }
        typer.echo(json.dumps(payload))
        return
    channels = sum(s.num_channels for s in stats.layers.values())
    typer.echo(
        f"calibrated {channels} channels of {len(stats)} layers on {stats.num_images} images in {seconds:.1f} s, "
        f"target: {stats.target or 'none'}"
    )
    typer.echo(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    for note in model_options.notes():
        typer.echo(f"note: {note}")


def position_rule(text: str) -> Positions:
    """Read ``auto``, ``all`` or a number.

    Raises:
        TwoAxisError: it is none of these.

    Example:
        >>> position_rule("16")
        16
    """
    if text in ("auto", "all"):
        return cast(Positions, text)
    if not text.isdecimal() or int(text) < 1:
        raise TwoAxisError(f"--positions: expected auto, all or a positive number, got {text!r}")
    return int(text)
