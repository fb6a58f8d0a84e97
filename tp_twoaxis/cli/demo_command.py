"""``tp-twoaxis demo``: everything at once on images inside the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tp_twoaxis.cli.options import OutputOptions


def demo_command(
    *,
    out: Annotated[Path, typer.Option(help="Folder for report.html and results.json.")] = Path("demo-output"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer training steps and criteria.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of data, training and random scores.")] = 0,
    output: OutputOptions,
) -> None:
    """Train, calibrate, prune and compare on real images inside the package; needs no data and no GPU."""
    from tp_twoaxis.demo import run_demo

    output.check(folder=out)
    result = run_demo(out, seed=seed, quick=quick, progress=output.progress)
    if output.json_output:
        typer.echo(result.to_json())
    else:
        result.show()
