"""``tp-twoaxis scores``: all that ranks channels, by name."""

from __future__ import annotations

from typing import Annotated

import typer

from tp_twoaxis.cli.options import JsonOptions
from tp_twoaxis.cli.text_table import matching, text_table


def scores_command(
    *,
    text: Annotated[str | None, typer.Argument(help="Only those with this text in their row.")] = None,
    output: JsonOptions,
) -> None:
    """List what ranks channels: name, axis, what it needs, what it is.

    Scores of a layer, which `score`, `stability` and all-local mean, have a * behind their name. Options are written
    as in a call: hull(strength=1.0); --json lists them.
    """
    from tp_twoaxis.importance import find_criterion
    from tp_twoaxis.known_names import ALIASES, criterion_names

    found = [find_criterion(name) for name in criterion_names()]
    rows = [(c.name + "*" * (c.score is not None), c.axis, ", ".join(c.needs) or "weights", c.summary) for c in found]
    kept = matching(rows, text)
    shown = [found[i] for i in kept]
    output.show(
        {
            "scores": [
                {
                    "name": c.name,
                    "axis": c.axis,
                    "needs": list(c.needs),
                    "summary": c.summary,
                    "options": list(c.options),
                    "of_a_layer": c.score is not None,
                }
                for c in shown
            ],
            "aliases": ALIASES,
        },
        *text_table(("name", "axis", "needs", "what it is"), [rows[i] for i in kept]),
        *(f"{alias} is short for {name}" for alias, name in ALIASES.items() if text is None),
    )
