"""One cell: prune a copy, repair, fine-tune, measure; the outcome is a record, and so is a failure."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tp_twoaxis.benchmark.cells import FORMAT, VERSION, Cell
from tp_twoaxis.benchmark.config import BenchmarkConfig
from tp_twoaxis.benchmark.context import Shared, Sizes, measure_sizes
from tp_twoaxis.benchmark.methods import ALLOCATIONS, Criterion, find_criterion
from tp_twoaxis.borrow import preserved_rng
from tp_twoaxis.files import Json
from tp_twoaxis.importance.entry import Importance, requires
from tp_twoaxis.importance.renewal import Interim, RebuiltImportance, told
from tp_twoaxis.pruning.apply import prune_to_flops
from tp_twoaxis.ranks import from_leader, ranks, share_state
from tp_twoaxis.statistics.calibration import calibrate

PACKAGES = ("tp-twoaxis", "torch", "torch-pruning", "numpy", "scipy", "thop")
TRACEBACK_LINES = 30


def measure_cell(shared: Shared, cell: Cell, config: BenchmarkConfig) -> Json:
    """Measure one cell.

    Args:
        shared: of the cell's network and seed; its model is not changed.
        cell: what to do.
        config: the sweep.

    Returns:
        A JSON-able record with ``status`` ``"ok"``, or ``"failed"`` with the error.
    """
    start = time.perf_counter()
    record: Json = {
        "format": FORMAT,
        "version": VERSION,
        "key": cell.key,
        "config": config.digest(),
        "conditions": config.conditions(),
        "network": asdict(shared.network.entry),
        "seed": cell.seed,
        "method": {"name": cell.method.name, **asdict(cell.method)},
        "keep": cell.keep,
        "grid": config.grid,
        "data": asdict(config.data),
    }
    try:
        outcome = {"status": "ok", "error": None, **_measure(shared, cell, config)}
        outcome["seconds"]["total"] = time.perf_counter() - start
    except Exception as error:  # whatever a criterion, a model or the data raises: the sweep goes on
        lines = traceback.format_exc().strip().splitlines()[-TRACEBACK_LINES:]
        outcome = {
            "status": "failed",
            "error": {"type": type(error).__name__, "message": str(error), "traceback": lines},
            "seconds": {"total": time.perf_counter() - start},
        }
    return record | outcome | {"provenance": provenance(shared.network.device)}


def _measure(shared: Shared, cell: Cell, config: BenchmarkConfig) -> Json:
    method, network = cell.method, shared.network
    criterion = find_criterion(method.criterion)
    model, made, seconds = shared.prepare(criterion)
    importance = agreed(ALLOCATIONS[method.allocation](made))
    if method.steps > 1:
        importance = RebuiltImportance(importance, functools.partial(_later, criterion, method.allocation, cell.seed))
    # folds ask what layers read; statistics of that are gathered once for all cells
    folds = [name for name in method.repair if name != "bn"]
    stats = shared.statistics(consumers=True) if folds else None
    with preserved_rng():
        # an importance of the user's may draw: equal cells then draw equal numbers, in whatever order they run
        torch.manual_seed(cell.seed)
        report = prune_to_flops(
            model,
            network.example,
            importance,
            flops=cell.keep,
            budget=config.grid,
            steps=method.steps,
            repair=method.repair,
            stats=stats,
            loader=shared.calibration,
            min_keep=config.min_keep,
            tolerance=config.tolerance,
            max_images=None,
            other_counters=False,
            progress=False,
        )
    model.zero_grad(set_to_none=True)
    network.laid_out(model)  # removal copies weights, and the copies have a layout of their own
    share_state(model)
    seconds |= report.seconds
    start = time.perf_counter()
    before = network.accuracy(model)
    seconds["evaluate"] = time.perf_counter() - start
    after, training = before, None
    if method.finetune_batches > 0:
        start = time.perf_counter()
        training = _finetune(model, shared, method.finetune_batches, config)
        seconds["finetune"] = time.perf_counter() - start
        after = network.accuracy(model)
    dense, pruned = network.dense_sizes, measure_sizes(model, network.example)
    return {
        "achieved": pruned.macs / dense.macs,
        "macs": _pair(dense, pruned, "macs"),
        "host_macs": _pair(dense, pruned, "host"),
        "thop_macs": _pair(dense, pruned, "thop"),
        "params": _pair(dense, pruned, "params"),
        "accuracy": {"dense": network.dense_accuracy, "before_finetuning": before, "pruned": after},
        "images": {
            "evaluated": network.images.evaluation[1],
            "evaluated_on": config.data.evaluate_on,
            "calibration": len(shared.rows[0]),
            "selection": len(shared.rows[1]),
            "training": len(shared.rows[2]) if training is not None else 0,
        },
        "finetuning": training,
        "kept_channels": {
            group.name: [len(group.kept), len(group.kept) + len(group.removed)] for group in report.groups
        },
        "weights": network.weights,
        "seconds": seconds,
        "notes": report.notes,
    }


def _later(criterion: Criterion, allocation: str, seed: int, interim: Interim) -> Importance:
    """Build a criterion for a later step of pruning, from statistics of what is left then."""
    stats = None
    if requires(criterion.needs, "stats"):
        # every rank reads all images: those that round apart agree on rank 0's scores
        stats = calibrate(
            interim.model,
            interim.images(),
            max_images=None,
            gradients=requires(criterion.needs, "gradient-stats"),
            consumers=requires(criterion.needs, "consumer-stats"),
            progress=False,
        )
    made = criterion.build(stats=stats, model=interim.model, loader=interim.loader, seed=seed)
    return agreed(ALLOCATIONS[allocation](told(made, interim)))


def agreed(importance: Importance) -> Importance:
    """Let rank 0's scores count: ranks that round apart must not remove different channels."""
    return importance if ranks() == 1 else lambda group: from_leader(importance(group))


def _pair(dense: Sizes, pruned: Sizes, name: str) -> Json:
    return {"dense": getattr(dense, name), "pruned": getattr(pruned, name)}


def _finetune(model: nn.Module, shared: Shared, batches: int, config: BenchmarkConfig) -> Json:
    # not at the top: sweeps without training do not need the trainer
    from tp_twoaxis.training import finetune

    report: Any = finetune(
        model,
        shared.training_loader(),
        epochs=config.finetune_epochs,
        max_batches=batches,
        lr=config.finetune_lr,
        amp=config.finetune_amp,
        seed=shared.seed,
        progress=False,
    )
    losses = getattr(report, "losses", None) or [None]
    return {"batches": getattr(report, "batches", None), "first_loss": losses[0], "last_loss": losses[-1]}


def provenance(device: str) -> Json:
    """Say what made a number: versions, commit, machine, command, date."""
    return {**_fixed(device), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


@functools.lru_cache(maxsize=4)
def _fixed(device: str) -> Json:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None  # an installed package has none
    program = Path(sys.argv[0]).name
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": commit,
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": gpu or device,
            "ranks": ranks(),
        },
        "command": shlex.join(["tp-twoaxis" if program == "__main__.py" else program, *sys.argv[1:]]),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
