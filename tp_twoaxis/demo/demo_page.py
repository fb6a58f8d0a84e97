"""The demo's report: one HTML file that opens offline, in light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

import pandas as pd
from matplotlib.figure import Figure

from tp_twoaxis.benchmark.curves import curves_figure
from tp_twoaxis.benchmark.report import wide_table
from tp_twoaxis.benchmark.tables import summary_table, trial_table
from tp_twoaxis.demo.result import (
    HALF,
    LOCAL,
    METHODS,
    QUICK_NOTE,
    at_target,
    binomial_error,
    dense_accuracy,
    rank_seconds,
)
from tp_twoaxis.diagnostics.channel_table import layer_summary
from tp_twoaxis.diagnostics.html_page import image_element, page, png_bytes, table_element
from tp_twoaxis.diagnostics.plots import plot_overview
from tp_twoaxis.runtime.serialization import Json

CODE = """\
from tp_twoaxis import LocalImportance, calibrate, prune_to_flops, save_pruned

stats = calibrate(model, loader)  # one forward pass; the loader yields (images, labels)
images, labels = next(iter(loader))
report = prune_to_flops(model, images[:1], LocalImportance(stats, "capture"), flops=0.5, loader=loader)
save_pruned(model, "pruned.safetensors", report)
"""

AXES = """
<p>A channel can be unimportant in two ways that have little to do with each other.</p>
<ul>
<li><b>Local axis: can its peers stand in for it?</b> Measured on the layer's own outputs, without labels.
<i>Input capture</i> (capture) is how far a channel's signal rises above the layer's noise floor; a channel that
hardly moves is a constant, which the next layer's bias or BatchNorm can replace. The <i>hull-refined</i>
score (hull) also lowers channels that up to eight peers can predict together.</li>
<li><b>Task axis: does it tell the answer?</b> <i>Task MI</i> (task-mi) is the information, in nats, that a channel's
mean response to an image carries about the network's margin for the right class.</li>
</ul>
<p>A channel can carry little about the task by itself and still be needed by the layers after it. Hence the advice to
prune by the first axis and to look at the second; whether it holds here, the numbers show.</p>
"""


def summarise(records: list[Json]) -> pd.DataFrame:
    """Average over the networks: a row for each method and target.

    Args:
        records: of all trials, none of which failed.

    Returns:
        Columns ``method, target, achieved, accuracy, standard_error`` (binomial, from the number of test images
        alone, not from the networks), ``lowest, highest, seconds`` (to rank, its calibration or backward pass
        included).
    """
    trials = trial_table(records)
    seconds = trials.assign(seconds=list(map(rank_seconds, records))).groupby(["criterion", "keep"]).seconds.mean()
    summary = summary_table(trials).drop(columns="method").rename(columns={"criterion": "method", "keep": "target"})
    images = records[0]["images"]["evaluated"]
    errors = [binomial_error(p, n * images) for p, n in zip(summary.accuracy, summary.seeds, strict=True)]
    times = [float(seconds[key]) for key in zip(summary.method, summary.target, strict=True)]
    columns = ["method", "target", "achieved", "accuracy", "standard_error", "lowest", "highest", "seconds"]
    return summary.assign(standard_error=errors, seconds=times)[columns]


def render(result: Json, records: list[Json]) -> str:
    """Build the report.

    Args:
        result: content of ``results.json``.
        records: of all trials.

    Returns:
        A complete HTML document without references to anything outside itself.
    """
    summary = summary_table(trial_table(records))
    channels = pd.DataFrame(result["channels"])
    return page(
        "tp-twoaxis demo",
        [
            "<h1>Two axes of a channel, on real digits</h1>",
            f"<p class='soft'>{_what(result)}</p>",
            *([f"<p class='note'>{QUICK_NOTE}</p>"] if result["quick"] else []),
            _verdict(result),
            "<h2>The two axes</h2>" + AXES,
            f"<h2>{HALF:.0%} of the MACs kept</h2>" + _half_table(result),
            "<h2>Accuracy over MACs</h2>" + _picture(curves_figure(summary, "digits"), "accuracy over MACs"),
            "<p class='soft'>Mean test accuracy in %, ± sample standard deviation over the networks, by share of MACs "
            f"kept. Achieved MACs are within {_largest_miss(records):.2%} of their target.</p>",
            table_element(wide_table(summary.assign(method=summary.criterion))),
            "<h2>Every channel on both axes</h2>" + _picture(plot_overview(channels), "both scores of every channel"),
            "<p class='soft'>First network; each point is a channel. Rank correlation of the two axes (Spearman): near "
            "0 they rank channels differently.</p>",
            _correlations(channels),
            "<h2>Where the channels went</h2>" + _kept(result),
            f"<h2>The same on your network</h2><pre><code>{escape(CODE)}</code></pre>",
            "<h2>Provenance</h2>" + _provenance(result),
        ],
    )


def _picture(figure: Figure, description: str) -> str:
    return image_element(png_bytes(figure), description)


def _what(result: Json) -> str:
    count = len(result["dense"])
    return (
        f"{count} small residual network{' was' if count == 1 else 's were'} trained on scikit-learn's handwritten "
        f"digits ({result['dense'][0]['macs']:,} MACs, {dense_accuracy(result):.1%} test accuracy), pruned by "
        f"{len(METHODS)} criteria to the same MACs, BatchNorm re-estimated on the 300 calibration images, and tested. "
        "Nothing was fine-tuned."
    )


def _verdict(result: Json) -> str:
    """Put into words what came out, whatever it is."""
    sentences = []
    for target in (target for target in result["settings"]["targets"] if target <= HALF):
        order = at_target(result["summary"], target)
        first, second = order[:2]
        gap = first["accuracy"] - second["accuracy"]
        error = math.hypot(first["standard_error"], second["standard_error"])
        text = (
            f"<b>{target:.0%} of the MACs:</b> {first['method']} is best with {first['accuracy']:.1%}, "
            f"{100 * gap:.1f} points before {second['method']}, {'more' if gap > 2 * error else 'less'} than two "
            f"standard errors of the difference ({200 * error:.1f} points)."
        )
        place, local = next((i, row) for i, row in enumerate(order, 1) if row["method"] == LOCAL)
        if place > 2:
            behind = 100 * (first["accuracy"] - local["accuracy"])
            text += f" {LOCAL} is number {place} with {local['accuracy']:.1%}, {behind:.1f} points behind."
        sentences.append(f"<li>{text}</li>")
    return (
        f"<ul>{''.join(sentences)}</ul><p class='soft'>A data set this small and so few networks show how the tools "
        "work and are no benchmark. The binomial standard error counts test images only; other networks may give "
        "another order, see the ranges. Test sets of different networks overlap in part.</p>"
    )


def _half_table(result: Json) -> str:
    lines = [["dense", "", "100.0 %", f"{dense_accuracy(result):.1%}", "", ""]]
    lines += [
        [
            row["method"],
            METHODS[row["method"]],
            f"{100 * row['achieved']:.1f} %",
            f"{row['accuracy']:.1%} ± {row['standard_error']:.1%}",
            f"{row['lowest']:.1%} to {row['highest']:.1%}",
            f"{row['seconds']:.2f} s",
        ]
        for row in at_target(result["summary"], HALF)
    ]
    head = ["method", "looks at", "kept MACs", "test accuracy", "worst to best network", "time to rank"]
    return table_element(pd.DataFrame(lines, columns=head)) + (
        f"<p class='soft'>Mean ± binomial standard error of {len(result['dense'])} x {result['test_images']} test "
        "images. Time to rank includes the method's calibration pass or backward pass over 300 images.</p>"
    )


def _largest_miss(records: Iterable[Json]) -> float:
    return max(abs(float(record["achieved"]) / float(record["keep"]) - 1) for record in records)


def _correlations(channels: pd.DataFrame) -> str:
    table = layer_summary(channels)[["layer", "channels", "capture", "task_mi", "rank_correlation"]]
    table["removed"] = channels.groupby("layer", sort=False).removed.sum().to_numpy()
    median = f"<p class='soft'>Median over the layers: {table.rank_correlation.median():+.2f}.</p>"
    return table_element(table, "{:.3f}") + median


def _kept(result: Json) -> str:
    """Tabulate how many channels of each group the plans for the first network keep."""
    first = result["dense"][0]["seed"]
    kept = {run["method"]: run["kept"] for run in result["runs"] if (run["seed"], run["target"]) == (first, HALF)}
    table = pd.DataFrame({"dense": {group: sizes[1] for group, sizes in kept[LOCAL].items()}})
    for method, groups in kept.items():
        table[method] = {group: sizes[0] for group, sizes in groups.items()}
    caption = (
        "<p class='soft'>First network: channels that each group of coupled channels, named by its root layer, keeps "
        f"at {HALF:.0%} of the MACs. Same MACs, other channels: early layers cost more each.</p>"
    )
    return caption + table_element(table.rename_axis("group").reset_index())


def _provenance(result: Json) -> str:
    networks = [f"seed {n['seed']}: {n['accuracy']:.1%}, trained {n['seconds']:.1f} s" for n in result["dense"]]
    facts = {**result["provenance"], "networks": "; ".join(networks), "epochs": str(result["settings"]["epochs"])}
    with pd.option_context("display.max_colwidth", None):
        return f"<div class='text'>{table_element(pd.DataFrame(facts.items(), columns=['what', 'value']))}</div>"
