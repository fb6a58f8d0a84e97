"""``tp-twoaxis stability``: what other calibration images would change, and whether there are enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from tp_twoaxis.cli import completion
from tp_twoaxis.cli.option_groups import panel
from tp_twoaxis.cli.options import DataOptions, ModelOptions, OutputOptions, StatisticsOptions, noted
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.known_names import ALIASES, SCORES, check_criterion

_first, _stability = panel(None), panel("Stability")


def stability_command(
    *,
    model: ModelOptions,
    source: DataOptions,
    score: Annotated[
        str,
        _first(
            "Score in question, of a layer's statistics: capture, hull or another that `tp-twoaxis scores` lists.",
            autocompletion=completion.one_of(SCORES),
        ),
    ] = ALIASES["local"],
    shards: Annotated[int, _stability("Parts that the images are split into.", min=2)] = 8,
    resamples: Annotated[int, _stability("Bootstrap resamples of the shards.", min=2)] = 200,
    level: Annotated[float, _stability("Level of the intervals.")] = 0.95,
    reliability: Annotated[
        float, _stability("Rank correlation that two calibration sets of this size shall have.")
    ] = 0.95,
    statistics: StatisticsOptions,
    plot: Annotated[Path | None, _first("Draw both tables to a PNG.")] = None,
    output: OutputOptions,
) -> None:
    """Say how far scores and ranks would move with other calibration images, and whether these are enough.

    One pass over the images, in shards: a bootstrap over them gives an interval for every channel's score, and
    disjoint halves give the reliability of the ranks and the number of images that would reach --reliability.
    """
    check_criterion(score)
    for option, share in (("--level", level), ("--reliability", reliability)):
        if not 0.0 < share < 1.0:
            raise TwoAxisError(f"{option}: expected a number between 0 and 1, got {share:g}; 0.95 is usual")
    output.check(plot)

    from tp_twoaxis.diagnostics import calibration_is_enough, score_stability
    from tp_twoaxis.importance import find_criterion, layer_score
    from tp_twoaxis.statistics import calibrate_shards

    layer_score(score)  # refuses criteria that only rank groups
    score = find_criterion(score).name
    network, loader = model.build(), source.loader()
    parts = calibrate_shards(
        network,
        loader,
        shards=shards,
        seed=source.seed,
        max_images=None,
        progress=output.progress,
        **statistics.keywords(),
    )
    seed, progress = source.seed, output.progress
    size = calibration_is_enough(parts, score, reliability=reliability, seed=seed, progress=progress)
    stability = score_stability(parts, score, resamples=resamples, level=level, seed=seed, progress=progress)
    if plot is not None:
        from tp_twoaxis.diagnostics.plots import write_figure
        from tp_twoaxis.diagnostics.stability_figure import prunable_layers, stability_figure
        from tp_twoaxis.runtime.batches import split_batch

        image = split_batch(next(iter(loader)))[0][:1].to(model.device)
        prunable = prunable_layers(network, image)
        write_figure(stability_figure(stability, size, prunable), plot)
    output.show(
        {
            "model": model.model,
            "stability": json.loads(stability.to_json()),
            "size": json.loads(size.to_json()),
            "plot": None if plot is None else str(plot),
            "notes": model.notes(),
        },
        f"{stability}\n\n{size}",
        *noted(model.notes()),
        *([] if plot is None else [f"wrote {plot}"]),
    )
