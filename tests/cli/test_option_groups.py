"""Dataclasses as options of a command: expansion, overrides, groups that may be missing, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from tp_twoaxis.cli.option_groups import expand_option_groups, omit, override, panel


@dataclass(frozen=True, kw_only=True)
class Where:
    device: Annotated[str, panel("Where")("Where to run.")] = "cpu"


@dataclass(frozen=True, kw_only=True)
class Images(Where):
    data: Annotated[str, panel("Images")("A folder.", show_default=False)]
    size: Annotated[int, panel("Images")("Images a batch.", min=1)] = 64
    quick: Annotated[bool, panel("Images")("Fewer.", "--quick")] = False


def run(command, *arguments):
    app = typer.Typer(add_completion=False)
    app.command()(expand_option_groups(command))
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"})


def test_fields_are_options_in_the_place_of_the_group():
    def command(
        *, name: Annotated[str, typer.Argument()], images: Images, out: Annotated[Path, typer.Option()] = Path("o")
    ) -> None:
        """Do it."""
        typer.echo(f"{name} {images} {out}")

    flat = expand_option_groups(command)
    assert list(inspect.signature(flat).parameters) == ["name", "device", "data", "size", "quick", "out"]
    assert flat.__annotations__.keys() == inspect.signature(flat).parameters.keys()
    assert (flat.__name__, flat.__doc__) == ("command", "Do it.")
    result = run(command, "me", "--data", "d", "--quick", "--size", "3")
    assert result.output == f"me {Images(data='d', size=3, quick=True)} o\n"
    text = run(command, "--help").output
    for part in ("Where to run.", "[default: cpu]", "A folder.", "[x>=1]", "─ Images ─"):
        assert part in text


def test_required_options_stay_required():
    def command(*, images: Images) -> None:
        typer.echo("ran")

    assert run(command, "--data", "d").output == "ran\n"
    missing = run(command)
    assert missing.exit_code == 2
    assert "--data" in missing.output
    refused = run(command, "--data", "d", "--size", "0")
    assert (refused.exit_code, "--size" in refused.output) == (2, True)


def test_an_optional_group_is_none_until_all_it_needs_is_given():
    def command(*, images: Images | None, where: Annotated[Where | None, omit("device")] = None) -> None:
        typer.echo(repr(images))

    assert run(command).output == "None\n"
    assert run(command, "--size", "3").output == "None\n"
    assert run(command, "--data", "d").output == f"{Images(data='d')!r}\n"


def test_overrides_change_defaults_and_help_for_one_command():
    larger = Annotated[
        Images,
        omit("quick", "device"),
        override(size=128),
        override(size=panel("Other")("Images of a step."), data="here"),
    ]

    def command(images: larger) -> None:
        typer.echo(repr(images))

    def plain(images: Images) -> None:
        typer.echo(repr(images))

    command.__annotations__["images"] = larger
    assert run(command).output == f"{Images(data='here', size=128)!r}\n"
    text = run(command, "--help").output
    assert "Images of a step." in text
    assert "─ Other ─" in text
    assert "--quick" not in text
    assert "--device" not in text
    assert "Images a batch." in run(plain, "--help").output  # the group itself stays as it is
    assert Images(data="d").size == 64


def test_a_group_checks_what_it_is_given():
    @dataclass(frozen=True)
    class Checked:
        share: Annotated[float, typer.Option()] = 0.5

        def __post_init__(self):
            if self.share > 1:
                raise ValueError("share")

    def command(*, checked) -> None:
        typer.echo(dataclasses.astuple(checked))

    command.__annotations__["checked"] = Checked
    assert run(command, "--share", "0.2").output == "(0.2,)\n"
    assert str(run(command, "--share", "2").exception) == "share"


def test_the_same_option_twice_is_refused():
    def two_groups(*, images: Images, where: Where) -> None: ...

    def group_and_option(*, size: int, images: Images) -> None: ...

    with pytest.raises(TypeError, match="two_groups: expected each option once, got 'device' twice"):
        expand_option_groups(two_groups)
    with pytest.raises(TypeError, match="got 'size' twice"):
        expand_option_groups(group_and_option)

    def apart(*, images: Annotated[Images, omit("device")], where: Where) -> None: ...

    assert "device" in inspect.signature(expand_option_groups(apart)).parameters


@pytest.mark.parametrize("change", [override(sise=3), omit("sise")])
def test_an_override_of_no_field_is_refused(change):
    def command(images) -> None: ...

    command.__annotations__["images"] = Annotated[Images, change]
    with pytest.raises(TypeError, match="Images: expected a field among device, data, size, quick, got 'sise'"):
        expand_option_groups(command)
