"""``tp-twoaxis calibrate``: statistics to a file."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

from tp_twoaxis.cli import completion
from tp_twoaxis.cli.option_groups import panel
from tp_twoaxis.cli.options import DataOptions, ModelOptions, OutputOptions, StatisticsOptions, noted
from tp_twoaxis.known_names import check_criterion

_first, _statistics = panel(None), panel("Statistics")


def calibrate_command(
    *,
    model: ModelOptions,
    source: DataOptions,
    out: Annotated[Path, _first("Statistics file, .safetensors.", show_default=False)],
    statistics: StatisticsOptions,
    score: Annotated[
        str | None,
        _first(
            "Gather also what this criterion needs, such as anticipating or cap-qgw.",
            autocompletion=completion.criterion,
        ),
    ] = None,
    gradients: Annotated[bool, _statistics("Also gather gradients, for cap-qgw; needs labels.", "--gradients")] = False,
    output: OutputOptions,
) -> None:
    """Run images through a trained model once and write what the scores need.

    On several GPUs, each with its share of the images: torchrun --nproc-per-node 4 -m tp_twoaxis calibrate ...
    --device cuda.
    """
    if score is not None:
        check_criterion(score)
    output.check(out)

    from tp_twoaxis.importance import PruningState, find_criterion
    from tp_twoaxis.runtime.distributed import process_group

    extras = () if score is None else find_criterion(score).extras
    start = time.perf_counter()
    with process_group(model.device) as process:
        network = dataclasses.replace(model, device=process.device).build()
        loader = source.loader(process.rank, process.world_size)
        progress = output.progress and process.rank == 0
        state = PruningState(network, loader, **statistics.keywords(), max_images=None, progress=progress)
        stats = state.statistics(*extras, also=("gradients",) if gradients else ()).all_reduce()
    if process.rank:
        return
    stats.save(out)
    seconds = time.perf_counter() - start
    channels = sum(s.num_channels for s in stats.layers.values())
    output.show(
        {
            "model": model.model,
            "out": str(out),
            "images": stats.num_images,
            "target": stats.target,
            "seconds": round(seconds, 3),
            "layers": [
                {"name": s.name, "kind": s.kind, "channels": s.num_channels, "rows": s.num_rows}
                for s in stats.layers.values()
            ],
            "notes": model.notes(),
        },
        f"calibrated {channels} channels of {len(stats)} layers on {stats.num_images} images in {seconds:.1f} s, "
        f"target: {stats.target or 'none'}",
        f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)",
        *noted(model.notes()),
    )
