r"""What everything costs, as ratios within one run: calibration, selection, repair, removal, planning, wide layers.

    python benchmarks/speed.py                                       # all parts, hours on two CPU cores
    python benchmarks/speed.py --parts passes --networks resnet50 vit_b_16
    python benchmarks/speed.py --parts recipes --networks resnet50 --images 1024

Parts:

- ``passes``: ``calibrate()``, at 224 pixels also with the positions an image that 1,024 images get, the same with all
  positions, and forward + backward of the cross-entropy (what Taylor needs), against a plain forward pass over the same
  batches, medians over alternating rounds of the ratios within a round, so that a drift of the machine's speed cancels;
  the last two run in the first round only;
- ``growth``: ``calibrate()`` against plain forward for fewer images and smaller batches;
- ``recipes``: criteria that gather something of their own and repairs, against ``calibrate()`` over the same images;
- ``removal``: score, plan and removal with statistics in hand, against a step of Torch-Pruning's pruner with its
  magnitude, alternating;
- ``planner``: a plan for 60 groups of 1,024 channels;
- ``wide``: scores that look at peers, for layers of 512 to 4,096 channels.

Weights are random, images noise of a contrast and a brightness of their own each: among images that were all alike,
layers would write channels whose means hardly differ, for which calibration sums once more in float64. Peak memory is
of the whole process, resident, while a row ran. Run it on an idle machine. Rows that ``results/speed.json`` holds
already are replaced.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch_pruning as tp
from provenance import RESULTS, provenance
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tp_twoaxis import calibrate, prune_to_flops
from tp_twoaxis.dependency.cost import CostModel, Side, Term
from tp_twoaxis.importance import make_importance
from tp_twoaxis.models import build_model
from tp_twoaxis.pruning.plan import make_plan
from tp_twoaxis.pruning.portions import ScoredGroup
from tp_twoaxis.runtime.freed_memory import give_back
from tp_twoaxis.runtime.serialization import write_bytes
from tp_twoaxis.scores.cluster import spectral_clusters
from tp_twoaxis.scores.hull import greedy_hulls

# network -> side of its images, images, batch
NETWORKS = {
    "resnet50": (224, 128, 32),
    "vit_b_16": (224, 64, 16),
    "mobilenet_v2": (224, 128, 32),
    "cifar_resnet18": (32, 1024, 128),
    "cifar_resnet56_option_a": (32, 1024, 128),
}
# network -> positions that nearly all of its layers take of an image where 1,024 come: rows are budgeted by channels
MANY_IMAGES = {"resnet50": 16, "vit_b_16": 16}
PARTS = ("passes", "growth", "recipes", "removal", "planner", "wide")
CRITERIA = ("taylor", "host-hessian", "chip", "hull", "anticipating")
REPAIRS = ("bn", "ridge", "patch", "sequential", "joint")
WIDTHS = (512, 1024, 2048, 4096)
KEY = ("part", "network", "what", "images", "batch")
Batches = list[tuple[Tensor, Tensor]]
Row = dict[str, Any]


class Bench:
    """A network with random images, and what is timed with it."""

    def __init__(self, name: str, images: int | None, batch: int | None, device: str) -> None:
        size, usual, together = NETWORKS[name]
        self.name, self.images, self.batch = name, images or usual, batch or together
        self.device = torch.device(device)
        torch.manual_seed(0)
        self.model = build_model(name, num_classes=1000 if size == 224 else 10).eval().to(self.device)
        if self.device.type == "cpu":
            self.model = self.model.to(memory_format=torch.channels_last)
        contrast, brightness = 0.3 + 1.5 * torch.rand(self.images, 1, 1, 1), torch.randn(self.images, 3, 1, 1)
        pixels = contrast * torch.randn(self.images, 3, size, size) + brightness
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(10, (self.images,))
        self.batches: Batches = list(zip(pixels.split(self.batch), labels.split(self.batch), strict=True))
        self.example = pixels[:1].to(self.device)

    def forward(self) -> None:
        """Run all images, without gradients."""
        with torch.no_grad():
            for images, _ in self.batches:
                self.model(images.to(self.device))

    def backward(self) -> None:
        """Run all images, and the gradients of the cross-entropy."""
        for images, labels in self.batches:
            F.cross_entropy(self.model(images.to(self.device)), labels.to(self.device)).backward()
        self.model.zero_grad()

    def calibrate(self, **options: Any) -> Any:
        """Gather statistics of all images."""
        return calibrate(self.model, self.batches, max_images=None, progress=False, **options)

    def row(self, part: str, what: str, seconds: float | None, **more: Any) -> Row:
        """Make a row of the results about this network."""
        return make_row(part, self.name, what, seconds, images=self.images, batch=self.batch, **more)


def make_row(part: str, network: str, what: str, seconds: float | None, **more: Any) -> Row:
    """Make a row of the results."""
    own = {
        "part": part,
        "network": network,
        "what": what,
        "images": "",
        "batch": "",
        "seconds": "" if seconds is None else round(seconds, 3),
    }
    return own | more


def timed(run: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds of the wall clock, and the peak of resident memory in MiB (of GPU memory on one)."""
    give_back()
    counter = Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    elif counter.exists():
        counter.write_text("5")
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) // 2**20
    seconds, status = time.perf_counter() - start, Path("/proc/self/status")
    if not status.exists():
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20  # bytes on macOS
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return seconds, int(line.split()[1]) // 1024


class Alternated(NamedTuple):
    """What took turns: median seconds, median ratio to the first of all, largest peak in MiB, rounds that it ran in."""

    seconds: float
    ratio: float
    peak: int
    rounds: int


def alternate(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device, seldom: Collection[str] = ()
) -> dict[str, Alternated]:
    """Run all in turn, so many times.

    Those of ``seldom`` run in the first round only.
    """
    found: dict[str, dict[int, tuple[float, int]]] = {name: {} for name in runs}
    for name, run in runs.items():
        if name not in seldom:
            run()  # warm
    for number in tqdm(range(rounds), leave=False):
        for name, run in runs.items():
            if name not in seldom or number == 0:
                found[name][number] = timed(run, device)
    first = found[next(iter(runs))]
    return {
        name: Alternated(
            statistics.median(seconds for seconds, _ in own.values()),
            statistics.median(seconds / first[number][0] for number, (seconds, _) in own.items()),
            max(peak for _, peak in own.values()),
            len(own),
        )
        for name, own in found.items()
    }


def passes(bench: Bench, rounds: int) -> Iterator[Row]:
    """Calibration and backward passes against plain forward passes."""
    runs: dict[str, Callable[[], object]] = {"forward": bench.forward, "calibrate": bench.calibrate}
    if positions := MANY_IMAGES.get(bench.name):
        runs[f"calibrate, {positions} positions, as of 1,024 images"] = lambda: bench.calibrate(positions=positions)
    found = alternate(
        {
            **runs,
            "calibrate, all positions": lambda: bench.calibrate(positions="all"),
            "forward + backward": bench.backward,
        },
        rounds,
        bench.device,
        seldom=("calibrate, all positions", "forward + backward"),
    )
    for what, own in found.items():
        ratio = round(own.ratio, 3)
        yield bench.row("passes", what, own.seconds, ratio=ratio, of="forward", rounds=own.rounds, peak_mib=own.peak)
    ratio = found["calibrate"].ratio / found["forward + backward"].ratio
    yield bench.row("passes", "calibrate / (forward + backward)", None, ratio=round(ratio, 3), of="forward + backward")


def growth(bench: Bench, rounds: int) -> Iterator[Row]:
    """Calibration against plain forward for fewer images, and for smaller batches."""
    for images, batch in ((bench.images // 4, bench.batch), (bench.images // 2, bench.batch), (bench.images, 8)):
        own = Bench(bench.name, images, batch, bench.device.type)
        found = alternate({"forward": own.forward, "calibrate": own.calibrate}, rounds, bench.device)
        seconds, ratio, peak, ran = found["calibrate"]
        yield own.row("growth", "calibrate", seconds, ratio=round(ratio, 3), of="forward", rounds=ran, peak_mib=peak)


def recipes(bench: Bench, criteria: list[str], repairs: list[str]) -> Iterator[Row]:
    """Criteria and repairs against calibration over the same images, once each."""
    bench.forward()
    first, peak = timed(bench.calibrate, bench.device)
    yield bench.row("recipes", "calibrate", first, ratio=1.0, of="calibrate", peak_mib=peak)
    options: dict[str, Any] = {"repair": (), "loader": bench.batches, "max_images": None, "progress": False}
    for criterion in criteria:
        model = copy.deepcopy(bench.model)

        def select(criterion: str = criterion, model: nn.Module = model) -> None:
            prune_to_flops(model, bench.example, criterion, flops=0.5, **options)

        seconds, peak = timed(select, bench.device)
        yield bench.row("recipes", criterion, seconds, ratio=round(seconds / first, 3), of="calibrate", peak_mib=peak)
    importance = make_importance("hull", stats=bench.calibrate())
    for repair in repairs:
        model = copy.deepcopy(bench.model)
        phases: dict[str, float] = {}

        def mend(repair: str = repair, model: nn.Module = model, phases: dict[str, float] = phases) -> None:
            made = prune_to_flops(model, bench.example, importance, flops=0.5, **options | {"repair": repair})
            phases.update(made.seconds)

        _, peak = timed(mend, bench.device)
        seconds = phases["repair"]
        yield bench.row(
            "recipes",
            f"repair {repair}",
            seconds,
            ratio=round(seconds / first, 3),
            of="calibrate",
            peak_mib=peak,
            phases={phase: round(value, 2) for phase, value in phases.items() if phase.startswith("repair/")},
        )


def removal(bench: Bench, rounds: int) -> Iterator[Row]:
    """Score, plan and removal against Torch-Pruning's pruner with its magnitude."""
    stats = bench.calibrate(positions=16, target=None)
    inside: list[float] = []

    def ours() -> None:
        report = prune_to_flops(copy.deepcopy(bench.model), bench.example, "capture", flops=0.5, repair=(), stats=stats)
        inside.append(sum(report.seconds[phase] for phase in ("score", "plan", "remove")))

    def theirs() -> None:
        model = copy.deepcopy(bench.model)
        heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
        importance = tp.importance.MagnitudeImportance()
        options = {"global_pruning": True, "pruning_ratio": 0.29, "ignored_layers": last, "num_heads": heads}
        tp.pruner.BasePruner(model, bench.example, importance, **options).step()

    found = alternate({"Torch-Pruning, magnitude": theirs, "prune_to_flops": ours}, rounds, bench.device)
    for what, (seconds, ratio, peak, _) in found.items():
        yield bench.row("removal", what, seconds, ratio=round(ratio, 3), of="Torch-Pruning, magnitude", peak_mib=peak)
    seconds = statistics.median(inside)
    ratio = seconds / found["Torch-Pruning, magnitude"].seconds
    yield bench.row("removal", "score + plan + remove", seconds, ratio=round(ratio, 3), of="Torch-Pruning, magnitude")


def planner(groups: int = 60, channels: int = 1024) -> Iterator[Row]:
    """A plan for a chain of groups, three layers each."""
    random = np.random.default_rng(0)
    scored = [ScoredGroup(f"g{i}", random.gamma(2.0, size=channels)) for i in range(groups)]
    sides = [Side(channels, {group.name: np.ones(channels)}) for group in scored]
    terms = [
        Term(float(channels) ** 2 * 9 * int(random.integers(10, 800)), tuple(sides[max(i - 1, 0) : i + 1]))
        for i in range(groups)
        for _ in range(3)
    ]
    cost = CostModel([*terms, Term(1e6, ())])
    for options in ({}, {"round_to": 8}, {"min_keep": 0.5}):
        start = time.perf_counter()
        make_plan(scored, cost, flops=0.5, **options)
        name = ", ".join(f"{key}={value}" for key, value in options.items()) or "plain"
        yield make_row("planner", f"{groups} groups of {channels}", name, time.perf_counter() - start)


def wide() -> Iterator[Row]:
    """Hulls and clusters of layers with a few dozen directions and noise."""
    for width in WIDTHS:
        torch.manual_seed(0)
        x = torch.randn(4 * width, 48, dtype=torch.float64) @ torch.randn(48, width, dtype=torch.float64)
        correlation = torch.corrcoef((x + torch.randn_like(x)).T)
        runs = {
            "hulls, pool 32": lambda c=correlation: greedy_hulls(c),
            "clusters": lambda c=correlation: spectral_clusters(c.abs()),
        }
        for what, run in runs.items():
            seconds, peak = timed(run, torch.device("cpu"))
            yield make_row("wide", f"{width} channels", what, seconds, peak_mib=peak)


def picture(rows: list[Row]) -> None:
    """Draw the ratios of passes and recipes, a panel a network."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    own = [
        row
        for row in rows
        if row["part"] in ("passes", "recipes") and row["of"] in ("forward", "calibrate") and row["ratio"] != 1.0
    ]
    networks = list(dict.fromkeys(row["network"] for row in own))
    if not networks:
        return
    heights = [sum(row["network"] == network for row in own) for network in networks]
    figure, axes = plt.subplots(
        len(networks), 1, figsize=(7, 0.8 + 0.28 * sum(heights) + 0.7 * len(networks)), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for axis, network in zip(axes[:, 0], networks, strict=True):
        shown = [row for row in own if row["network"] == network][::-1]
        bars = axis.barh(
            [f"{row['what']} ({row['images']})" for row in shown],
            [row["ratio"] for row in shown],
            color=["#4878a8" if row["of"] == "forward" else "#d0893c" for row in shown],
        )
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.set_title(network, fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
    figure.supxlabel(
        "times a plain forward pass (blue) or calibrate() (orange), same images (their number)", fontsize=9
    )
    figure.savefig(RESULTS / "speed.png", dpi=130)
    plt.close(figure)


def table(rows: list[Row]) -> str:
    """Draw all rows for people."""
    keys = ("part", "network", "what", "images", "batch", "seconds", "ratio", "of", "peak_mib", "commit")
    lines = [f"| {' | '.join(keys).replace('_mib', ' MiB')} |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def keep(row: Row, device: str) -> None:
    """Put a row into the results, in the place of an earlier one."""
    path = RESULTS / "speed.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    row |= {"device": device, "threads": torch.get_num_threads()}
    row |= {key: value for key, value in provenance("", "").items() if key in ("commit", "date", "machine", "torch")}
    rows = [other for other in rows if [other[key] for key in KEY] != [row[key] for key in KEY]] + [row]
    rows.sort(key=lambda row: PARTS.index(row["part"]))
    command = "python benchmarks/speed.py"
    content = {"provenance": provenance(command, "random images, random weights"), "rows": rows}
    write_bytes(path, f"{json.dumps(content, indent=1)}\n".encode())
    write_bytes(RESULTS / "speed.md", table(rows).encode())
    picture(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="default all")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), help="default all")
    parser.add_argument("--images", type=int, help="default by network, 64 to 1,024")
    parser.add_argument("--batch", type=int, help="default by network, 16 to 128")
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds")
    parser.add_argument("--criteria", nargs="*", default=list(CRITERIA), help="default those")
    parser.add_argument("--repairs", nargs="*", default=list(REPAIRS), help="default those")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default a GPU's")
    options = parser.parse_args()
    makers: list[Callable[[], Iterator[Row]]] = []
    for name in options.networks:
        if set(options.parts) & {"passes", "growth", "recipes", "removal"}:
            bench = Bench(name, options.images, options.batch, options.device)
            by_part: dict[str, Callable[[], Iterator[Row]]] = {
                "passes": lambda b=bench: passes(b, options.rounds),
                "growth": lambda b=bench: growth(b, options.rounds),
                "recipes": lambda b=bench: recipes(b, options.criteria, options.repairs),
                "removal": lambda b=bench: removal(b, options.rounds),
            }
            makers += [by_part[part] for part in options.parts if part in by_part]
    makers += [make for part, make in (("planner", planner), ("wide", wide)) if part in options.parts]
    for make in makers:
        for row in make():
            keep(row, options.device)
            print({key: value for key, value in row.items() if key not in ("commit", "machine", "torch")}, flush=True)


if __name__ == "__main__":
    main()
