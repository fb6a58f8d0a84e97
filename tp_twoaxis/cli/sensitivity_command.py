"""``tp-twoaxis sensitivity``: which groups of channels can go, and at what price, without pruning anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from tp_twoaxis.cli.option_groups import panel
from tp_twoaxis.cli.option_values import names
from tp_twoaxis.cli.options import DataOptions, ModelOptions, OutputOptions
from tp_twoaxis.errors import TwoAxisError, check_name
from tp_twoaxis.known_names import ATTENTION_UNITS

_sensitivity, _output = panel("Sensitivity"), panel("Output")


def sensitivity_command(
    *,
    model: ModelOptions,
    source: DataOptions,
    levels: Annotated[int, _sensitivity("Points of each group's curve, beside all but one channel.", min=1)] = 8,
    measure_images: Annotated[
        int, _sensitivity("Images to measure on, at most; up to three times as many others serve the fits.", min=2)
    ] = 128,
    passes: Annotated[float, _sensitivity("Bound on the cost, in passes of one image.", min=1)] = 4000,
    price: Annotated[float, _sensitivity("Distortion that each group may cost in the summary.")] = 0.01,
    attention: Annotated[str, _sensitivity("What attention loses: heads, or head-dims of every head.")] = "heads",
    ignore: Annotated[str | None, _sensitivity("Layers that keep their channels: conv1,fc.")] = None,
    out: Annotated[Path | None, _output("Folder for both tables (CSV), curves (JSON) and the figure (PNG).")] = None,
    output: OutputOptions,
) -> None:
    """Measure for every group of channels how far the repaired network's logits move when a share of it is missing.

    Nothing is pruned. Each group is taken by itself: errors of several groups add up. Labels are not used.
    """
    if not price > 0.0:
        raise TwoAxisError(f"--price: expected a distortion above 0, got {price:g}; 0.01 is usual")
    check_name("--attention", attention, ATTENTION_UNITS)
    output.check(folder=out)

    from tp_twoaxis.diagnostics import sensitivity
    from tp_twoaxis.runtime.batches import split_batch

    loader = source.loader()
    report = sensitivity(
        model.build(),
        split_batch(next(iter(loader)))[0][:1],
        loader,
        levels=levels,
        images=measure_images,
        passes=passes,
        price=price,
        ignored_layers=names(ignore) or (),
        attention=attention,  # type: ignore[arg-type]  # checked above
        max_images=None,
        progress=output.progress,
    )
    report.notes.extend(model.notes())
    if out is not None:
        from tp_twoaxis.diagnostics.sensitivity_figure import write_sensitivity

        write_sensitivity(report, out)
    payload = {"model": model.model, "out": None if out is None else str(out), **json.loads(report.to_json())}
    output.show(payload, str(report), *([] if out is None else [f"wrote {out}"]))
