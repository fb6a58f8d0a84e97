"""Errors as one line on stderr and an exit status, for every command alike."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from tp_twoaxis.errors import INSTALL, TwoAxisError

TRACEBACK = "TP_TWOAXIS_TRACEBACK"


class OneLineErrors(TyperGroup):
    """A command group that ends with 2 and one line on stderr when something given does not fit.

    Errors of the library, wrong usage, missing optional packages and the operating system's refusals are
    reported in one line. Anything else is a defect and keeps its traceback, as do all with ``TP_TWOAXIS_TRACEBACK=1``.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run and exit."""
        kwargs["standalone_mode"] = False
        try:
            status = super().main(*args, **kwargs)
        except (KeyboardInterrupt, typer.Abort):
            sys.exit(130)
        except BrokenPipeError:  # as in `tp-twoaxis score ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except Exception as error:
            message = _message(error)
            if message is None or os.environ.get(TRACEBACK):
                raise
            print(f"tp-twoaxis: error: {message}", file=sys.stderr)
            sys.exit(2)
        sys.exit(status if isinstance(status, int) else 0)


def _message(error: Exception) -> str | None:
    """Say what does not fit, in one line; None for defects."""
    if isinstance(error, (TwoAxisError, OSError)):
        text = str(error)
    elif isinstance(error, ImportError):
        text = f"{error}; {INSTALL}"
    elif hasattr(error, "format_message"):
        # wrong usage: typer raises the installed click's exceptions or, since 0.25, those of its own copy
        text = f"{error.format_message()}{_given(error)} (--help lists what there is)"
    else:
        return None
    return " ".join(text.split())


def _given(error: Exception) -> str:
    """Say what value was refused, where typer keeps it from its message: it reads values by pydantic since 0.25."""
    found: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    return f", got {found[0]['input']!r}" if found else ""
