"""``tp-twoaxis bench``: a comparison of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tp_twoaxis.cli import completion
from tp_twoaxis.cli.option_groups import omit, override, panel
from tp_twoaxis.cli.option_values import names, numbers
from tp_twoaxis.cli.options import MODEL_HELP, DataOptions, JsonOptions, WeightOptions
from tp_twoaxis.cli.report_command import report_lines, report_payload
from tp_twoaxis.errors import TwoAxisError, check_name
from tp_twoaxis.known_names import AMP, MODELS, check_criteria, parse_repair

if TYPE_CHECKING:
    # pandas and matplotlib: not for a help page
    from tp_twoaxis.benchmark.engines import Engine

_first, _data, _sweep, _scale = panel(None), panel("Data"), panel("Sweep"), panel("Scale")


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Which images judge a method, as keys of a config."""

    test_split: Annotated[str, _data("Split of the test images.")] = "test"
    test_images: Annotated[int | None, _data("Test images to draw; default all.", min=1)] = None
    selection_images: Annotated[int, _data("Training images to hold out for choices.", min=0)] = 0
    calibration_draw: Annotated[
        str, _data("Calibration images: fixed, the same for all seeds; or seed, others for each.")
    ] = "fixed"
    evaluate_on: Annotated[str, _data("What accuracies are measured on: test, selection.")] = "test"


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The methods, shares and seeds that are crossed; unknown names are refused, and what should be numbers."""

    methods: Annotated[
        str,
        _first(
            "Criteria: local,taylor,l2, entry points or module:factory; all, all-local, all-target, all-baselines.",
            autocompletion=completion.criteria,
        ),
    ] = "local,taylor,l2"
    allocation: Annotated[str, _sweep("Who decides how many: global, uniform.")] = "global"
    keep: Annotated[str, _first("Shares to keep.")] = "0.7,0.5,0.35"
    grid: Annotated[str, _sweep("What --keep is a share of: macs, or channels (the paper's levels).")] = "macs"
    repair: Annotated[
        str, _first("Repairs to cross with: none,bn; join several by a +.", autocompletion=completion.repair)
    ] = "bn"
    steps: Annotated[str, _sweep("Steps of pruning; 1,3 compares both.")] = "1"
    finetune_batches: Annotated[str, _first("Training batches after pruning; 0,200 compares both.")] = "0"
    finetune_lr: Annotated[
        str, _sweep("Learning rate of that training; 0.01,0.001: --selection-images choose one a trial.")
    ] = "0.01"
    finetune_amp: Annotated[str, _sweep("Precision of that training: none, bf16, fp16 (CUDA).")] = "none"
    channels_last: Annotated[bool, _sweep("Memory layout; often faster.", "--channels-last")] = False
    seeds: Annotated[str, _sweep("Seeds of training, and of calibration images if they are drawn so.")] = (
        "42,123,456,789,1011"
    )

    def __post_init__(self) -> None:
        check_criteria(self._read()["methods"]["criteria"])
        check_name("--finetune-amp", self.finetune_amp, AMP)

    def config(self) -> dict[str, Any]:
        """Give these options as keys of a config."""
        from tp_twoaxis.importance import expand_criteria

        values = self._read()
        values["methods"]["criteria"] = expand_criteria(values["methods"]["criteria"])
        return values

    def _read(self) -> dict[str, Any]:
        rates = numbers("--finetune-lr", self.finetune_lr) or []
        return {
            "methods": {
                "criteria": names(self.methods) or [],
                "allocation": names(self.allocation),
                "repair": [list(parse_repair(repair)) for repair in names(self.repair) or ()],
                "finetune_batches": numbers("--finetune-batches", self.finetune_batches, int),
                "steps": numbers("--steps", self.steps, int),
            },
            "keep": numbers("--keep", self.keep),
            "grid": self.grid,
            "finetune_lr": rates[0] if len(rates) == 1 else rates,
            "finetune_amp": None if self.finetune_amp == "none" else self.finetune_amp,
            "channels_last": self.channels_last,
            "seeds": numbers("--seeds", self.seeds, int),
        }


@dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """Who runs the trials, and which of them; an unknown engine and a part that is none are refused."""

    workers: Annotated[int | None, _first("Processes, or Ray actors; default 1.", min=1)] = None
    engine: Annotated[str, _scale("local processes, or ray: a cluster at RAY_ADDRESS, else this machine.")] = "local"
    cpus_per_cell: Annotated[float, _scale("Of a Ray actor.")] = 1
    gpus_per_cell: Annotated[float, _scale("Of a Ray actor; 0.25 puts four on a GPU.")] = 0
    retries: Annotated[int, _scale("How often a Ray actor that died is started again.", min=0)] = 3
    part: Annotated[str | None, _scale("2/4: the second quarter of the sweep, for several machines.")] = None
    retry_failed: Annotated[bool, _sweep("Run failed trials again.", "--retry-failed")] = False
    extend: Annotated[bool, _sweep("Add methods, shares or seeds to a folder.", "--extend")] = False

    def __post_init__(self) -> None:
        check_name("--engine", self.engine, ("local", "ray"))
        number, slash, count = ("1/1" if self.part is None else self.part).partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise TwoAxisError(f"--part: expected k/n with k from 1 to n, such as 2/4, got {self.part!r}")

    def keywords(self) -> dict[str, Any]:
        """Give these options as keywords of ``run_benchmark``."""
        part = None if self.part is None else tuple(int(number) for number in self.part.split("/"))
        engine = self._engine()
        return {"engine": engine, "part": part, "retry_failed": self.retry_failed, "extend": self.extend}

    def _engine(self) -> Engine | None:
        from tp_twoaxis.benchmark.engines import LocalEngine
        from tp_twoaxis.benchmark.ray_engine import RayEngine

        if self.engine == "ray":
            return RayEngine(self.workers or 1, self.cpus_per_cell, self.gpus_per_cell, self.retries)
        return None if self.workers is None else LocalEngine(self.workers)


def bench_command(
    *,
    out: Annotated[Path, _first("Folder of the results; an unfinished sweep in it goes on.")],
    config: Annotated[Path | None, _first("A sweep as JSON, instead of all options of model, data and sweep.")] = None,
    model: Annotated[str | None, _first(MODEL_HELP, autocompletion=completion.one_of(MODELS))] = None,
    weights: WeightOptions,
    source: Annotated[
        DataOptions | None,
        omit("workers", "seed"),
        override(batch_size=128),
        override(images=_data("Images to draw at random.", min=1)),
    ],
    test_data: Annotated[str | None, _data("Test images, if not in --data.")] = None,
    split: SplitOptions,
    sweep: SweepOptions,
    scale: ScaleOptions,
    output: JsonOptions,
) -> None:
    """Compare criteria at equal MACs on your network: prune, repair, fine-tune, test, for every seed.

    Each trial is a file in OUT; run the same command again after an interruption and it goes on. Several GPUs at one
    trial: torchrun --nproc-per-node 4 -m tp_twoaxis bench ... --device cuda.
    """
    if config is not None and not (model is None and source is None):
        raise TwoAxisError("--config: expected it alone, got --model or --data as well; write them into the file")
    if config is None and (model is None or source is None):
        raise TwoAxisError("expected --model and --data, or --config; give them")

    from tp_twoaxis.benchmark import BenchmarkConfig, load_config, run_benchmark
    from tp_twoaxis.benchmark.report import make_report
    from tp_twoaxis.runtime.distributed import process_group

    if model is None or source is None:
        assert config is not None
        settings = load_config(config)
    else:
        network = {
            "name": model,
            "model": model,
            "data": source.data,
            "checkpoint": None if weights.checkpoint is None else str(weights.checkpoint),
            "num_classes": weights.num_classes,
            "pretrained": weights.pretrained,
            "test_data": test_data,
            "image_size": source.image_size,
            "label_column": source.label_column,
            **source.normalisation(),
        }
        images = {"train_split": source.split, "calibration_images": source.images, "batch_size": source.batch_size}
        values = {"networks": [network], **sweep.config(), "data": {**images, **vars(split)}}
        settings = BenchmarkConfig.from_dict(values)
    with process_group(weights.device) as process:
        summary = run_benchmark(settings, out, device=process.device, progress=output.progress, **scale.keywords())
    if process.rank:
        return
    report = make_report(out)
    if len(summary.failed) == summary.total:
        raise TwoAxisError(f"all {summary.total} trials failed, the first with {report.failures.error.iloc[0]}")
    counts = {"cells": summary.total, "ran": summary.ran, "skipped": summary.skipped, "failed": summary.failed}
    output.show(
        {"out": str(out), **counts, **report_payload(report)},
        *report_lines(report),
        f"{summary.ran} trials measured, {summary.skipped} were there; tp-twoaxis report {out} draws them",
    )
