"""The command ``tp-twoaxis``: parse, call the library, print."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tp_twoaxis.errors import INSTALL


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; default those of the process.

    Returns:
        Exit status: 0; 2 after one line on stderr when something given does not fit; 130 on Ctrl-C.

    Example:
        >>> main(["--version"])
        tp-twoaxis ...
        0
    """
    try:
        # not at the top: this module must also load where typer is missing, to say so
        from tp_twoaxis.cli.commands import app
    except ImportError as error:
        print(f"tp-twoaxis: error: {error}; the command line needs more than the library: {INSTALL}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    try:
        app(args=arguments, prog_name="tp-twoaxis")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0
