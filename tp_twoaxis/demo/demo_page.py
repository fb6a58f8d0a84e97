"""The demo's report: one HTML file that opens offline, on a phone too, in light and dark."""

from __future__ import annotations

from functools import partial

import pandas as pd

from tp_twoaxis.demo.figures import accuracy_figure, axes_figure
from tp_twoaxis.demo.result import NEXT, QUICK_NOTE, RECOMMENDED, accuracy_lines, dense_accuracy, error_note
from tp_twoaxis.demo.verdict import verdict
from tp_twoaxis.diagnostics.channel_table import layer_summary
from tp_twoaxis.diagnostics.html_page import render, table, themed_picture
from tp_twoaxis.runtime.serialization import Json

CODE = """\
from tp_twoaxis import prune_to_flops, save_pruned

images, labels = next(iter(loader))  # labels are not read
report = prune_to_flops(model, images[:1], flops=0.5, loader=loader)
save_pruned(model, "pruned.safetensors", report)
"""


def render_demo(result: Json) -> str:
    """Build the report.

    Args:
        result: content of ``results.json``.

    Returns:
        A complete HTML document without references to anything outside itself.
    """
    channels, dense = pd.DataFrame(result["channels"]), dense_accuracy(result)
    header, lines = accuracy_lines(result)
    return render(
        "demo.html",
        title="tp-twoaxis demo",
        count=len(result["dense"]),
        macs=result["dense"][0]["macs"],
        dense=dense,
        warnings=[QUICK_NOTE] if result["quick"] else [],
        verdict=verdict(result, RECOMMENDED),
        accuracy=table(pd.DataFrame(lines, columns=header)),
        error_note=error_note(result),
        recommended=RECOMMENDED,
        curves=themed_picture(
            partial(accuracy_figure, pd.DataFrame(result["summary"]), dense),
            "Test accuracy over the share of multiply-adds kept: a colour a criterion, a style of line a repair.",
        ),
        axes=themed_picture(
            partial(axes_figure, channels),
            "First network: every channel by its rank within its layer on both axes, removed ones as crosses.",
        ),
        target=result["settings"]["targets"][0],
        correlation=layer_summary(channels).rank_correlation.median(),
        kept=table(_kept(result)),
        provenance=table(_provenance(result)),
        next=NEXT,
        code=CODE,
    )


def _kept(result: Json) -> pd.DataFrame:
    """Tabulate how many channels of each group the plans for the first network keep."""
    first, target = result["dense"][0]["seed"], result["settings"]["targets"][0]
    kept = {run["criterion"]: run["kept"] for run in result["runs"] if (run["seed"], run["target"]) == (first, target)}
    frame = pd.DataFrame({"dense": {group: sizes[1] for group, sizes in next(iter(kept.values())).items()}})
    for criterion, groups in kept.items():
        frame[criterion] = {group: sizes[0] for group, sizes in groups.items()}
    return frame.rename_axis("group").reset_index()


def _provenance(result: Json) -> pd.DataFrame:
    networks = [f"seed {n['seed']}: {n['accuracy']:.1%}, trained {n['seconds']:.1f} s" for n in result["dense"]]
    facts = {**result["provenance"], "networks": "; ".join(networks), "epochs": str(result["settings"]["epochs"])}
    return pd.DataFrame(facts.items(), columns=["what", "value"])
