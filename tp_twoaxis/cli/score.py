"""``tp-twoaxis score``: every channel on both axes, as a table and as pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from tp_twoaxis.channel_table import channel_table, check_suffix, layer_summary, records, write_table
from tp_twoaxis.cli import options as opt
from tp_twoaxis.cli.inputs import DataOptions, ModelOptions, check_outputs, names, show_progress, statistics
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.scores.registry import DEFAULT_SCORE, SCORES, find_score

# a summary's row shall fit a terminal's line
_SHORT = {
    "channels": "n",
    "constant": "const",
    "hull_explanation": "hull E",
    "one_peer": "1 peer",
    "target_excess": "excess",
    "rank_correlation": "rank corr",
}


def score_command(
    model: opt.OptionalModel = None,
    stats: Annotated[
        Path | None, typer.Option(help="Statistics that `calibrate` wrote.", rich_help_panel="Statistics")
    ] = None,
    score: Annotated[
        str, typer.Option(help=f"Score of the last column: {', '.join(SCORES)}.", rich_help_panel="Output")
    ] = DEFAULT_SCORE,
    out: Annotated[
        Path | None, typer.Option(help="Write the table: .csv or .parquet.", rich_help_panel="Output")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Folder for a scatter plot of each layer and an overview.", rich_help_panel="Output"),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Print every channel; on a terminal the default is a row a layer.", rich_help_panel="Output"
        ),
    ] = False,
    checkpoint: opt.Checkpoint = None,
    num_classes: opt.NumClasses = None,
    pretrained: opt.Pretrained = False,
    device: opt.Device = "cpu",
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
    layers: opt.Layers = None,
    json_output: opt.Json = False,
    force: opt.Force = False,
) -> None:
    """Show every channel on both axes, from saved statistics or by calibrating on the fly.

    Columns: variance; capture, the input capture I in nats; overlap, the mean overlap R with the peers in nats;
    hull_size and hull_explanation, how few peers predict how much (E, 0 to 1); rayleigh_quotient; task_mi, the
    task information M in nats; target_excess X and target_redundancy in nats; and the chosen score, larger keeps.
    """
    find_score(score)
    if out is not None:
        check_suffix(out)
    check_outputs(force, out, folder=plot)
    if model is None and (checkpoint is not None or pretrained):
        raise TwoAxisError("--checkpoint and --pretrained: expected a MODEL to load them into, got none; name it first")
    model_options = None if model is None else ModelOptions(model, checkpoint, num_classes, pretrained, device)
    source = None
    if data is not None:
        source = DataOptions(data, split, images, batch_size, workers, seed, image_size, mean, std, label_column)
    # layers restrict what is recorded, or else what is shown
    recorded = {} if source is None else {"layers": names(layers)}
    gathered = statistics(
        None if model_options is None else model_options.build(),
        stats,
        source,
        show_progress(json_output),
        target=None if target == "none" else target,
        **recorded,
    )
    table = channel_table(gathered, score, layers=names(layers))
    written = []
    if out is not None:
        write_table(table, out)
        written.append(out)
    if plot is not None:
        from tp_twoaxis.plots import write_plots

        written += write_plots(table, plot)
    notes = [] if model_options is None or stats is not None else model_options.notes()
    if json_output:
        payload = {
            "score": score,
            "target": gathered.target,
            "images": gathered.num_images,
            "layers": records(layer_summary(table)),
            "channels": records(table),
            "written": [str(path) for path in written],
            "notes": notes,
        }
        typer.echo(json.dumps(payload))
        return
    # a pipe gets every channel, a person at a terminal a page
    everything = full or not sys.stdout.isatty()
    _print(table if everything else layer_summary(table).rename(columns=_SHORT))
    if not everything:
        typer.echo(
            f"\n{len(table)} channels. Means by layer: capture, overlap, task_mi, excess in nats; 1 peer: share "
            "of channels that one peer replaces; rank corr: of capture with task_mi. --full prints every channel."
        )
    if written:
        typer.echo(f"wrote {written[0]}" + (f" and {len(written) - 1} more" if len(written) > 1 else ""), err=True)
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def _print(table: pd.DataFrame) -> None:
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.3g}", na_rep="-"))
