"""``tp-twoaxis repairs``: what refits a pruned network, by name."""

from __future__ import annotations

from tp_twoaxis.cli.options import JsonOptions
from tp_twoaxis.cli.text_table import text_table


def repairs_command(*, output: JsonOptions) -> None:
    """List the repairs of a pruned network: name, what it needs, what it does, what it makes superfluous.

    None needs labels, and all but distill do without training. Join several by a plus sign: ridge+bn.
    """
    from tp_twoaxis.repair.strategies import REPAIRS

    rows = [(r.name, ", ".join(r.needs), r.summary, ", ".join(r.contains)) for r in REPAIRS.values()]
    keys = ("name", "needs", "summary", "contains")
    values = [
        {"name": r.name, "needs": list(r.needs), "summary": r.summary, "contains": list(r.contains)}
        for r in REPAIRS.values()
    ]
    output.show({"repairs": values}, *text_table(keys, rows))
