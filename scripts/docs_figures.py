"""Draw the pictures of the documentation from committed results.

python scripts/docs_figures.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Rectangle

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
GREY, RED, BLUE, GREEN = "#808080", "#d1495b", "#3a86c8", "#2a9d6f"  # seen on white and on black
REPAIRS = ("none", "bn", "bias+bn", "ridge+bn", "patch+bn", "sequential", "joint")
NETWORKS = {"resnet20_conv_shortcut": "convolutions in shortcuts", "resnet20_option_a": "no weights in shortcuts"}
CRITERIA = {"l2": (GREY, "s", "L2 norm"), "hull": (BLUE, "o", "hull"), "anticipating": (GREEN, "^", "anticipating")}


def main() -> None:
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "tp-twoaxis",
            "font.size": 11,
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), GREY),
        }
    )
    figures = {"accuracy": accuracy(), "repairs": repairs(), "idea": idea(), "seconds": seconds()}
    for name, figure in figures.items():
        figure.savefig(PICTURES / f"{name}.svg", transparent=True, metadata={"Date": None})


def panels(figure: Figure, table: pd.DataFrame) -> Iterator[tuple[Axes, pd.DataFrame]]:
    """Make a panel for each network, side by side, and select its rows."""
    for axes, (network, title) in zip(figure.subplots(1, 2, sharey=True), NETWORKS.items(), strict=True):
        axes.set_title(f"ResNet-20, {title}", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        yield axes, table[table.network == network]


def accuracy() -> Figure:
    """Draw accuracy against multiply-adds kept: criteria of Torch-Pruning before and after repair, and ours."""
    table = pd.read_csv(ROOT / "benchmarks/results/cifar10_recipe/summary.csv")
    lines = {
        "taylor+bn": (GREY, "s", ":", "Taylor, BatchNorm re-estimated"),
        "l2+bn": (GREY, "o", ":", "L2, BatchNorm re-estimated"),
        "l2+joint": (BLUE, "o", "--", "L2, our repair"),
        "anticipating+joint": (GREEN, "^", "-", "our selection and repair"),
    }
    figure = Figure(figsize=(8, 3.9), layout="constrained")
    for axes, own in panels(figure, table.sort_values("keep")):
        axes.axhline(100 * own.dense.iloc[0], color=GREY, linewidth=1)
        axes.text(70, 100 * own.dense.iloc[0] + 1, "original network", va="bottom", ha="left", fontsize=9)
        for method, (color, marker, style, label) in lines.items():
            shown = own[own.method == method]
            axes.plot(100 * shown.keep, 100 * shown.accuracy, color=color, marker=marker, linestyle=style, label=label)
        axes.set_xticks([35, 50, 70])
        axes.set_xlabel("multiply-adds kept, %")
        axes.invert_xaxis()
        axes.set_ylim(0, 102)
    figure.axes[0].set_ylabel("CIFAR-10 test accuracy, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    return figure


def seconds() -> Figure:
    """Draw accuracy at half of the multiply-adds against the seconds of selection, removal and repair."""
    folder = ROOT / "benchmarks/results/cifar10_recipe"
    table = pd.read_csv(folder / "summary.csv").query("keep == 0.5")
    times = pd.read_csv(folder / "timing.csv")
    times["seconds"] = times.total - times.evaluate
    table = table.merge(times[["network", "method", "seconds"]], on=["network", "method"])
    colors = {"bn": GREY, "sequential": BLUE, "joint": GREEN}
    markers = {"taylor": "v", "l2": "s", "hull": "o", "anticipating": "^"}
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    for axes, own in panels(figure, table):
        for _, row in own.iterrows():
            criterion, repair = row.method.split("+")
            axes.scatter(row.seconds, 100 * row.accuracy, color=colors[repair], marker=markers[criterion], s=45)
        axes.axhline(100 * own.dense.iloc[0], color=GREY, linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(table.seconds.min() / 1.5, table.seconds.max() * 1.5)
        axes.set_xticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.set_ylim(15, 102)
        axes.set_xlabel("seconds on one CPU core")
    figure.axes[0].set_ylabel("CIFAR-10 test accuracy, %")
    handles = [Line2D([], [], color=GREY, marker=m, linestyle="", label=name) for name, m in markers.items()]
    handles += [Line2D([], [], color=color, linewidth=6, label=f"repair {name}") for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    return figure


def repairs() -> Figure:
    """Draw accuracy by repair at half of the multiply-adds, for three criteria on two networks."""
    table = pd.read_csv(ROOT / "benchmarks/results/cifar10_repair/summary.csv")
    table = table[table.keep == 0.5]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    for axes, own in panels(figure, table):
        axes.axhline(100 * own.dense.iloc[0], color=GREY, linestyle=":", linewidth=1)
        axes.text(0, 100 * own.dense.iloc[0] - 1, "dense network", va="top", fontsize=9)
        for criterion, (color, marker, label) in CRITERIA.items():
            shown = own[own.criterion == criterion].set_index("treatment").accuracy.reindex(REPAIRS)
            axes.plot(range(len(REPAIRS)), 100 * shown, color=color, marker=marker, label=label)
        axes.set_xticks(range(len(REPAIRS)), REPAIRS, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_ylim(0, 100)
    figure.axes[0].set_ylabel("test accuracy, %")
    figure.axes[1].legend(frameon=False, loc="lower right", title="channels ranked by")
    figure.supxlabel("repair", fontsize=11)
    return figure


def idea() -> Figure:
    """Draw what a repair does to the weights that read a removed channel."""
    figure = Figure(figsize=(8, 2.7), layout="constrained")
    titles = ("dense", "pruned", "pruned and repaired")
    for axes, title in zip(figure.subplots(1, 3), titles, strict=True):
        for channel in range(4):
            gone = title != "dense" and channel == 1
            color = RED if channel == 1 else BLUE
            axes.add_patch(
                Rectangle((0, 3 - channel), 0.9, 0.7, facecolor="none" if gone else color, edgecolor=color, alpha=0.8)
            )
            if not gone:
                color, width = (GREEN, 2.6) if title.endswith("repaired") else (GREY, 1.2)
                ends = (0.95, 3.35 - channel), (2.5, 1.85)
                axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=9, color=color, linewidth=width))
        axes.add_patch(Rectangle((2.55, 1.4), 0.9, 0.9, facecolor=GREY, alpha=0.6))
        axes.set_title(title, fontsize=11)
        axes.set_xlim(-0.1, 3.6)
        axes.set_ylim(-0.2, 4)
        axes.set_axis_off()
    return figure


if __name__ == "__main__":
    main()
