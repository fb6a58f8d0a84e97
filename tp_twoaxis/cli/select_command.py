"""``tp-twoaxis select``: which score to prune this network by."""

from __future__ import annotations

import json
from typing import Annotated

from tp_twoaxis.cli import completion
from tp_twoaxis.cli.option_groups import omit, override, panel
from tp_twoaxis.cli.option_values import names, numbers
from tp_twoaxis.cli.options import DataOptions, ModelOptions, PruningOptions, ReportOptions, StatisticsOptions, noted
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.known_names import check_criteria

_first, _selection = panel(None), panel("Selection")


def select_command(
    *,
    model: ModelOptions,
    source: DataOptions,
    flops: Annotated[str, _first("Shares of the MACs to keep: 0.5, or 0.7,0.5.")] = "0.5",
    candidates: Annotated[
        str,
        _first(
            "What to try, of what `tp-twoaxis scores` lists; all-local, all-target, all-baselines and all stand for "
            "several.",
            autocompletion=completion.criteria,
        ),
    ] = "all-local",
    exclude: Annotated[str | None, _selection("Candidates to leave out.", autocompletion=completion.criteria)] = None,
    held_out: Annotated[float, _selection("Share of the images that judge; the others calibrate.")] = 0.5,
    pruning: Annotated[PruningOptions, override(repair="bn")],
    statistics: Annotated[StatisticsOptions, omit("layers", "positions", "pooling")],
    output: ReportOptions,
) -> None:
    """Try scores on copies of the network and judge them on images held out of the calibration; changes nothing.

    Training images are enough: keep test images for the end. Continue with: tp-twoaxis prune --score BEST.
    """
    included, excluded = names(candidates) or [], names(exclude) or []
    check_criteria([*included, *excluded])
    output.check(output.report)
    shares = numbers("--flops", flops) or []

    from tp_twoaxis.pruning import select_score
    from tp_twoaxis.runtime.batches import split_batch

    chosen = _candidates(included, excluded)
    network = model.build()
    pruning.check(network)
    loader = source.loader()
    result = select_score(
        network,
        split_batch(next(iter(loader)))[0][:1],
        loader,
        chosen,
        flops=shares,
        held_out=held_out,
        max_images=None,
        target=statistics.task_variable,
        seed=source.seed,
        progress=output.progress,
        **pruning.keywords(),
    )
    notes = model.notes()
    output.show(
        {"model": model.model, **json.loads(result.to_json()), "notes": notes},
        str(result),
        *noted(notes),
        *([] if output.report is None else [f"wrote {output.report}"]),
    )


def _candidates(candidates: list[str], exclude: list[str]) -> list[str]:
    from tp_twoaxis.importance import expand_criteria

    included, excluded = expand_criteria(candidates), expand_criteria(exclude)
    if unknown := [name for name in excluded if name not in included]:
        raise TwoAxisError(f"--exclude: {unknown[0]!r} is no candidate; they are {', '.join(included)}")
    return [name for name in included if name not in excluded]
