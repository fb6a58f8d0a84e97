"""``tp-twoaxis train``: a network from scratch, or from a checkpoint on."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from tp_twoaxis.cli import completion
from tp_twoaxis.cli.option_groups import omit, override, panel
from tp_twoaxis.cli.option_values import numbers
from tp_twoaxis.cli.options import DataOptions, EvaluationOptions, ModelOptions, OutputOptions
from tp_twoaxis.errors import TwoAxisError, check_name
from tp_twoaxis.known_names import AMP, RECIPES

if TYPE_CHECKING:
    from torch import nn

    from tp_twoaxis.training.settings import Precision, Recipe

_first, _recipe, _run = panel(None), panel("Recipe"), panel("Run")


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """How the network is trained: a known recipe, and what differs from it; the distillation must be two numbers."""

    recipe: Annotated[
        str,
        _first(
            f"{' or '.join(RECIPES)}. paper: 200 epochs of 128, SGD 0.1 (MobileNet 0.05), cosine. fast: 30 epochs "
            "of 512, SGD 0.4 with warm-up, bfloat16 on CUDA.",
            autocompletion=completion.one_of(RECIPES),
        ),
    ] = "paper"
    epochs: Annotated[int | None, _first("Instead of the recipe's.", min=1)] = None
    batch_size: Annotated[int | None, _recipe("Images a batch, over all ranks; the rate stays.", min=1)] = None
    lr: Annotated[float | None, _first("Highest learning rate.")] = None
    weight_decay: Annotated[float | None, _recipe("Of SGD.")] = None
    label_smoothing: Annotated[float | None, _recipe("Of the cross-entropy.")] = None
    amp: Annotated[
        str | None, _recipe("Precision: bf16, fp16 (CUDA only) or none.", autocompletion=completion.one_of(AMP))
    ] = None
    channels_last: Annotated[bool, _recipe("Memory layout; often faster.", "--channels-last")] = False
    augment: Annotated[bool, _recipe("Crop at random offsets and mirror at random.")] = True
    max_batches: Annotated[int | None, _recipe("Optimizer steps in all, at most.", min=1)] = None
    teacher: Annotated[Path | None, _recipe("Weights of the dense MODEL, to learn from its predictions too.")] = None
    distillation: Annotated[str, _recipe("Temperature and weight of the teacher's part of the loss.")] = "4,0.5"

    def __post_init__(self) -> None:
        check_name("recipe", self.recipe, RECIPES)
        if self.amp is not None:
            check_name("--amp", self.amp, AMP)
        if len(self.softening) != 2:
            raise TwoAxisError(
                f"--distillation: expected a temperature and a weight such as 4,0.5, got {self.distillation!r}"
            )

    @property
    def softening(self) -> list[float]:
        """Temperature and weight of the teacher's part of the loss."""
        return numbers("--distillation", self.distillation) or []

    def settings(self, model: str, device: str) -> Recipe:
        """Put the options that were given in the place of the recipe's values."""
        from tp_twoaxis.training import find_recipe

        changed = ("epochs", "batch_size", "lr", "weight_decay", "label_smoothing")
        given = {name: getattr(self, name) for name in changed if getattr(self, name) is not None}
        if self.amp is not None:
            given["amp"] = None if self.amp == "none" else cast("Precision", self.amp)
        if self.channels_last:
            given["channels_last"] = True
        return dataclasses.replace(find_recipe(self.recipe, model, device), **given)

    def record(self, settings: Recipe) -> dict[str, Any]:
        """Say how a network was trained, for its file."""
        how = {"name": self.recipe, **dataclasses.asdict(settings)}
        how |= {"augment": self.augment, "max_batches": self.max_batches}
        return how if self.teacher is None else {**how, "teacher": str(self.teacher), "distillation": self.softening}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What an interrupted run goes on from."""

    state: Annotated[
        Path | None,
        _run("State of the run, written every epoch and removed at the end; default beside --out."),
    ] = None
    checkpoint_every: Annotated[int | None, _run("Write it also after every so many batches.", min=1)] = None
    resume: Annotated[bool, _first("Go on from --state where there is one.", "--resume")] = False
    snapshots: Annotated[
        str | None,
        _run("Epochs after which the weights are kept in a folder beside --out, such as 0,1,2,5; 0 is before any."),
    ] = None

    @property
    def snapshot_epochs(self) -> list[int]:
        """The epochs of --snapshots, ascending.

        Raises:
            TwoAxisError: they are no whole numbers, or negative.
        """
        epochs = sorted(set(numbers("--snapshots", self.snapshots, int) or []))
        if epochs and epochs[0] < 0:
            raise TwoAxisError(f"--snapshots: expected epochs of 0 or more, got {epochs[0]}")
        return epochs

    def snapshot_folder(self, out: Path) -> Path | None:
        """Where snapshots go, or None for a run without."""
        return out.with_name(f"{out.stem}.snapshots") if self.snapshot_epochs else None


def train_command(
    *,
    model: ModelOptions,
    source: Annotated[
        DataOptions,
        omit("batch_size"),
        override(images=None),
        override(
            split=panel("Data")("Split to train on."),
            images=_first("Images to draw at random; default all.", min=1),
            seed=_run("Seed of weights, order, augmentation and draw."),
        ),
    ],
    out: Annotated[Path, _first("Weights, .safetensors.", show_default=False)],
    training: RecipeOptions,
    evaluation: Annotated[
        EvaluationOptions,
        override(eval_split=_first("Split to measure accuracy on, at the end.")),
    ],
    run: RunOptions,
    output: OutputOptions,
) -> None:
    """Train a network and write its weights; an interrupted run goes on with --resume.

    With several GPUs: torchrun --nproc-per-node 4 -m tp_twoaxis train ... --device cuda. Each process takes its
    share of every batch.
    """
    state = run.state or out.with_name(f"{out.stem}.state.safetensors")
    # a state that --resume is for is no output to be replaced
    kept = run.snapshot_folder(out)
    output.check(out, None if run.resume or output.force else state, folder=None if run.resume else kept)

    import torch

    from tp_twoaxis.runtime.distributed import barrier, process_group
    from tp_twoaxis.runtime.model_state import fork_rng
    from tp_twoaxis.training import Distillation, finetune, training_batches
    from tp_twoaxis.training.evaluation import accuracy
    from tp_twoaxis.training.snapshots import SnapshotWriter, snapshot_files

    recipe = training.settings(model.model, model.device)
    epochs = run.snapshot_epochs
    if epochs and epochs[-1] > recipe.epochs:
        raise TwoAxisError(f"--snapshots: expected epochs of 0 to {recipe.epochs}, got {epochs[-1]}")
    source = dataclasses.replace(source, batch_size=recipe.batch_size)
    test_source = evaluation.beside(source)
    with process_group(model.device) as process:
        options = dataclasses.replace(model, device=process.device)
        progress = output.progress and process.rank == 0
        with fork_rng():
            torch.manual_seed(source.seed)
            network = options.build()
            dense = dataclasses.replace(options, checkpoint=training.teacher, pretrained=False)
            teacher = None if training.teacher is None else dense.build()
        dataset = source.open()
        if dataset.labels is None:
            raise TwoAxisError(f"--data: training needs labels, {source.data} has none; name data with labels")
        loader = training_batches(
            dataset,
            recipe.batch_size,
            device=process.device,
            augment=training.augment,
            seed=source.seed,
            workers=source.workers,
            rank=process.rank,
            ranks=process.world_size,
        )
        if output.force and not run.resume and process.rank == 0:
            for old in (state, *(snapshot_files(kept).values() if kept else ())):
                old.unlink(missing_ok=True)
        barrier()
        described = {"model": model.model, "data": source.data, "seed": source.seed, "recipe": training.record(recipe)}
        report = finetune(
            network,
            loader,
            max_batches=training.max_batches,
            teacher=teacher,
            distillation=Distillation(*training.softening),
            checkpoint=state,
            checkpoint_every=run.checkpoint_every,
            resume=run.resume,
            on_epoch=None if kept is None else SnapshotWriter(kept, epochs, described),
            seed=source.seed,
            progress=progress,
            **recipe.settings(),
        )
        if process.rank:
            return
        measured: dict[str, Any] | None = None
        if test_source is not None:
            share, count = accuracy(network, test_source.loader(), progress=progress)
            measured = {"accuracy": share, "images": count, "split": test_source.split}
        snapshots = [] if kept is None else list(snapshot_files(kept).values())
        payload = {
            "model": model.model,
            "data": source.data,
            "out": str(out),
            "recipe": training.record(recipe),
            "seed": source.seed,
            "batches": report.batches,
            "images": report.images,
            "seconds": round(report.seconds, 3),
            "resumed_at": report.resumed_at,
            "snapshots": [str(path) for path in snapshots],
            "final_loss": report.losses[-1],
            "train_accuracies": report.accuracies,
            "evaluation": measured,
            "torch": torch.__version__,
        }
        _write(network, options, out, payload)
        state.unlink(missing_ok=True)
    lines = [
        f"trained {model.model} for {report.batches} batches ({report.images} images) in {report.seconds:.1f} s, "
        f"last loss {report.losses[-1]:.3f}" + (f", resumed at batch {report.resumed_at}" if report.resumed_at else "")
    ]
    if measured is not None:
        lines.append(f"top-1 accuracy on {measured['images']} images ({measured['split']}): {measured['accuracy']:.2%}")
    wrote = [f"wrote {out}", *([f"wrote {len(snapshots)} snapshots to {kept}"] if snapshots else [])]
    output.show({**payload, "losses": report.losses, "learning_rates": report.learning_rates}, *lines, *wrote)


def _write(network: nn.Module, options: ModelOptions, out: Path, payload: dict[str, Any]) -> None:
    """Write weights for --checkpoint, with how they came about in the file's header."""
    from tp_twoaxis.pruning import save_pruned
    from tp_twoaxis.training.snapshots import write_weights

    if options.pruned:
        save_pruned(network, out, _Payload(payload))
        return
    write_weights(network, out, {"training": json.dumps(payload)})


@dataclass(frozen=True)
class _Payload:
    """What save_pruned takes for a report."""

    content: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(self.content)
