"""All commands by name and summary; the module of a command is imported when it runs or shows its own help."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from tp_twoaxis.cli.one_line_errors import TRACEBACK, OneLineErrors
from tp_twoaxis.cli.option_groups import expand_option_groups

_RESNET = "cifar_resnet20_conv_shortcut --checkpoint resnet20.safetensors"

# name -> summary, the first sentence of the command's docstring; and the arguments of its example
COMMANDS = {
    "calibrate": (
        "Run images through a trained model once and write what the scores need.",
        f"{_RESNET} --data cifar10/ --out stats.safetensors",
    ),
    "score": (
        "Show every channel on both axes, from saved statistics or by calibrating on the fly.",
        "--stats stats.safetensors --out channels.csv --plot plots/",
    ),
    "stability": (
        "Say how far scores and ranks would move with other calibration images, and whether these are enough.",
        f"{_RESNET} --data cifar10/ --images 1000 --score hull --plot stability.png",
    ),
    "sensitivity": (
        "Measure for every group of channels how far the repaired network's logits move when a share of it is missing.",
        f"{_RESNET} --data cifar10/ --images 1000 --out sensitivity/",
    ),
    "select": (
        "Try scores on copies of the network and judge them on images held out of the calibration; changes nothing.",
        f"{_RESNET} --data cifar10/ --flops 0.5 --candidates all-local,l2,taylor",
    ),
    "prune": (
        "Remove channels until a share of the MACs is left, repair, and write the smaller network.",
        f"{_RESNET} --data cifar10/ --score hull --flops 0.5 --eval-split test --out pruned.safetensors",
    ),
    "train": (
        "Train a network and write its weights; an interrupted run goes on with --resume.",
        "cifar_resnet18 --num-classes 100 --data cifar100/ --recipe fast --device cuda --eval-split test "
        "--out resnet18.safetensors",
    ),
    "explain": (
        "Say which peers can replace a channel, how well, what it tells of the task, and what its removal costs.",
        f"{_RESNET.replace(' ', ' layer2.1.conv1 ', 1)} --data cifar10/ --channel 13 --out explain.html",
    ),
    "diagnose": (
        "Judge every claim of the paper on your network, and say what follows for pruning and where it fails.",
        f"{_RESNET} --data cifar10/ --images 2000 --out report.html",
    ),
    "bench": (
        "Compare criteria at equal MACs on your network: prune, repair, fine-tune, test, for every seed.",
        f"--model {_RESNET} --data cifar10/ --methods local,taylor,l2 --keep 0.7,0.5,0.35 --out results/",
    ),
    "report": ("Write tables, curves and one HTML file of a sweep, finished or not.", "results/"),
    "scores": ("List what ranks channels: name, axis, what it needs, what it is.", "taylor"),
    "repairs": (
        "List the repairs of a pruned network: name, what it needs, what it does, what it makes superfluous.",
        "",
    ),
    "models": ("List the models that are known by name: built-in ones, torchvision's, timm's.", "resnet50"),
    "demo": (
        "Train, calibrate, prune and compare on real images inside the package; needs no data and no GPU.",
        "--out demo-output --quick",
    ),
}


def _new_typer(*, completion: bool = False, **settings: Any) -> typer.Typer:
    return typer.Typer(add_completion=completion, pretty_exceptions_enable=False, rich_markup_mode="rich", **settings)


def load_command(name: str) -> Any:
    """Import a command: ``prune_command`` of the module ``prune_command``, with its options.

    Returns:
        The command as typer runs it.

    Example:
        >>> load_command("demo").name
        'demo'
    """
    module = importlib.import_module(f"tp_twoaxis.cli.{name}_command")
    single = _new_typer()
    example = f"Example: tp-twoaxis {name} {COMMANDS[name][1]}".rstrip()
    single.command(name, epilog=example)(expand_option_groups(getattr(module, f"{name}_command")))
    return get_command(single)


class LazyCommand(TyperCommand):
    """A command that is known by name and summary, and hands over to the one it imports once it is used."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments of the command itself; its context leads to it."""
        return load_command(str(self.name)).make_context(*args, **kwargs)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"tp-twoaxis {version('tp-twoaxis')}")
        raise typer.Exit


app = _new_typer(
    completion=True,
    cls=OneLineErrors,
    invoke_without_command=True,
    epilog=f"Example: tp-twoaxis demo --quick\n\nErrors are one line and status 2; {TRACEBACK}=1 shows the traceback.",
)


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


for _name, (_summary, _) in COMMANDS.items():
    app.command(_name, cls=LazyCommand, help=_summary)(lambda: None)
