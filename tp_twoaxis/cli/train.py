"""``tp-twoaxis train``: a network from scratch, or from a checkpoint on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from safetensors.torch import save
from torch import nn

from tp_twoaxis.borrow import preserved_rng
from tp_twoaxis.cli import options as opt
from tp_twoaxis.cli.inputs import DataOptions, ModelOptions, check_outputs, evaluation_options, numbers, show_progress
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.evaluation import accuracy
from tp_twoaxis.files import write_bytes
from tp_twoaxis.pruning.checkpoint import save_pruned
from tp_twoaxis.ranks import barrier, process_group
from tp_twoaxis.training import (
    RECIPES,
    Distillation,
    Recipe,
    find_recipe,
    finetune,
    training_batches,
)
from tp_twoaxis.training.loss import DISTILLATION
from tp_twoaxis.training.settings import Precision

_RECIPE, _RUN = "Recipe", "Run"


def train_command(
    model: opt.Model,
    data: opt.Data,
    out: Annotated[Path, typer.Option(help="Weights, .safetensors.", rich_help_panel="Output", show_default=False)],
    recipe: Annotated[
        str,
        typer.Option(
            help=f"{' or '.join(RECIPES)}. paper: 200 epochs of 128, SGD 0.1 (MobileNet 0.05), cosine. fast: 30 epochs "
            "of 512, SGD 0.4 with warm-up, bfloat16 on CUDA.",
            rich_help_panel=_RECIPE,
        ),
    ] = "paper",
    epochs: Annotated[int | None, typer.Option(help="Instead of the recipe's.", rich_help_panel=_RECIPE, min=1)] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images a batch, over all ranks; the rate stays.", rich_help_panel=_RECIPE, min=1),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.", rich_help_panel=_RECIPE)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of SGD.", rich_help_panel=_RECIPE)] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Of the cross-entropy.", rich_help_panel=_RECIPE)
    ] = None,
    amp: Annotated[
        str | None, typer.Option(help="Precision: bf16, fp16 (CUDA only) or none.", rich_help_panel=_RECIPE)
    ] = None,
    augment: Annotated[
        bool, typer.Option(help="Crop at random offsets and mirror at random.", rich_help_panel=_RECIPE)
    ] = True,
    max_batches: Annotated[
        int | None, typer.Option(help="Optimizer steps in all, at most.", rich_help_panel=_RECIPE, min=1)
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="Weights of the dense MODEL, to learn from its predictions too.", rich_help_panel=_RECIPE),
    ] = None,
    distillation: Annotated[
        str, typer.Option(help="Temperature and weight of the teacher's part of the loss.", rich_help_panel=_RECIPE)
    ] = f"{DISTILLATION.temperature:g},{DISTILLATION.weight:g}",
    checkpoint: opt.Checkpoint = None,
    num_classes: opt.NumClasses = None,
    pretrained: opt.Pretrained = False,
    device: opt.Device = "cpu",
    split: Annotated[str, typer.Option(help="Split to train on.", rich_help_panel="Data")] = "train",
    images: Annotated[
        int | None, typer.Option(help="Images to draw at random; default all.", rich_help_panel="Data", min=1)
    ] = None,
    workers: opt.Workers = 0,
    seed: Annotated[int, typer.Option(help="Seed of weights, order, augmentation and draw.", rich_help_panel=_RUN)] = 0,
    image_size: opt.ImageSize = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    label_column: opt.LabelColumn = None,
    eval_split: Annotated[
        str | None, typer.Option(help="Split to measure accuracy on, at the end.", rich_help_panel="Evaluation")
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(help="Where it is, if not in --data: then a file of its own.", rich_help_panel="Evaluation"),
    ] = None,
    eval_images: Annotated[
        int | None, typer.Option(help="Images to draw from it; default all.", rich_help_panel="Evaluation", min=1)
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="State of the run, written every epoch and removed at the end; default beside --out.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Write it also after every so many batches.", rich_help_panel=_RUN, min=1)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from --state where there is one.", rich_help_panel=_RUN)
    ] = False,
    json_output: opt.Json = False,
    force: opt.Force = False,
) -> None:
    """Train a network and write its weights; an interrupted run goes on with --resume.

    With several GPUs: torchrun --nproc-per-node 4 -m tp_twoaxis train ... --device cuda. Each process takes its
    share of every batch.
    """
    chosen = _recipe(
        find_recipe(recipe, model, device),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        amp=amp,
    )
    softening = numbers("--distillation", distillation) or []
    if len(softening) != 2:
        raise TwoAxisError(f"--distillation: expected a temperature and a weight such as 4,0.5, got {distillation!r}")
    state = state or out.with_name(f"{out.stem}.state.safetensors")
    # a state that --resume is for is no output to be replaced
    check_outputs(force, out, None if resume or force else state)
    source = DataOptions(data, split, images, chosen.batch_size, workers, seed, image_size, mean, std, label_column)
    evaluation = evaluation_options(source, eval_split, eval_data, eval_images)
    with process_group(device) as (rank, ranks, own_device):
        options = ModelOptions(model, checkpoint, num_classes, pretrained, own_device)
        progress = show_progress(json_output) and rank == 0
        with preserved_rng():
            torch.manual_seed(seed)
            network = options.build()
            dense = None if teacher is None else dataclasses.replace(options, checkpoint=teacher, pretrained=False)
            taught_by = None if dense is None else dense.build()
        dataset = source.open()
        if dataset.labels is None:
            raise TwoAxisError(f"--data: training needs labels, {data} has none; name data with labels")
        loader = training_batches(
            dataset,
            chosen.batch_size,
            device=own_device,
            augment=augment,
            seed=seed,
            workers=workers,
            rank=rank,
            ranks=ranks,
        )
        if force and not resume and rank == 0:
            state.unlink(missing_ok=True)
        barrier()
        report = finetune(
            network,
            loader,
            max_batches=max_batches,
            teacher=taught_by,
            distillation=Distillation(*softening),
            checkpoint=state,
            checkpoint_every=checkpoint_every,
            resume=resume,
            seed=seed,
            progress=progress,
            **chosen.settings(),
        )
        if rank:
            return
        measured: dict[str, Any] | None = None
        if evaluation is not None:
            share, count = accuracy(network, evaluation.loader(), progress=progress)
            measured = {"accuracy": share, "images": count, "split": evaluation.split}
        how = {"name": recipe, **dataclasses.asdict(chosen), "augment": augment, "max_batches": max_batches}
        if teacher is not None:
            how |= {"teacher": str(teacher), "distillation": softening}
        payload = {
            "model": model,
            "data": data,
            "out": str(out),
            "recipe": how,
            "seed": seed,
            "batches": report.batches,
            "images": report.images,
            "seconds": round(report.seconds, 3),
            "resumed_at": report.resumed_at,
            "final_loss": report.losses[-1],
            "train_accuracies": report.accuracies,
            "evaluation": measured,
            "torch": torch.__version__,
        }
        _write(network, options, out, payload)
        state.unlink(missing_ok=True)
    if json_output:
        typer.echo(json.dumps({**payload, "losses": report.losses, "learning_rates": report.learning_rates}))
        return
    typer.echo(
        f"trained {model} for {report.batches} batches ({report.images} images) in {report.seconds:.1f} s, "
        f"last loss {report.losses[-1]:.3f}" + (f", resumed at batch {report.resumed_at}" if report.resumed_at else "")
    )
    if measured is not None:
        typer.echo(f"top-1 accuracy on {measured['images']} images ({measured['split']}): {measured['accuracy']:.2%}")
    typer.echo(f"wrote {out}")


def _recipe(recipe: Recipe, *, amp: str | None, **changes: Any) -> Recipe:
    """Put the options that were given in the place of the recipe's values."""
    given = {name: value for name, value in changes.items() if value is not None}
    if amp is not None:
        given["amp"] = None if amp == "none" else cast(Precision, amp)
    return dataclasses.replace(recipe, **given)


def _write(network: nn.Module, options: ModelOptions, out: Path, payload: dict[str, Any]) -> None:
    """Write weights for --checkpoint, with how they came about in the file's header."""
    if options.pruned:
        save_pruned(network, out, _Payload(payload))
        return
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in network.state_dict().items()}
    write_bytes(out, save(tensors, metadata={"format": "pt", "training": json.dumps(payload)}))


@dataclasses.dataclass(frozen=True)
class _Payload:
    """What save_pruned takes for a report."""

    content: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(self.content)
