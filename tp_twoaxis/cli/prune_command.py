"""``tp-twoaxis prune``: a smaller network, and what was lost."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tp_twoaxis.cli import completion
from tp_twoaxis.cli.option_groups import omit, panel
from tp_twoaxis.cli.options import (
    CRITERION_HELP,
    DataOptions,
    EvaluationOptions,
    ModelOptions,
    PruningOptions,
    ReportOptions,
    StatisticsOptions,
)
from tp_twoaxis.errors import TwoAxisError, check_name
from tp_twoaxis.known_names import AUTO, BUDGETS, check_criterion, parse_repair

_first, _pruning, _output = panel(None), panel("Pruning"), panel("Output")


@dataclass(frozen=True, kw_only=True)
class RemovalOptions:
    """How much is removed, and what ranks channels; unknown names and numbers out of range are refused."""

    flops: Annotated[float, _first("Share of the budget to keep, above 0 and up to 1.")] = 0.5
    budget: Annotated[
        str, _pruning("What --flops is a share of: macs, channels, or latency, measured on --device as it is.")
    ] = "macs"
    latency_batch: Annotated[int, _pruning("Images at once whose time --budget latency counts.", min=1)] = 1
    steps: Annotated[int, _pruning("Remove in so many steps; each scores the network that the last one left.")] = 1
    training_steps: Annotated[
        int, _pruning("Of --repair distill, which trains without labels after the last step.", min=1)
    ] = 1000
    score: Annotated[
        str,
        _first(
            f"auto: what keeps most; or {CRITERION_HELP.removeprefix('What ranks channels: ')}",
            autocompletion=completion.criterion,
        ),
    ] = AUTO
    stats: Annotated[Path | None, _first("Statistics that `calibrate` wrote; default calibrate now.")] = None

    def __post_init__(self) -> None:
        if self.score != AUTO:
            check_criterion(self.score)
        check_name("--budget", self.budget, BUDGETS)
        if not 0.0 < self.flops <= 1.0:
            raise TwoAxisError(
                f"--flops: expected the share of the budget to keep, above 0 and up to 1, got {self.flops:g}"
            )
        if self.steps < 1:
            raise TwoAxisError(f"--steps: expected a whole number of at least 1, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """What is written for people beside the network; pages of layers need the page that they are linked from."""

    html: Annotated[
        Path | None, _output("Write what was removed, who replaces it, how well and at what cost to an HTML file.")
    ] = None
    explain: Annotated[
        bool,
        _output("With --html, a page for each layer that lost channels, linked, in HTML_layers/.", "--explain"),
    ] = False
    card: Annotated[bool, _output("Write a model card beside OUT, with .md for its suffix.", "--card")] = False

    def __post_init__(self) -> None:
        if self.explain and self.html is None:
            raise TwoAxisError("--explain: expected --html REPORT.html, which links to the layers' pages; add it")

    @property
    def folder(self) -> Path | None:
        """Where the layers' pages go."""
        return self.html.with_name(f"{self.html.stem}_layers") if self.explain and self.html is not None else None


def prune_command(
    *,
    model: ModelOptions,
    source: DataOptions,
    out: Annotated[Path, _first("The pruned network, .safetensors.", show_default=False)],
    removal: RemovalOptions,
    pruning: PruningOptions,
    statistics: Annotated[StatisticsOptions, omit("layers", "positions")],
    evaluation: EvaluationOptions,
    latency: Annotated[
        bool, panel("Evaluation")("Time batches of 1 and of 64, before and after.", "--latency")
    ] = False,
    pages: PageOptions,
    output: ReportOptions,
) -> None:
    """Remove channels until a share of the MACs is left, repair, and write the smaller network.

    Load it again with tp_twoaxis.load_pruned, or hand it to --checkpoint.
    """
    beside = [out.with_suffix(".md") if pages.card else None, output.report, pages.html]
    written = [out, *(path for path in beside if path is not None)]
    output.check(*written, folder=pages.folder)

    from tp_twoaxis.importance import PruningState, find_criterion
    from tp_twoaxis.pruning import model_card, prune_to_flops, save_pruned
    from tp_twoaxis.pruning.recipe import choose_recipe
    from tp_twoaxis.repair import refits
    from tp_twoaxis.runtime.batches import split_batch
    from tp_twoaxis.runtime.model_state import unwrap
    from tp_twoaxis.statistics import CalibrationStatistics
    from tp_twoaxis.training.evaluation import accuracy

    if removal.score != AUTO:
        find_criterion(removal.score)  # wrong options are refused before the network is built
    test_source = evaluation.beside(source)
    network = model.build()
    pruning.check(network)
    loader = source.loader()
    stats, loaded = None, None if removal.stats is None else CalibrationStatistics.load(removal.stats)
    if loaded is not None:
        loaded.verify(network)
    images = split_batch(next(iter(loader)))[0]
    recipe = choose_recipe(network, images[:1], removal.score, pruning.named_repair, loader=loader, stats=loaded)
    criterion, repairs = find_criterion(str(recipe.importance)), parse_repair(recipe.repair)
    state = PruningState(
        network, loader, stats=loaded, **statistics.keywords(), max_images=None, progress=output.progress
    )
    read_again: tuple[Literal["consumers"], ...] = ("consumers",) if refits(repairs) else ()
    explained = state.statistics(*criterion.extras, also=read_again) if pages.explain else None
    if "statistics" in criterion.needs:
        stats = criterion.statistics(state, also=read_again)
    test = None if test_source is None else test_source.loader()
    before = None if test is None else accuracy(network, test, progress=output.progress)
    result = prune_to_flops(
        network,
        images[: removal.latency_batch if removal.budget == "latency" else 1],
        criterion.seeded(source.seed),
        flops=removal.flops,
        budget=removal.budget,  # type: ignore[arg-type]  # checked with the options
        steps=removal.steps,
        stats=stats,
        loader=loader,
        max_images=None,
        training_steps=removal.training_steps,
        latency=latency,
        other_counters=True,
        progress=output.progress,
        **{**pruning.keywords(), "repair": repairs},
    )
    # gradients of `taylor` are of no use any more
    unwrap(network).zero_grad(set_to_none=True)
    result = dataclasses.replace(
        result, importance=criterion.name, notes=[*recipe.notes, *result.notes, *model.notes()]
    )
    measured: dict[str, Any] | None = None
    lines = [str(result)]
    if test is not None and before is not None and test_source is not None:
        after, count = accuracy(network, test, progress=output.progress)
        measured = {"before": before[0], "after": after, "images": count, "split": test_source.split}
        lines.append(
            f"top-1 accuracy on {count} images ({test_source.split}): {before[0]:.2%} before, {after:.2%} after, "
            "without fine-tuning"
        )
    text: str | bool = False
    if pages.card:
        text = model_card(result, name=model.model, file=out.name, accuracy=measured, **model.factory())
    save_pruned(network, out, result, card=text)
    if pages.html is not None:
        from tp_twoaxis.diagnostics.pruning_page import write_pruning_page

        write_pruning_page(result, pages.html, name=model.model, accuracy=measured, stats=explained)
    output.show(
        {
            "model": model.model,
            "out": str(out),
            "score": criterion.name,
            "accuracy": measured,
            "report": json.loads(result.to_json()),
        },
        *lines,
        f"wrote {' and '.join(map(str, [*written, *([pages.folder] if pages.folder else [])]))}",
    )
