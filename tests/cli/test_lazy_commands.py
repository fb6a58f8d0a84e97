"""The commands by name: what is imported for a help page, and what the table says of them."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import pytest
from cli_cases import succeed

from tp_twoaxis.cli.commands import COMMANDS, load_command
from tp_twoaxis.cli.explain_command import ExplanationOptions
from tp_twoaxis.cli.train_command import RecipeOptions
from tp_twoaxis.diagnostics.peers import PEERS
from tp_twoaxis.training.loss import DISTILLATION

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


NET, IMAGES = "cifar_resnet20_option_a", ["--data", "images", "--out", "out.safetensors"]
BAD_OPTIONS = [
    ["score"],
    ["score", "--stats", "stats.safetensors", "--score", "captur"],
    ["stability", NET, *IMAGES[:2], "--level", "2"],
    ["stability", NET, *IMAGES[:2], "--score", "captur"],
    ["calibrate", NET, *IMAGES, "--score", "captur"],
    ["calibrate", NET, *IMAGES, "--positions", "few"],
    ["calibrate", NET, *IMAGES, "--target", "marge"],
    ["calibrate", NET, *IMAGES, "--mean", "a"],
    ["prune", NET, *IMAGES, "--score", "captur(strength=1)"],
    ["prune", NET, *IMAGES, "--repair", "rigde"],
    ["prune", NET, *IMAGES, "--attention", "dims"],
    ["prune", NET, *IMAGES, "--flops", "50"],
    ["prune", NET, *IMAGES, "--flops", "half"],
    ["prune", NET, *IMAGES, "--steps", "0"],
    ["prune", NET, *IMAGES, "--budget", "time"],
    ["sensitivity", NET, *IMAGES[:2], "--price", "0"],
    ["prune", NET, *IMAGES, "--min-keep", "2"],
    ["prune", NET, *IMAGES[:2], "--out", "no/such/folder/pruned.safetensors"],
    ["select", NET, *IMAGES[:2], "--candidates", "all-locl"],
    ["select", NET, *IMAGES[:2], "--flops", "half"],
    ["train", NET, *IMAGES, "--recipe", "quick"],
    ["train", NET, *IMAGES, "--distillation", "4"],
    ["train", NET, *IMAGES, "--amp", "bf17"],
    ["explain", NET, "conv1", "--channel", "first"],
    ["explain", NET, "conv1", "--channel", "1"],
    ["diagnose", NET, *IMAGES[:2], "--out", "report.html", "--sections", "hull"],
    ["diagnose", "--out", "report.html"],
    ["bench", "--model", NET, *IMAGES, "--methods", "tailor"],
    ["bench", "--model", NET, *IMAGES, "--repair", "rigde"],
    ["bench", "--model", NET, *IMAGES, "--seeds", "one"],
    ["bench", "--model", NET, *IMAGES, "--engine", "rya"],
    ["bench", "--model", NET, *IMAGES, "--finetune-amp", "bf17"],
    ["bench", "--out", "results"],
    *([name, "--nonsense"] for name in COMMANDS),
]


def test_help_and_bad_options_of_commands_need_no_pytorch(tmp_path):
    """In one process, one after the other; the first that imports it is named."""
    calls = [*([name, "--help"] for name in COMMANDS), *BAD_OPTIONS]
    code = (
        "import json, sys\nfrom tp_twoaxis.cli import main\n"
        f"for arguments in {calls!r}:\n"
        "    status = main(arguments)\n"
        f"    heavy = [name for name in {HEAVY[:-1]!r} if name in sys.modules]\n"
        "    if heavy or status != (0 if '--help' in arguments else 2):\n"
        "        sys.exit(f'{arguments}: status {status}, {heavy} imported')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == len(BAD_OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_defaults_that_stand_in_options_are_the_librarys():
    assert ExplanationOptions().peers == PEERS
    assert RecipeOptions().softening == [*DISTILLATION]


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
    assert command.epilog == f"Example: tp-twoaxis {name} {arguments}".rstrip()
    text = succeed(name, "--help").stdout
    assert f"Usage: tp-twoaxis {name} [OPTIONS]" in text
    assert "--json" in text
    assert all(option.help for option in command.params if option.name != "help")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_first_panel_is_short_and_holds_what_must_be_given(name):
    options = [option for option in load_command(name).params if option.param_type_name == "option"]
    first = [option for option in options if option.rich_help_panel is None]
    assert len(first) <= 15
    assert all(option.rich_help_panel is None for option in options if option.required)


def completions(line):
    """What bash is offered for the last word of a line, by the process that it would start."""
    environment = {"_TP_TWOAXIS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    code = (
        "import sys; from tp_twoaxis.cli import main; main([]); "
        "assert not {'torch', 'numpy'} & set(sys.modules), 'slow imports'"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("tp-twoaxis stab", ["stability"]),
        ("tp-twoaxis prune --min", ["--min-keep"]),
        ("tp-twoaxis prune --score antic", ["anticipating"]),
        ("tp-twoaxis prune --repair ridge+b", ["ridge+bn", "ridge+bias"]),
        ("tp-twoaxis bench --methods l2,all-l", ["l2,all-local"]),
        ("tp-twoaxis prune cifar_vgg", ["cifar_vgg16_bn"]),
    ],
)
def test_completion(line, offered):
    assert completions(line) == offered


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_can_be_parsed(name):
    command = load_command(name)
    context = command.make_context(name, COMMANDS[name][1].split(), resilient_parsing=True)
    assert context.params.keys() == {option.name for option in command.params if option.name != "help"}
