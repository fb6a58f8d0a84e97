"""Options that several commands share, declared once, and what they lead to: models, images, statistics, files.

PyTorch is imported where an option leads to something, so that a help page and a bad option need none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tp_twoaxis.cli import completion
from tp_twoaxis.cli.option_groups import panel
from tp_twoaxis.cli.option_values import names, numbers, position_rule
from tp_twoaxis.errors import TwoAxisError, check_name, refuse_pickle_name
from tp_twoaxis.known_names import ATTENTION_UNITS, AUTO, DEVICES, MODELS, POOLINGS, REPAIRS, TARGETS, parse_repair

if TYPE_CHECKING:
    from torch import nn

    from tp_twoaxis.data import ArrayDataset, ImageDataset

RANDOM_WEIGHTS = "the model has random weights; give --checkpoint or --pretrained"
MODEL_HELP = (
    "A built-in name (cifar_resnet20_option_a, ...), a torchvision model (resnet50), a timm model "
    "(timm:deit_tiny_patch16_224) or module:factory, a function in an importable module; `tp-twoaxis models` lists."
)
CRITERION_HELP = (
    "What ranks channels: capture, hull, anticipating, l2, taylor or another that `tp-twoaxis scores` lists, with "
    "options as in hull(strength=1.0), or module:factory."
)

_first, _model, _data, _statistics = panel(None), panel("Model"), panel("Data"), panel("Statistics")
_pruning, _evaluation = panel("Pruning"), panel("Evaluation")


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """Where the weights of a model come from, and where it runs."""

    checkpoint: Annotated[
        Path | None,
        _first("Weights: safetensors or a .pth of tensors alone, or a network that `prune` wrote."),
    ] = None
    num_classes: Annotated[int | None, _model("Outputs of the head.", min=1)] = None
    pretrained: Annotated[bool, _first("Weights that torchvision or timm publish.", "--pretrained")] = False
    device: Annotated[
        str, _first("Where to run: cpu, cuda, cuda:1, mps.", autocompletion=completion.one_of(DEVICES))
    ] = "cpu"

    def of(self, model: str) -> ModelOptions:
        """Give the weights to a model."""
        return ModelOptions(**{**vars(self), "model": model})


@dataclass(frozen=True, kw_only=True)
class ModelOptions(WeightOptions):
    """A model and its weights."""

    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False, autocompletion=completion.one_of(MODELS))]

    def build(self) -> nn.Module:
        """Build the model in eval mode on its device, pruned as its checkpoint is.

        Raises:
            TwoAxisError: the model, its weights or the device do not fit.
        """
        from tp_twoaxis.models import load_weights
        from tp_twoaxis.pruning.checkpoint import FORMAT as PRUNED
        from tp_twoaxis.pruning.checkpoint import load_pruned
        from tp_twoaxis.runtime.devices import check_device
        from tp_twoaxis.statistics.store import FORMAT as STATISTICS

        check_device(self.device, "--device")
        if self.checkpoint is None:
            return self._dense(self.pretrained).to(self.device).eval()
        if self.pretrained:
            raise TwoAxisError("expected --checkpoint or --pretrained, got both; leave one out")
        kind = _format(self.checkpoint)
        if kind == STATISTICS:
            raise TwoAxisError(f"--checkpoint: {self.checkpoint} holds statistics, no weights; give it to --stats")
        if kind == PRUNED:
            return load_pruned(self.checkpoint, self._dense).to(self.device)
        model = self._dense()
        load_weights(model, self.checkpoint)
        return model.to(self.device).eval()

    def _dense(self, pretrained: bool = False) -> nn.Module:
        from tp_twoaxis.models import build_model

        return build_model(self.model, num_classes=self.num_classes, pretrained=pretrained)

    def factory(self) -> dict[str, str]:
        """Say in Python how the dense model is built, as keywords of ``model_card``."""
        classes = "" if self.num_classes is None else f", num_classes={self.num_classes}"
        build = f"lambda: build_model({self.model!r}{classes})"
        return {"factory": build, "imports": "from tp_twoaxis.models import build_model"}

    @property
    def pruned(self) -> bool:
        """Whether the checkpoint holds a pruned network, whose shapes the model's factory does not know."""
        from tp_twoaxis.pruning.checkpoint import FORMAT as PRUNED

        return self.checkpoint is not None and _format(self.checkpoint) == PRUNED

    def notes(self) -> list[str]:
        """Say what a user may have overlooked; ``module:factory`` may load weights itself."""
        library, colon, _ = self.model.partition(":")
        from_factory = bool(colon) and library not in ("torchvision", "timm")
        return [] if self.checkpoint or self.pretrained or from_factory else [RANDOM_WEIGHTS]


def _format(path: Path) -> str | None:
    """Read what a safetensors file says it is; None for plain weights and for what load_weights refuses."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            kind: str | None = (file.metadata() or {}).get("format")
            return kind
    except (SafetensorError, OSError):
        return None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Images, how many of them, and how they are read; ``--mean`` and ``--std`` must be numbers."""

    data: Annotated[
        str,
        _first(
            "A folder with a folder of images for each class (or those of each split), a folder, file or glob of "
            "Parquet shards in the Hugging Face schema, or cifar10:/root of torchvision.",
            show_default=False,
        ),
    ]
    split: Annotated[str, _data("Split to calibrate on.")] = "train"
    images: Annotated[int | None, _first("Images to draw at random.", min=1)] = 5000
    batch_size: Annotated[int, _data("Images a batch; memory only.", min=1)] = 64
    workers: Annotated[int, _data("Processes that decode large images.", min=0)] = 0
    seed: Annotated[int, _data("Seed of the draw (and of --score random).")] = 0
    image_size: Annotated[
        int | None, _data("Side of the images; default their own up to 64 pixels, else 224.", min=1)
    ] = None
    mean: Annotated[
        str | None,
        _data(
            "Three numbers subtracted from pixels in 0..1, as in training: 0.485,0.456,0.406. Default CIFAR's "
            "where the data is named after it, else ImageNet's."
        ),
    ] = None
    std: Annotated[str | None, _data("Three numbers that divide, like --mean.")] = None
    label_column: Annotated[str | None, _data("Parquet column of the labels, where there are several.")] = None

    def __post_init__(self) -> None:
        self.normalisation()

    def normalisation(self) -> dict[str, Any]:
        """Read ``--mean`` and ``--std``; None leaves the data's."""
        return {"mean": numbers("--mean", self.mean), "std": numbers("--std", self.std)}

    def open(self) -> ArrayDataset | ImageDataset:
        """Open the data and draw the images.

        Raises:
            TwoAxisError: there is no such data, or the numbers do not fit.
        """
        from tp_twoaxis.data import open_dataset

        return open_dataset(
            self.data,
            split=self.split,
            image_size=self.image_size,
            label_column=self.label_column,
            num_images=self.images,
            seed=self.seed,
            **self.normalisation(),
        )

    def loader(self, rank: int = 0, ranks: int = 1) -> Any:
        """Open the data and split it, or the share of one of several processes, into batches; see :meth:`open`."""
        from tp_twoaxis.data import make_loader

        return make_loader(self.open(), self.batch_size, workers=self.workers, rank=rank, ranks=ranks)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Images to measure accuracy on, which are never those of the calibration or the training."""

    eval_split: Annotated[str | None, _first("Split to measure accuracy on, before and after.")] = None
    eval_data: Annotated[str | None, _evaluation("Where it is, if not in --data: then a file of its own.")] = None
    eval_images: Annotated[int | None, _evaluation("Images to draw from it; default all.", min=1)] = None

    def beside(self, source: DataOptions) -> DataOptions | None:
        """Give the options of these images, which are read as those of ``source`` are; None without them.

        Raises:
            TwoAxisError: the images would be those of ``source``.
        """
        if self.eval_split is None and self.eval_data is None:
            if self.eval_images is not None:
                raise TwoAxisError("--eval-images: expected --eval-split or --eval-data with it, got neither; add one")
            return None
        from tp_twoaxis.data import has_splits, same_images

        if self.eval_data is None and not has_splits(source.data):
            raise TwoAxisError(f"--eval-split: {source.data} has no splits; name the files for it with --eval-data")
        beside = replace(
            source, data=self.eval_data or source.data, split=self.eval_split or "test", images=self.eval_images
        )
        if same_images((source.data, source.split), (beside.data, beside.split), source.label_column):
            option = "--eval-split" if self.eval_data is None else "--eval-data"
            raise TwoAxisError(
                f"{option}: expected images apart from those of --data ({source.data}, {source.split}), got the same "
                "ones; name another split, or a file or folder with --eval-data"
            )
        return beside


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions:
    """What the calibration records; an unknown target and positions that are none are refused."""

    target: Annotated[
        str,
        _statistics(
            "Task variable of the target axis: margin, correct_logit, negative_loss, one_vs_rest, "
            "predicted_margin, predicted_logit; none for the local axis alone.",
            autocompletion=completion.one_of((*TARGETS, "none")),
        ),
    ] = "margin"
    layers: Annotated[str | None, _statistics("Only these layers: conv1,layer1.0.conv1. Default all.")] = None
    positions: Annotated[
        str, _statistics("Positions of each image that enter the covariance: auto, all, or a number.")
    ] = "auto"
    pooling: Annotated[str, _statistics("What the task is compared with: mean over positions, or cls token.")] = "mean"

    def __post_init__(self) -> None:
        position_rule(self.positions)
        check_name("--pooling", self.pooling, POOLINGS)
        check_name("--target", self.target, [*TARGETS, "none"])

    @property
    def task_variable(self) -> str | None:
        """The target as the library knows it: None for the local axis alone."""
        return None if self.target == "none" else self.target

    def keywords(self) -> dict[str, Any]:
        """Give these options as keywords of ``calibrate`` and ``PruningState``."""
        return {
            "target": self.task_variable,
            "layers": names(self.layers),
            "positions": position_rule(self.positions),
            "pooling": self.pooling,
        }


@dataclass(frozen=True, kw_only=True)
class PruningOptions:
    """What every pruning of a network keeps to; unknown names and numbers out of range are refused."""

    repair: Annotated[
        str,
        _first(f"auto: what keeps most; {', '.join(REPAIRS)}, or ridge+bn; none.", autocompletion=completion.repair),
    ] = AUTO
    min_keep: Annotated[float, _pruning("Share of every group's channels that always stays.", min=0, max=1)] = 0.1
    round_to: Annotated[int | None, _pruning("Keep multiples of this many channels.", min=1)] = None
    attention: Annotated[
        str,
        _pruning(
            "What attention loses: heads, or head-dims of every head.",
            autocompletion=completion.one_of(ATTENTION_UNITS),
        ),
    ] = "heads"
    guard: Annotated[
        bool, _pruning("Hold images out and keep repairs only as far as they serve.", "--guard/--no-guard")
    ] = True
    ignore: Annotated[str | None, _pruning("Layers that keep their channels: conv1,fc.")] = None

    def __post_init__(self) -> None:
        parse_repair(() if self.repair == AUTO else self.repair)
        check_name("attention", self.attention, ATTENTION_UNITS)

    @property
    def named_repair(self) -> str | tuple[str, ...]:
        """The repairs, or ``auto``."""
        return AUTO if self.repair == AUTO else parse_repair(self.repair)

    def check(self, network: nn.Module) -> None:
        """Refuse layers of ``--ignore`` that the network does not have, before images are read."""
        from tp_twoaxis.pruning.config import PruningConfig

        PruningConfig(**{**self.keywords(), "repair": ()}).ignored_in(network)

    def keywords(self) -> dict[str, Any]:
        """Give these options as keywords of ``prune_to_flops`` and ``select_score``."""
        return {
            "repair": self.named_repair,
            "min_keep": self.min_keep,
            "round_to": self.round_to,
            "attention": self.attention,
            "guard": self.guard,
            "ignored_layers": names(self.ignore) or (),
        }


@dataclass(frozen=True, kw_only=True)
class JsonOptions:
    """What is printed."""

    json_output: Annotated[bool, _first("Print one JSON object and nothing else.", "--json")] = False

    @property
    def progress(self) -> bool:
        """Whether to say on stderr how far a run is: for people, not for programs."""
        return not self.json_output

    def show(self, payload: Mapping[str, Any], *lines: str) -> None:
        """Print the object for programs, or the lines for people."""
        for line in [json.dumps(payload)] if self.json_output else lines:
            typer.echo(line)


@dataclass(frozen=True, kw_only=True)
class OutputOptions(JsonOptions):
    """What is printed, and what may be replaced."""

    force: Annotated[bool, _first("Replace existing files.", "--force")] = False

    def check(self, *files: Path | None, folder: Path | None = None) -> None:
        """Refuse outputs that could not be written, or that would replace something, before anything is computed.

        Args:
            files: files to be written; None ones are skipped.
            folder: a folder to be filled, made if it does not exist.

        Raises:
            TwoAxisError: saying which and why.

        Example:
            >>> OutputOptions().check(Path("stats.safetensors"), None)
        """
        paths = [path for path in (*files, folder) if path is not None]
        if len({path.absolute() for path in paths}) < len(paths):
            raise TwoAxisError(f"expected a name for each output, got {', '.join(map(str, paths))}; rename one")
        for path in paths:
            refuse_pickle_name(path)
            if not path.absolute().parent.is_dir():
                raise TwoAxisError(f"{path}: the folder {path.parent} does not exist; create it first")
            if not os.access(path if path.is_dir() else path.absolute().parent, os.W_OK):
                raise TwoAxisError(f"{path}: the folder cannot be written; choose another")
        for path in paths:
            if path is folder:
                if path.exists() and not path.is_dir():
                    raise TwoAxisError(f"{path}: expected a folder, got a file; choose another name")
                if path.is_dir() and not self.force and any(path.iterdir()):
                    raise TwoAxisError(f"{path}: the folder is not empty; choose another, or --force to write into it")
            elif path.is_dir():
                raise TwoAxisError(f"{path}: expected a file name, got a folder; add a name to it")
            elif path.exists() and not self.force:
                raise TwoAxisError(f"{path}: the file exists; choose another name, or --force to replace it")


@dataclass(frozen=True, kw_only=True)
class ReportOptions(OutputOptions):
    """What is printed, and a file of the same."""

    report: Annotated[Path | None, panel("Output")("Write what --json prints to a file.")] = None

    def show(self, payload: Mapping[str, Any], *lines: str) -> None:
        """Write the object to the file, then print it or the lines."""
        if self.report is not None:
            from tp_twoaxis.runtime.serialization import write_bytes

            write_bytes(self.report, f"{json.dumps(payload)}\n".encode())
        super().show(payload, *lines)


def noted(notes: Iterable[str]) -> list[str]:
    """Turn notes into lines to print.

    Example:
        >>> noted(["few images"])
        ['note: few images']
    """
    return [f"note: {note}" for note in notes]
