"""Run the command line inside the test process, and what it must look like when it refuses."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from tp_twoaxis.cli.commands import app

MODEL = "cases:conv_net"
TESTS = str(Path(__file__).parent)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="tp-twoaxis")


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr or result.exception
    return result


def refused(*arguments):
    """Exit status 2, nothing on stdout, exactly one line on stderr; returns it."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.exception
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tp-twoaxis: error: ")
    return lines[0]
