"""The demo's report: one HTML file that opens offline, in light and dark."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from tp_twoaxis.demo import figures
from tp_twoaxis.demo.methods import LOCAL, METHODS
from tp_twoaxis.demo.result import Summary, by_accuracy, method_of

if TYPE_CHECKING:
    from tp_twoaxis.demo.run import Demo

CODE = """\
from tp_twoaxis import LocalImportance, calibrate, prune_to_flops, save_pruned

stats = calibrate(model, loader)  # one forward pass; the loader yields (images, labels)
images, labels = next(iter(loader))
report = prune_to_flops(model, images[:1], LocalImportance(stats, "capture"), flops=0.5, loader=loader)
save_pruned(model, "pruned.safetensors", report)
"""

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --soft: #5c5c5c; --grid: #d4d4d4; --card: #f5f5f3;
  LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #141517; --ink: #e6e6e6; --soft: #a3a3a3; --grid: #3c3f44;
  --card: #1e2023; DARK } }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; }
p, ul { max-width: 46rem; } li { margin: .25rem 0; }
.soft, caption, figcaption { color: var(--soft); font-size: .9rem; }
.verdict { border-left: 4px solid var(--capture); background: var(--card); padding: .7rem 1rem; max-width: 46rem; }
.warn { border-left-color: var(--task-mi); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; caption-side: bottom; }
th, td { text-align: left; padding: .38rem .7rem .38rem 0; border-bottom: 1px solid var(--grid); white-space: nowrap; }
td.n, th.n { text-align: right; }
.prov td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.bar { display: inline-block; width: 11rem; height: .8rem; background: var(--card); vertical-align: middle; }
.bar i { display: block; height: 100%; }
.dot { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .5rem; }
.hollow { border: 2px dashed var(--soft); box-sizing: border-box; }
.best { font-weight: 700; }
pre { background: var(--card); padding: .9rem 1rem; overflow-x: auto; font-size: .88rem; line-height: 1.5; }
figure { margin: 1rem 0; } figure svg { width: 100%; min-width: 36rem; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
"""

AXES = """
<p>A channel can be unimportant in two ways that have little to do with each other.</p>
<ul>
<li><b>Local axis: can its peers stand in for it?</b> Measured on the layer's own outputs, without labels.
<i>Input capture</i> says how far a channel's signal rises above the layer's noise floor; a channel that hardly moves
is a constant, which the next layer's bias or BatchNorm can replace. The <i>hull-refined</i> score also lowers
channels that up to eight peers can predict together.</li>
<li><b>Task axis: does it tell the answer?</b> <i>Task MI</i> is the information, in nats, that a channel's
mean response to an image carries about the network's margin for the right class.</li>
</ul>
<p>A channel can say little about the task by itself and still be needed by the layers after it. Hence the advice to
prune by the first axis and to look at the second; whether it holds here, the numbers say.</p>
"""


def render(demo: Demo, rows: list[Summary]) -> str:
    """Build the report.

    Args:
        demo: all that was measured.
        rows: its summaries.

    Returns:
        A complete HTML document without references to anything outside itself.
    """
    from tp_twoaxis.demo.run import MAIN_TARGET

    main = by_accuracy([row for row in rows if row.target == MAIN_TARGET])
    sections = [
        "<h1>Two axes of a channel, on real digits</h1>",
        f"<p class='soft'>{_what(demo)}</p>",
        _verdict(demo, rows),
        "<h2>The two axes</h2>" + AXES,
        f"<h2>{MAIN_TARGET:.0%} of the MACs kept</h2>" + _main_table(demo, main),
        "<h2>Accuracy over MACs</h2>" + _curves(demo, rows) + _all_table(demo, rows),
        "<h2>Every channel on both axes</h2>" + _two_axes(demo),
        "<h2>Where the channels went</h2>" + _kept(demo, MAIN_TARGET),
        "<h2>The same on your network</h2>" + f"<pre><code>{escape(CODE)}</code></pre>",
        "<h2>Provenance</h2>" + _provenance(demo),
    ]
    light = " ".join(f"--{method.name}: {method.light};" for method in METHODS)
    dark = " ".join(f"--{method.name}: {method.dark};" for method in METHODS)
    css = CSS.replace("LIGHT", light).replace("DARK", dark)
    return (
        "<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>tp-twoaxis demo</title>\n<style>{css}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _what(demo: Demo) -> str:
    count = len(demo.dense)
    return (
        f"{count} small residual network{' was' if count == 1 else 's were'} trained on scikit-learn's handwritten "
        f"digits ({demo.dense[0].macs:,} MACs, "
        f"{demo.dense_accuracy:.1%} test accuracy), pruned by {len(METHODS)} criteria to the same MACs, BatchNorm "
        "re-estimated on the 300 calibration images, and tested. Nothing was fine-tuned."
    )


def _verdict(demo: Demo, rows: list[Summary]) -> str:
    """Say what came out, whatever it is."""
    sentences = []
    for target in sorted({row.target for row in rows if row.target <= 0.5}, reverse=True):
        order = by_accuracy([row for row in rows if row.target == target])
        first, second = order[:2]
        place = [row.method for row in order].index(LOCAL) + 1
        gap = first.accuracy - second.accuracy
        error = math.hypot(first.standard_error, second.standard_error)
        clear = "more" if gap > 2 * error else "less"
        text = (
            f"<b>{target:.0%} of the MACs:</b> {method_of(first.method).label} is best with {first.accuracy:.1%}, "
            f"{100 * gap:.1f} points before {method_of(second.method).label}, {clear} than two standard errors "
            f"of the difference ({200 * error:.1f} points)."
        )
        if place > 2:
            behind = 100 * (first.accuracy - order[place - 1].accuracy)
            text += (
                f" Local capture is number {place} with {order[place - 1].accuracy:.1%}, {behind:.1f} points behind."
            )
        sentences.append(f"<li>{text}</li>")
    warning = ""
    if demo.quick:
        warning = (
            "<p class='verdict warn'><b>Quick run:</b> one hardly trained network, to see that all works. "
            "The order of the methods means nothing.</p>"
        )
    caveat = (
        "<p class='soft'>A data set this small and so few networks show how the tools work and are no benchmark. "
        "The binomial standard error counts test images only; other networks may give another order, see the "
        "ranges. Test sets of different networks overlap in part.</p>"
    )
    return f"{warning}<div class='verdict'><ul>{''.join(sentences)}</ul>{caveat}</div>"


def _networks(demo: Demo) -> str:
    count = len(demo.dense)
    return "one network" if count == 1 else f"{count} networks"


def _bar(share: float, colour: str) -> str:
    return f"<span class='bar'><i style='width:{100 * share:.1f}%;background:var(--{colour})'></i></span>"


def _name(method: str) -> str:
    return f"<span class='dot' style='background:var(--{method})'></span>{escape(method_of(method).label)}"


def _main_table(demo: Demo, rows: list[Summary]) -> str:
    head = (
        "<tr><th>method</th><th>looks at</th><th class='n'>kept MACs</th><th>test accuracy</th>"
        "<th class='n'>mean ± s.e.</th><th class='n'>worst to best network</th><th class='n'>time to rank</th></tr>"
    )
    dense = (
        "<tr><td><span class='dot hollow'></span>dense</td><td></td><td class='n'>100.0 %</td>"
        f"<td>{_bar(demo.dense_accuracy, 'soft')}</td><td class='n'>{demo.dense_accuracy:.1%}</td><td></td><td></td>"
        "</tr>"
    )
    body = "".join(
        f"<tr><td>{_name(row.method)}</td><td>{method_of(row.method).kind}</td>"
        f"<td class='n'>{100 * row.achieved:.1f} %</td><td>{_bar(row.accuracy, row.method)}</td>"
        f"<td class='n'>{row.accuracy:.1%} ± {row.standard_error:.1%}</td>"
        f"<td class='n'>{row.lowest:.1%} to {row.highest:.1%}</td><td class='n'>{row.seconds:.2f} s</td></tr>"
        for row in rows
    )
    caption = (
        f"Mean of {_networks(demo)}. s.e.: binomial standard error of {len(demo.dense)} x {demo.test_images} test "
        "images. Time to rank includes the method's calibration pass or backward pass over 300 images."
    )
    return f"<div class='wide'><table><caption>{caption}</caption>{head}{dense}{body}</table></div>"


def _all_table(demo: Demo, rows: list[Summary]) -> str:
    targets = sorted({row.target for row in rows}, reverse=True)
    best = {target: max(row.accuracy for row in rows if row.target == target) for target in targets}
    head = "<tr><th>MACs kept</th>" + "".join(f"<th class='n'>{target:.0%}</th>" for target in targets) + "</tr>"
    body = ""
    for method in METHODS:
        body += f"<tr><td>{_name(method.name)}</td>"
        for row in (row for row in rows if row.method == method.name):
            mark = " best" if row.accuracy == best[row.target] else ""
            body += f"<td class='n{mark}'>{row.accuracy:.1%} ± {row.standard_error:.1%}</td>"
        body += "</tr>"
    caption = f"Mean test accuracy ± one binomial standard error; bold: highest mean. Dense: {demo.dense_accuracy:.1%}."
    return f"<div class='wide'><table><caption>{caption}</caption>{head}{body}</table></div>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure><div class='wide'>{svg}</div><figcaption>{caption}</figcaption></figure>"


def _curves(demo: Demo, rows: list[Summary]) -> str:
    off = max(abs(run.achieved / run.target - 1) for run in demo.runs)
    caption = (
        "Large markers: mean over the networks, bars one binomial standard error. Small dots: single networks. "
        f"Markers are moved sideways a little so that they do not hide each other; achieved MACs are within {off:.2%} "
        "of their target."
    )
    return _figure(figures.to_svg(figures.curves(demo, rows), "Accuracy over MACs for every method"), caption)


def _two_axes(demo: Demo) -> str:
    agreement = float(np.median(figures.axes_agreement(demo)))
    caption = (
        "First network; each point is a channel, each panel a group of coupled channels with its own scale. A stream "
        "is a residual stream, written by several layers, whose scores are averaged. ρ is the rank correlation of the "
        f"two axes; its median over the groups is {agreement:+.2f}. One threshold on capture over its group's mean "
        "decides for all groups."
    )
    return _figure(figures.to_svg(figures.two_axes(demo), "Both scores of every channel"), caption)


def _kept(demo: Demo, target: float) -> str:
    caption = f"First network at {target:.0%} of the MACs. Same MACs, other channels: early layers cost more each."
    return _figure(figures.to_svg(figures.kept_channels(demo, target), "Kept channels of two plans"), caption)


def _provenance(demo: Demo) -> str:
    networks = "; ".join(f"seed {n.seed}: {n.accuracy:.1%}, trained {n.seconds:.1f} s" for n in demo.dense)
    facts = {**demo.provenance, "networks": networks, "epochs": str(demo.settings.epochs)}
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return f"<div class='wide prov'><table>{body}</table></div>"
