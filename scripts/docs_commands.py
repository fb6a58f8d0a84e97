"""The page of commands, made from the commands themselves when the site is built."""

from __future__ import annotations

import inspect
from typing import Any

from tp_twoaxis.cli.commands import COMMANDS, load_command

PAGE = "commands.md"
INTRODUCTION = """# Commands

`tp-twoaxis COMMAND --help` prints the same on a terminal, with the options in the same groups. `--install-completion`
lets the shell complete commands, options and names. Errors are one line and status 2; `TP_TWOAXIS_TRACEBACK=1` shows
the traceback. Without a terminal a line every 30 seconds says how far a long run is.
"""


def on_files(files: Any, config: Any) -> Any:
    """Add the page; MkDocs calls this."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=command_pages()))
    return files


def command_pages() -> str:
    """Write the reference of all commands, in Markdown."""
    return "\n".join([INTRODUCTION, *(_command(name) for name in COMMANDS)])


def _command(name: str) -> str:
    command = load_command(name)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join([name, *(p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments), "[OPTIONS]"])
    lines = [f"## {name}", "", f"`tp-twoaxis {usage}`", "", inspect.cleandoc(command.help), ""]
    lines += ["```bash", f"tp-twoaxis {name} {COMMANDS[name][1]}".rstrip(), "```", ""]
    if arguments:
        lines += ["| argument | what it is |", "| --- | --- |"]
        lines += [f"| `{p.name.upper()}` | {_cell(p.help)} |" for p in arguments] + [""]
    panels = dict.fromkeys(option.rich_help_panel for option in options)
    for panel in sorted(panels, key=lambda panel: panel is not None):
        lines += [f"| {panel or 'option'} | default | what it is |", "| --- | --- | --- |"]
        lines += [_row(option) for option in options if option.rich_help_panel == panel] + [""]
    return "\n".join(lines)


def _row(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    default = "required" if option.required else _cell(_default(option))
    return f"| {names} | {default} | {_cell(option.help)} |"


def _default(option: Any) -> str:
    if option.default is None or option.default is False:
        return ""
    return "yes" if option.default is True else f"`{option.default}`"


def _cell(text: Any) -> str:
    return " ".join(str(text or "").split()).replace("|", "\\|")
