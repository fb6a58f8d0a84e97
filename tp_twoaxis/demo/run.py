"""The experiment: train, calibrate once, prune copies with every method to the same MACs, test, write."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from tp_twoaxis.data import ArrayLoader, digits
from tp_twoaxis.demo.methods import LOCAL, METHODS
from tp_twoaxis.demo.network import DigitsResNet, one_thread, train
from tp_twoaxis.demo.result import DemoResult, Dense, Group, Measurement, summarise
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.evaluation import accuracy
from tp_twoaxis.files import write_bytes
from tp_twoaxis.importance.entry import requires
from tp_twoaxis.importance.registry import find_importance, make_importance
from tp_twoaxis.pruning import PruningReport, prune_to_flops
from tp_twoaxis.pruning.macs import count_macs
from tp_twoaxis.scores.registry import capture, task_mi
from tp_twoaxis.statistics import CalibrationStatistics, calibrate

EXAMPLE = torch.zeros(1, 1, 8, 8)
MAIN_TARGET = 0.5
PACKAGES = ("tp-twoaxis", "torch", "torch-pruning", "numpy", "scipy", "scikit-learn", "matplotlib")


@dataclass(frozen=True)
class Settings:
    """How much the demo does: networks trained, epochs each, shares of MACs to keep."""

    networks: int = 3
    epochs: int = 25
    targets: tuple[float, ...] = (0.8, 0.65, MAIN_TARGET, 0.35, 0.25)


FULL = Settings()
QUICK = Settings(networks=1, epochs=4, targets=(MAIN_TARGET, 0.25))


@dataclass(frozen=True)
class Demo:
    """Everything that was measured, for the report.

    Attributes:
        settings: how much was done.
        quick: whether this is the short run that only shows that all works.
        test_images: of each network.
        dense: the trained networks.
        runs: every pruned network.
        groups: the first network's channels on both axes.
        provenance: what made the numbers, name -> text.
    """

    settings: Settings
    quick: bool
    test_images: int
    dense: list[Dense]
    runs: list[Measurement]
    groups: list[Group]
    provenance: dict[str, str]

    @property
    def dense_accuracy(self) -> float:
        """Mean over the networks."""
        return sum(network.accuracy for network in self.dense) / len(self.dense)


def run_demo(out: Path, *, seed: int = 0, quick: bool = False, progress: bool = True) -> DemoResult:
    """Show both axes on scikit-learn's handwritten digits, and write ``report.html`` and ``results.json``.

    Trains three small residual networks, each on its own split of the images, calibrates each in one pass,
    prunes copies to five shares of the MACs with every method, re-estimates BatchNorm, and tests. Nothing is
    fine-tuned, nothing is downloaded. About a minute on one CPU core; the random state of torch, and its
    number of threads, are as before afterwards.

    Args:
        out: folder for the two files; created if missing, earlier files of these names are replaced.
        seed: of the first network and its split; the others count on from it. Equal seeds give equal
            numbers, but for the seconds.
        quick: one barely trained network and two targets, to see that all works; its ranking means nothing.
        progress: show progress bars on stderr.

    Returns:
        Paths of the files, and the table.

    Raises:
        TwoAxisError: scikit-learn or matplotlib is missing, or the folder cannot be written.
    """
    start = time.perf_counter()
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        # asked before the minute of work, not after it
        if find_spec(module) is None:
            raise TwoAxisError(f"demo: needs {package}, it is missing; install tp-twoaxis[cli]")
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TwoAxisError(f"{out}: expected a folder to write to, {error.strerror}; choose another") from error
    settings = QUICK if quick else FULL
    seeds = range(seed, seed + settings.networks)
    dense: list[Dense] = []
    runs: list[Measurement] = []
    groups: list[Group] = []
    with one_thread(), _Bars(settings, progress) as bars:
        for network_seed in seeds:
            network, trained = _train(network_seed, settings, bars)
            dense.append(trained)
            measured, channels = _prune_all(network, network_seed, settings, bars)
            runs += measured
            groups = groups or channels
    provenance = _provenance(out, seed, quick, time.perf_counter() - start)
    demo = Demo(settings, quick, len(digits("test", seed)), dense, runs, groups, provenance)
    return _write(demo, out)


class _Bars:
    """One progress bar for everything, in epochs and prunings; closed when the block ends."""

    def __init__(self, settings: Settings, progress: bool) -> None:
        prunings = len(METHODS) * len(settings.targets)
        total = settings.networks * (settings.epochs + prunings)
        self.bar = tqdm(total=total, disable=not progress, leave=False, bar_format="{desc} {bar} {elapsed}<{remaining}")

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def say(self, text: str) -> None:
        self.bar.set_description_str(f"{text:38.38}", refresh=False)

    def tick(self) -> None:
        self.bar.update()


def _train(seed: int, settings: Settings, bars: _Bars) -> tuple[DigitsResNet, Dense]:
    bars.say(f"network {seed}: train")
    start = time.perf_counter()
    network = train(digits("train", seed), epochs=settings.epochs, seed=seed, tick=bars.tick)
    seconds = time.perf_counter() - start
    share, _ = accuracy(network, _test_loader(seed), progress=False)
    return network, Dense(seed, share, count_macs(network, EXAMPLE).total, seconds)


def _test_loader(seed: int) -> ArrayLoader:
    return digits("test", seed).loader(batch_size=200)


def _prune_all(
    network: DigitsResNet, seed: int, settings: Settings, bars: _Bars
) -> tuple[list[Measurement], list[Group]]:
    loader, test = digits("calibration", seed).loader(batch_size=100), _test_loader(seed)
    start = time.perf_counter()
    stats = calibrate(network, loader, progress=False)
    calibration = time.perf_counter() - start
    runs: list[Measurement] = []
    groups: list[Group] = []
    for method in METHODS:
        for target in settings.targets:
            bars.say(f"network {seed}: prune to {target:.0%}, {method.label}")
            pruned = copy.deepcopy(network)
            start = time.perf_counter()
            importance = make_importance(
                method.name, stats=stats, model=pruned, loader=loader, seed=seed, progress=False
            )
            prepared = time.perf_counter() - start
            if requires(find_importance(method.name).needs, "stats"):
                prepared += calibration
            report = prune_to_flops(
                pruned, EXAMPLE, importance, flops=target, loader=loader, other_counters=False, progress=False
            )
            share, _ = accuracy(pruned, test, progress=False)
            runs.append(
                Measurement(
                    method.name,
                    seed,
                    target,
                    report.achieved,
                    share,
                    prepared + report.seconds["score"],
                    {group.name: (len(group.kept), len(group.kept) + len(group.removed)) for group in report.groups},
                    report.removed_channels,
                )
            )
            if (method.name, target) == (LOCAL, MAIN_TARGET):
                groups = _groups(report, stats)
            bars.tick()
    return runs, groups


def _groups(report: PruningReport, stats: CalibrationStatistics) -> list[Group]:
    """Both scores of every group, averaged over the layers that write it as the importance does."""
    groups = []
    for group in report.groups:
        writers = [text.removesuffix(" (writes)") for text in group.layers if text.endswith(" (writes)")]
        local = torch.stack([capture(stats[name]) for name in writers]).mean(0)
        task = torch.stack([task_mi(stats[name]) for name in writers]).mean(0)
        groups.append(Group(group.name, len(writers) > 1, local.tolist(), task.tolist(), group.removed))
    return groups


def _provenance(out: Path, seed: int, quick: bool, seconds: float) -> dict[str, str]:
    program, *arguments = sys.argv
    # python's own "-c" stands in the place of a program
    command = ["python", program] if program.startswith("-") else [Path(program).name]
    return {
        "call": f"tp_twoaxis.demo.run_demo(Path({str(out)!r}), seed={seed}, quick={quick})",
        "command": shlex.join([*command, *arguments]),
        "data": "scikit-learn's digits: 1,797 grey images 8x8; split 1,097 / 300 / 400 (train, calibration, test)",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "machine": f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} CPUs, 1 thread used",
        "seconds": f"{seconds:.1f}",
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _write(demo: Demo, out: Path) -> DemoResult:
    # matplotlib takes a second to import: only once there is something to draw
    from tp_twoaxis.demo.html import render

    rows = summarise(demo.runs, demo.test_images)
    result: dict[str, Any] = {"format": "tp-twoaxis/demo", "version": 1, **dataclasses.asdict(demo)}
    result["summary"] = [dataclasses.asdict(row) for row in rows]
    report_path, results_path = out / "report.html", out / "results.json"
    write_bytes(results_path, json.dumps(result, indent=1).encode())
    write_bytes(report_path, render(demo, rows).encode())
    main = [row for row in rows if row.target == MAIN_TARGET]
    count = len(demo.dense)
    title = f"digits, {MAIN_TARGET:.0%} of the MACs kept, BatchNorm re-estimated, not fine-tuned"
    note = (
        f"mean of {count} network{'s' if count > 1 else ''}; ± one binomial standard error of {count} x "
        f"{demo.test_images} test images"
    )
    if demo.quick:
        note += "\nquick run: hardly trained, the order means nothing"
    return DemoResult(report_path, results_path, title, note, main, demo.dense_accuracy)
