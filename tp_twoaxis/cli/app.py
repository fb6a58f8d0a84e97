"""The commands in one place."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from tp_twoaxis.cli import options as opt
from tp_twoaxis.cli.bench import bench_command, report_command
from tp_twoaxis.cli.calibrate import calibrate_command
from tp_twoaxis.cli.errors import TRACEBACK, OneLineErrors
from tp_twoaxis.cli.explain import explain_command
from tp_twoaxis.cli.inputs import check_outputs, show_progress
from tp_twoaxis.cli.prune import prune_command
from tp_twoaxis.cli.score import score_command
from tp_twoaxis.cli.select import select_command
from tp_twoaxis.cli.stability import stability_command
from tp_twoaxis.cli.train import train_command

app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    invoke_without_command=True,
    epilog=f"Example: tp-twoaxis demo --quick\n\nErrors are one line and status 2; {TRACEBACK}=1 shows the traceback.",
)
_CIFAR = "cifar_resnet20_conv_shortcut --checkpoint resnet20.safetensors"
app.command("calibrate", epilog=f"Example: tp-twoaxis calibrate {_CIFAR} --data cifar10/ --out stats.safetensors")(
    calibrate_command
)
app.command("score", epilog="Example: tp-twoaxis score --stats stats.safetensors --out channels.csv --plot plots/")(
    score_command
)
app.command(
    "stability",
    epilog=f"Example: tp-twoaxis stability {_CIFAR} --data cifar10/ --images 1000 --score hull --plot stability.png",
)(stability_command)
app.command(
    "select", epilog=f"Example: tp-twoaxis select {_CIFAR} --data cifar10/ --flops 0.5 --candidates local,l2,taylor"
)(select_command)
app.command(
    "prune",
    epilog=f"Example: tp-twoaxis prune {_CIFAR} --data cifar10/ --score hull --flops 0.5 --eval-split test "
    "--out pruned.safetensors",
)(prune_command)
app.command(
    "train",
    epilog="Example: tp-twoaxis train cifar_resnet18 --num-classes 100 --data cifar100/ --recipe fast --device cuda "
    "--eval-split test --out resnet18.safetensors",
)(train_command)
app.command(
    "explain",
    epilog=f"Example: tp-twoaxis explain {_CIFAR.replace(' ', ' layer2.1.conv1 ', 1)} --data cifar10/ "
    "--channel 13 --out explain.html",
)(explain_command)
app.command(
    "bench",
    epilog="Example: tp-twoaxis bench --model cifar_resnet20_conv_shortcut --checkpoint resnet20.safetensors "
    "--data cifar10/ --methods local,taylor,l2 --keep 0.7,0.5,0.35 --out results/",
)(bench_command)
app.command("report", epilog="Example: tp-twoaxis report results/")(report_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tp-twoaxis {version('tp-twoaxis')}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Channel pruning on two axes: which channels matter for the task, and which their peers can replace."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("demo", epilog="Example: tp-twoaxis demo --out demo-output --quick")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the report and the pictures.")] = Path("demo-output"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer training steps and criteria.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of data, training and random scores.")] = 0,
    json_output: opt.Json = False,
    force: opt.Force = False,
) -> None:
    """Train, calibrate, prune and compare on real images inside the package; needs no data and no GPU."""
    from tp_twoaxis.demo import run_demo

    check_outputs(force, folder=out)
    result = run_demo(out, seed=seed, quick=quick, progress=show_progress(json_output))
    if json_output:
        typer.echo(result.to_json())
    else:
        result.show()
