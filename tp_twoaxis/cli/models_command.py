"""``tp-twoaxis models``: networks that are known by name."""

from __future__ import annotations

from typing import Annotated

import typer

from tp_twoaxis.cli.options import JsonOptions
from tp_twoaxis.cli.text_table import matching


def models_command(
    *,
    text: Annotated[str | None, typer.Argument(help="Only names with this text in them: resnet.")] = None,
    output: JsonOptions,
) -> None:
    """List the models that are known by name: built-in ones, torchvision's, timm's.

    Any other is given as module:factory, a function in an importable module or in one of the working directory.
    """
    from tp_twoaxis.models import available_models

    names = available_models()
    kept = [names[i] for i in matching([(name,) for name in names], text)]
    output.show({"models": kept}, *kept)
