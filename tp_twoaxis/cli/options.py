"""Options that several commands share, with their help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = (
    "A built-in name (cifar_resnet20_option_a, ...), a torchvision model (resnet50), a timm model "
    "(timm:deit_tiny_patch16_224) or module:factory, a function in an importable module."
)
_MODEL, _DATA, _PRUNING, _OUTPUT = "Model", "Data", "Pruning", "Output"

Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
OptionalModel = Annotated[
    str | None, typer.Argument(help=f"{MODEL_HELP} With --stats optional: then the statistics are checked against it.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Weights: a safetensors file of a state dict, or a network that `prune` wrote.",
        rich_help_panel=_MODEL,
    ),
]
NumClasses = Annotated[int | None, typer.Option(help="Outputs of the head.", rich_help_panel=_MODEL, min=1)]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="Weights that torchvision or timm publish.", rich_help_panel=_MODEL)
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.", rich_help_panel=_MODEL)]

Attention = Annotated[
    str, typer.Option(help="What attention loses: heads, or head-dims of every head.", rich_help_panel=_PRUNING)
]

_DATA_HELP = (
    "A folder with a folder of images for each class (or those of each split), a folder, file or glob of "
    "Parquet shards in the Hugging Face schema, or cifar10:/root of torchvision."
)
Data = Annotated[str, typer.Option(help=_DATA_HELP, rich_help_panel=_DATA, show_default=False)]
OptionalData = Annotated[str | None, typer.Option(help=_DATA_HELP, rich_help_panel=_DATA)]
Split = Annotated[str, typer.Option(help="Split to calibrate on.", rich_help_panel=_DATA)]
Images = Annotated[int, typer.Option(help="Images to draw at random.", rich_help_panel=_DATA, min=1)]
BatchSize = Annotated[int, typer.Option(help="Images a batch; memory only.", rich_help_panel=_DATA, min=1)]
Workers = Annotated[int, typer.Option(help="Processes that decode large images.", rich_help_panel=_DATA, min=0)]
Seed = Annotated[int, typer.Option(help="Seed of the draw (and of --score random).", rich_help_panel=_DATA)]
ImageSize = Annotated[
    int | None,
    typer.Option(help="Side of the images; default their own up to 64 pixels, else 224.", rich_help_panel=_DATA, min=1),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Three numbers subtracted from pixels in 0..1, as in training: 0.485,0.456,0.406. Default CIFAR's "
        "where the data is named after it, else ImageNet's.",
        rich_help_panel=_DATA,
    ),
]
Std = Annotated[str | None, typer.Option(help="Three numbers that divide, like --mean.", rich_help_panel=_DATA)]
LabelColumn = Annotated[
    str | None, typer.Option(help="Parquet column of the labels, where there are several.", rich_help_panel=_DATA)
]
Target = Annotated[
    str,
    typer.Option(
        help="Task variable of the target axis: margin, correct_logit, negative_loss, one_vs_rest, "
        "predicted_margin, predicted_logit; none for the local axis alone.",
        rich_help_panel="Statistics",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(help="Only these layers: conv1,layer1.0.conv1. Default all.", rich_help_panel="Statistics"),
]
Positions = Annotated[
    str,
    typer.Option(
        help="Positions of each image that enter the covariance: auto, all, or a number.",
        rich_help_panel="Statistics",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=_OUTPUT)]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.", rich_help_panel=_OUTPUT)]
