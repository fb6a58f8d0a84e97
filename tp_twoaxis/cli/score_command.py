"""``tp-twoaxis score``: every channel on both axes, as a table and as pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tp_twoaxis.cli import completion
from tp_twoaxis.cli.option_groups import omit, panel
from tp_twoaxis.cli.option_values import names
from tp_twoaxis.cli.options import MODEL_HELP, DataOptions, OutputOptions, StatisticsOptions, WeightOptions, noted
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.known_names import ALIASES, SCORES, check_criterion

# a summary's row shall fit a terminal's line
_SHORT = {
    "channels": "n",
    "constant": "const",
    "hull_explanation": "hull E",
    "one_peer": "1 peer",
    "target_excess": "excess",
    "rank_correlation": "rank corr",
}
_first, _output = panel(None), panel("Output")


def score_command(
    *,
    model: Annotated[
        str | None,
        typer.Argument(help=f"{MODEL_HELP} With --stats optional: then the statistics are checked against it."),
    ] = None,
    stats: Annotated[Path | None, _first("Statistics that `calibrate` wrote.")] = None,
    score: Annotated[
        str,
        _first(
            "Score of the last column: capture, hull or another of a layer that `tp-twoaxis scores` lists.",
            autocompletion=completion.one_of(SCORES),
        ),
    ] = ALIASES["local"],
    out: Annotated[Path | None, _first("Write the table: .csv or .parquet.")] = None,
    plot: Annotated[Path | None, _first("Folder for a scatter plot of each layer and an overview.")] = None,
    full: Annotated[
        bool, _output("Print every channel; on a terminal the default is a row a layer.", "--full")
    ] = False,
    weights: WeightOptions,
    source: DataOptions | None,
    statistics: Annotated[StatisticsOptions, omit("positions")],
    output: OutputOptions,
) -> None:
    """Show every channel on both axes, from saved statistics or by calibrating on the fly.

    Columns: variance; capture, the input capture I in nats; overlap, the mean overlap R with the peers in nats;
    hull_size and hull_explanation, how few peers predict how much (E, 0 to 1); rayleigh_quotient; task_mi, the
    task information M in nats; target_excess X and target_redundancy in nats; and the chosen score, larger keeps.
    """
    check_criterion(score)
    output.check(out, folder=plot)
    if model is None and (weights.checkpoint is not None or weights.pretrained):
        raise TwoAxisError("--checkpoint and --pretrained: expected a MODEL to load them into, got none; name it first")
    if (stats is None) == (source is None):
        given = "neither" if stats is None else "both"
        raise TwoAxisError(f"expected --stats or --data, got {given}; give one")

    from tp_twoaxis.diagnostics.channel_table import channel_table, check_suffix, layer_summary, records, write_table
    from tp_twoaxis.importance import PruningState, find_criterion, layer_score
    from tp_twoaxis.statistics import CalibrationStatistics

    layer_score(score)  # refuses criteria that only rank groups
    score = find_criterion(score).name
    if out is not None:
        check_suffix(out)
    network = None if model is None else weights.of(model).build()
    if stats is not None:
        gathered = CalibrationStatistics.load(stats)
        if network is not None:
            gathered.verify(network)
    elif network is None or source is None:
        raise TwoAxisError("--data: expected a MODEL to calibrate, got none; name it first")
    else:  # layers restrict what is recorded, or else what is shown
        state = PruningState(
            network, source.loader(), **statistics.keywords(), max_images=None, progress=output.progress
        )
        gathered = state.statistics()
    table = channel_table(gathered, score, layers=names(statistics.layers))
    written = []
    if out is not None:
        write_table(table, out)
        written.append(out)
    if plot is not None:
        from tp_twoaxis.diagnostics.plots import write_plots

        written += write_plots(table, plot)
    notes = [] if model is None or source is None else weights.of(model).notes()
    # a pipe gets every channel, a person at a terminal a page
    everything = full or not sys.stdout.isatty()
    shown = table if everything else layer_summary(table).rename(columns=_SHORT)
    legend = (
        f"\n{len(table)} channels. Means by layer: capture, overlap, task_mi, excess in nats; 1 peer: share "
        "of channels that one peer replaces; rank corr: of capture with task_mi. --full prints every channel."
    )
    output.show(
        {
            "score": score,
            "target": gathered.target,
            "images": gathered.num_images,
            "layers": records(layer_summary(table)),
            "channels": records(table),
            "written": [str(path) for path in written],
            "notes": notes,
        },
        shown.to_string(index=False, float_format=lambda value: f"{value:.3g}", na_rep="-"),
        *([] if everything else [legend]),
    )
    if not output.json_output:
        more = f" and {len(written) - 1} more" if len(written) > 1 else ""
        for line in [*(f"wrote {path}{more}" for path in written[:1]), *noted(notes)]:
            typer.echo(line, err=True)
