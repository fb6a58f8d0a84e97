"""The commands by name: what is imported for a help page, and what the table says of them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
from cli_cases import succeed

from tp_twoaxis.cli.commands import COMMANDS, load_command

HEAVY = ("torch", "torch_pruning", "pandas", "matplotlib", "numpy", "tp_twoaxis.cli.options")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["prnue"], ["--nonsense"]])
def test_help_and_usage_import_nothing_heavy(arguments):
    code = (
        f"import json, sys; from tp_twoaxis.cli import main; status = main({arguments!r}); "
        f"print(json.dumps([status, [name for name in {HEAVY!r} if name in sys.modules]]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    status, imported = json.loads(result.stdout.splitlines()[-1])
    assert imported == []
    refused = bool(arguments) and arguments[0] not in ("--help", "--version")
    assert status == (2 if refused else 0)
    assert ("tp-twoaxis: error: " in result.stderr) == refused


def test_the_overview_names_every_command():
    text = " ".join(succeed("--help").stdout.replace("│", " ").split())
    for name, (summary, _) in COMMANDS.items():
        assert f"{name} {summary}" in text
    assert "Example: tp-twoaxis demo --quick" in text
    assert "TP_TWOAXIS_TRACEBACK=1" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_what_the_table_says(name):
    summary, arguments = COMMANDS[name]
    command = load_command(name)
    assert inspect.cleandoc(command.help).split("\n\n")[0] == summary
    assert command.epilog == f"Example: tp-twoaxis {name} {arguments}"
    text = succeed(name, "--help").stdout
    assert f"Usage: tp-twoaxis {name} [OPTIONS]" in text
    assert "--json" in text
    assert all(option.help for option in command.params if option.name != "help")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_can_be_parsed(name):
    command = load_command(name)
    context = command.make_context(name, COMMANDS[name][1].split(), resilient_parsing=True)
    assert context.params.keys() == {option.name for option in command.params if option.name != "help"}
