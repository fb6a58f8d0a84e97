"""The demo's report: one HTML file that opens offline, on a phone too, in light and dark."""

from __future__ import annotations

from functools import partial
from html import escape

import pandas as pd

from tp_twoaxis.demo.figures import accuracy_figure, axes_figure, themed_picture
from tp_twoaxis.demo.result import NEXT, QUICK_NOTE, RECOMMENDED, accuracy_lines, dense_accuracy, error_note
from tp_twoaxis.demo.verdict import verdict
from tp_twoaxis.diagnostics.channel_table import layer_summary
from tp_twoaxis.diagnostics.html_page import page, table_element
from tp_twoaxis.runtime.serialization import Json

CODE = """\
from tp_twoaxis import prune_to_flops, save_pruned

images, labels = next(iter(loader))  # labels are not read
report = prune_to_flops(model, images[:1], flops=0.5, loader=loader)
save_pruned(model, "pruned.safetensors", report)
"""

AXES = """
<ul style='max-width: 52rem'>
<li><b>Local axis: can its peers stand in for it?</b> Measured on what the layers deliver, without labels. capture, the
rank in the picture, asks it of each channel alone; anticipating of channels together, in the repaired network.</li>
<li><b>Task axis: does it tell the answer?</b> task-mi is what the channel's mean response says about the network's
margin for the right class. It explains a channel; nothing here is chosen by it.</li>
</ul>
"""


def render(result: Json) -> str:
    """Build the report.

    Args:
        result: content of ``results.json``.

    Returns:
        A complete HTML document without references to anything outside itself.
    """
    channels = pd.DataFrame(result["channels"])
    header, lines = accuracy_lines(result)
    curves = partial(accuracy_figure, pd.DataFrame(result["summary"]), dense_accuracy(result))
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict(result, RECOMMENDED))
    return page(
        "tp-twoaxis demo",
        [
            "<h1>Pruning small networks, without training again</h1>",
            f"<p class='soft'>{_what(result)}</p>",
            *([f"<p class='note'>{QUICK_NOTE}</p>"] if result["quick"] else []),
            f"<ul style='max-width: 52rem'>{sentences}</ul>",
            "<h2>Accuracy by share of the multiply-adds kept</h2>",
            table_element(pd.DataFrame(lines, columns=header)),
            f"<p class='soft'>{error_note(result)} <b>{RECOMMENDED}</b> is what the package does by default. "
            "Networks and images are few and small: this shows how the tools work, and is no benchmark.</p>",
            themed_picture(curves, "test accuracy over the share of multiply-adds kept, by criterion and repair"),
            "<h2>The two axes of a channel</h2>" + AXES,
            themed_picture(partial(axes_figure, channels), "rank of every channel on both axes, and which are removed"),
            _axes_words(channels, result["settings"]["targets"][0]),
            "<h2>Where the channels went</h2>" + _kept(result),
            f"<details><summary>How this was made</summary>{_provenance(result)}</details>",
            "<h2>Next: your own network</h2>",
            f"<pre style='white-space: pre-wrap'><code>{NEXT}</code></pre>",
            f"<p>or, in Python,</p><pre><code>{escape(CODE)}</code></pre>",
        ],
    )


def _what(result: Json) -> str:
    count = len(result["dense"])
    return (
        f"{count} residual network{' was' if count == 1 else 's were'} trained on scikit-learn's handwritten digits "
        f"({result['dense'][0]['macs']:,} multiply-adds, {dense_accuracy(result):.1%} test accuracy), and copies were "
        "pruned to equal multiply-adds. The name before the + says what ranked the channels, the name after it what "
        "repaired the rest from 300 images, without labels: bn estimates BatchNorm's statistics anew, joint refits "
        "weights too. Nothing was fine-tuned."
    )


def _axes_words(channels: pd.DataFrame, target: float) -> str:
    median = layer_summary(channels).rank_correlation.median()
    return (
        f"<p class='soft'>First network; each mark is a channel, placed by its rank within its layer, and crosses are "
        f"those that {RECOMMENDED} removes to keep {target:.0%} of the multiply-adds. Rank correlation of the axes "
        f"(Spearman), median over the layers: {median:+.2f}; at 0 they rank channels independently.</p>"
    )


def _kept(result: Json) -> str:
    """Tabulate how many channels of each group the plans for the first network keep."""
    first, target = result["dense"][0]["seed"], result["settings"]["targets"][0]
    kept = {run["criterion"]: run["kept"] for run in result["runs"] if (run["seed"], run["target"]) == (first, target)}
    table = pd.DataFrame({"dense": {group: sizes[1] for group, sizes in next(iter(kept.values())).items()}})
    for criterion, groups in kept.items():
        table[criterion] = {group: sizes[0] for group, sizes in groups.items()}
    caption = (
        "<p class='soft'>First network: channels that each group of coupled channels, named by its root layer, keeps "
        f"with {target:.0%} of the multiply-adds.</p>"
    )
    return caption + table_element(table.rename_axis("group").reset_index())


def _provenance(result: Json) -> str:
    networks = [f"seed {n['seed']}: {n['accuracy']:.1%}, trained {n['seconds']:.1f} s" for n in result["dense"]]
    facts = {**result["provenance"], "networks": "; ".join(networks), "epochs": str(result["settings"]["epochs"])}
    with pd.option_context("display.max_colwidth", None):
        return f"<div class='text'>{table_element(pd.DataFrame(facts.items(), columns=['what', 'value']))}</div>"
