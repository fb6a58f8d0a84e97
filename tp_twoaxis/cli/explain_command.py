"""``tp-twoaxis explain``: what a layer's peers can replace, in words, as a table and as a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from tp_twoaxis.cli import completion
from tp_twoaxis.cli.held_out import calibration_and_held_out
from tp_twoaxis.cli.option_groups import omit, override, panel
from tp_twoaxis.cli.option_values import names
from tp_twoaxis.cli.options import DataOptions, EvaluationOptions, ModelOptions, OutputOptions, StatisticsOptions
from tp_twoaxis.errors import TwoAxisError, check_name
from tp_twoaxis.known_names import REMOVALS

if TYPE_CHECKING:
    from tp_twoaxis.diagnostics.explain import Removal

_first, _explain = panel(None), panel("Explanation")


@dataclass(frozen=True, kw_only=True)
class ExplanationOptions:
    """What is explained, and how; channels must be numbers, and the removal one of two."""

    channel: Annotated[
        str | None,
        _first("Channels to explain in detail: 13,14; each is removed once. Default an overview of the layer."),
    ] = None
    lesion_images: Annotated[int, _explain("Images to measure lesions on, none of --images.", min=1)] = 1000
    removal: Annotated[
        str,
        _explain("What stands in a removed channel's place: mean, zero.", autocompletion=completion.one_of(REMOVALS)),
    ] = "mean"
    peers: Annotated[int, _explain("Peers that predict a channel, at most.", min=1)] = 8

    def __post_init__(self) -> None:
        parts = names(self.channel)
        if parts is not None and not (parts and all(part.isdecimal() for part in parts)):
            raise TwoAxisError(f"--channel: expected numbers such as 13,14, got {self.channel!r}")
        check_name("--removal", self.removal, REMOVALS)

    @property
    def channels(self) -> list[int] | None:
        """The channels to explain in detail; None for an overview."""
        return None if self.channel is None else [int(part) for part in names(self.channel) or ()]


def explain_command(
    *,
    model: ModelOptions,
    layer: Annotated[str, typer.Argument(help="Layer to explain: layer1.0.conv1.", show_default=False)],
    explanation: ExplanationOptions,
    evaluation: Annotated[
        EvaluationOptions,
        omit("eval_images"),
        override(
            eval_split=_first(
                "Split of the lesions' images; damage is small on images learnt by heart. Default --split."
            ),
            eval_data=_explain("Where they are, if not in --data: then a file of its own."),
        ),
    ],
    stats: Annotated[Path | None, _first("Statistics that `calibrate` wrote, instead of --images.")] = None,
    source: DataOptions | None,
    statistics: Annotated[StatisticsOptions, omit("layers", "positions", "pooling")],
    out: Annotated[Path | None, _first("Write one HTML file that opens offline.")] = None,
    png: Annotated[Path | None, _first("Write the two axes with the channels marked.")] = None,
    output: OutputOptions,
) -> None:
    """Say which peers can replace a channel, how well, what it tells of the task, and what its removal costs.

    Images of the statistics and of the lesions are drawn at random and do not overlap. Time: one pass over
    --images, and over --lesion-images two passes a channel and one more.
    """
    output.check(out, png)
    if source is None and (stats is None or explanation.channels is not None):
        what = "the lesions" if stats is not None else "the statistics"
        raise TwoAxisError(f"--data: {what} need images, got none; name them")

    from tp_twoaxis.diagnostics.explain import explain
    from tp_twoaxis.runtime.layers import channel_layers
    from tp_twoaxis.runtime.serialization import write_bytes
    from tp_twoaxis.statistics import CalibrationStatistics, calibrate

    network = model.build()
    channel_layers(network, [layer])  # a typo is refused before images are read
    gathered = None if stats is None else CalibrationStatistics.load(stats)
    if png is not None and (statistics.task_variable if gathered is None else gathered.target) is None:
        raise TwoAxisError("--png: the picture needs two axes, the statistics have no target; leave it out")
    score_loader = lesion_loader = None
    notes: list[str] = []
    if source is not None:
        others = None
        if evaluation.eval_data is not None or evaluation.eval_split not in (None, source.split):
            others = replace(evaluation, eval_images=explanation.lesion_images).beside(source)
        held_out = 0 if explanation.channels is None else explanation.lesion_images
        score_loader, lesion_loader, notes = calibration_and_held_out(source, others, held_out, score=gathered is None)
    if gathered is None:
        gathered = calibrate(
            network,
            score_loader or (),
            target=statistics.task_variable,
            layers=[layer],
            max_images=None,
            progress=output.progress,
        )
    result = explain(
        network,
        layer,
        lesion_loader,
        stats=gathered,
        channels=explanation.channels,
        removal=cast("Removal", explanation.removal),
        peers=explanation.peers,
        progress=output.progress,
    )
    result = replace(result, notes=[*result.notes, *notes, *model.notes()])
    written = [path for path in (png, out) if path is not None]
    if written:
        from tp_twoaxis.diagnostics.explain_page import explanation_figure, explanation_html
        from tp_twoaxis.diagnostics.html_page import png_bytes

        files = {} if png is None else {png: png_bytes(explanation_figure(result))}
        files |= {} if out is None else {out: explanation_html(result).encode()}
        for path, content in files.items():
            write_bytes(path, content)
    output.show(json.loads(result.to_json()), str(result))
    if written and not output.json_output:
        typer.echo("wrote " + " and ".join(map(str, written)), err=True)
