"""One trial: prune a copy, repair, fine-tune, measure; the outcome is a record, and so is a failure."""

from __future__ import annotations

import copy
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

import torch
from torch import nn

from tp_twoaxis.benchmark.methods import ALLOCATIONS, Trial
from tp_twoaxis.benchmark.results import FORMAT, VERSION
from tp_twoaxis.benchmark.shared_work import Shared, Sizes, measure_sizes
from tp_twoaxis.benchmark.sweep import BenchmarkConfig
from tp_twoaxis.benchmark.sweep_images import rows_to_text
from tp_twoaxis.importance import Criterion, Importance, PruningState, find_criterion
from tp_twoaxis.pruning import PruningReport, prune_to_flops
from tp_twoaxis.repair import refits
from tp_twoaxis.runtime.distributed import broadcast_from_rank_zero, broadcast_state, world_size
from tp_twoaxis.runtime.model_state import fork_rng
from tp_twoaxis.runtime.serialization import Json
from tp_twoaxis.runtime.timing import timed
from tp_twoaxis.training import finetune

PACKAGES = ("tp-twoaxis", "torch", "torch-pruning", "numpy", "scipy", "thop", "ultralytics-thop")
TRACEBACK_LINES = 30


def run_trial(shared: Shared, trial: Trial, config: BenchmarkConfig) -> Json:
    """Run one trial.

    Args:
        shared: of the trial's network and seed; its model is not changed.
        trial: what to do.
        config: the sweep.

    Returns:
        A JSON-able record with ``status`` ``"ok"``, or ``"failed"`` with the error.
    """
    start = time.perf_counter()
    record: Json = {
        "format": FORMAT,
        "version": VERSION,
        "key": trial.key,
        "config": config.digest(),
        "conditions": config.conditions(),
        "network": asdict(shared.network.entry),
        "seed": trial.seed,
        "method": {"name": trial.method.name, **asdict(trial.method)},
        "keep": trial.keep,
        "grid": config.grid,
        "data": asdict(config.data),
    }
    try:
        outcome = {"status": "ok", "error": None, **_measure(shared, trial, config)}
        outcome["seconds"]["total"] = time.perf_counter() - start
    except Exception as error:  # whatever a criterion, a model or the data raises: the sweep goes on
        lines = traceback.format_exc().strip().splitlines()[-TRACEBACK_LINES:]
        outcome = {
            "status": "failed",
            "error": {"type": type(error).__name__, "message": str(error), "traceback": lines},
            "seconds": {"total": time.perf_counter() - start},
        }
    return record | outcome | {"provenance": provenance(shared.network.device)}


def _measure(shared: Shared, trial: Trial, config: BenchmarkConfig) -> Json:
    network = shared.network
    model, report, seconds = _pruned(shared, trial, config)
    with timed(seconds, "evaluate"):
        before = network.accuracy(model)
    after, training = before, None
    if trial.method.finetune_batches > 0:
        with timed(seconds, "finetune"):
            model, training = _finetuned(model, shared, trial.method.finetune_batches, config)
        after = network.accuracy(model)
    dense, pruned = network.dense_sizes, measure_sizes(model, network.example)
    return {
        "achieved": pruned.macs / dense.macs,
        "macs": _pair(dense, pruned, "macs"),
        "host_macs": _pair(dense, pruned, "tp"),
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
        "calibration_rows": rows_to_text(shared.rows[0]),
        "finetuning": training,
        "kept_channels": {
            group.name: [len(group.kept), len(group.kept) + len(group.removed)] for group in report.groups
        },
        "weights": network.weights,
        "seconds": seconds,
        "notes": report.notes,
    }


def _pruned(shared: Shared, trial: Trial, config: BenchmarkConfig) -> tuple[nn.Module, PruningReport, dict[str, float]]:
    """Prune and repair a copy of the dense network; also return seconds by phase."""
    method, network = trial.method, shared.network
    criterion = find_criterion(method.criterion)
    model, importance, seconds = shared.prepare(criterion)
    # repairs that refit weights need what layers read; statistics of that are gathered once for all trials
    stats = shared.statistics("consumers") if refits(method.repair) else None
    with fork_rng():
        # an importance of the user's may draw: equal trials then draw equal numbers, in whatever order they run
        torch.manual_seed(trial.seed)
        report = prune_to_flops(
            model,
            network.example,
            step_criterion(criterion, importance, method.allocation, trial.seed),
            flops=trial.keep,
            budget=config.grid,
            steps=method.steps,
            repair=method.repair,
            stats=stats,
            loader=shared.calibration,
            min_keep=config.min_keep,
            tolerance=config.tolerance,
            max_images=None,
            progress=False,
        )
    model.zero_grad(set_to_none=True)
    network.laid_out(model)  # removal copies weights, and the copies have a layout of their own
    broadcast_state(model)
    return model, report, seconds | report.seconds


def step_criterion(criterion: Criterion, prepared: Importance, allocation: str, seed: int) -> Criterion:
    """Make a criterion for one pruning: an importance that is there for the first step, a new one for later steps.

    Args:
        criterion: builds the importance of later steps, from statistics of the network as it is then.
        prepared: the importance of the dense network.
        allocation: a name in :data:`~tp_twoaxis.benchmark.methods.ALLOCATIONS`.
        seed: of criteria that draw.

    Example:
        >>> criterion = step_criterion(find_criterion("l1"), lambda group: group, "global", seed=1)
        >>> criterion.build(PruningState())("scores"), criterion.build(PruningState(removed_outputs={"conv": 0.5})).p
        ('scores', 1)
    """

    def factory(state: PruningState) -> Importance:
        importance = prepared
        if not state.is_dense:
            # every rank reads all images: those that round apart agree on rank 0's scores
            importance = criterion.build(
                PruningState(
                    state.model,
                    state.loader,
                    max_images=None,
                    seed=seed,
                    progress=False,
                    removed_outputs=state.removed_outputs,
                    removed_inputs=state.removed_inputs,
                )
            )
        return agreed(ALLOCATIONS[allocation](importance))

    return Criterion(criterion.name, criterion.summary, factory)


def agreed(importance: Importance) -> Importance:
    """Let rank 0's scores count: ranks that round apart must not remove different channels."""
    return importance if world_size() == 1 else lambda group: broadcast_from_rank_zero(importance(group))


def _pair(dense: Sizes, pruned: Sizes, name: str) -> Json:
    return {"dense": getattr(dense, name), "pruned": getattr(pruned, name)}


def _finetuned(model: nn.Module, shared: Shared, batches: int, config: BenchmarkConfig) -> tuple[nn.Module, Json]:
    """Train a network; with several learning rates copies of it, of which the selection images choose one."""
    rates = config.learning_rates
    if len(rates) == 1:
        return model, _finetune(model, shared, batches, config, rates[0])
    tried = []
    for rate in rates:
        candidate = copy.deepcopy(model)
        training = _finetune(candidate, shared, batches, config, rate)
        tried.append((shared.network.accuracy(candidate, selection=True), candidate, training))
    _, candidate, training = max(tried, key=lambda found: found[0])
    chosen_from = {str(own["lr"]): accuracy for accuracy, _, own in tried}
    return candidate, training | {"selection_accuracy": chosen_from}


def _finetune(model: nn.Module, shared: Shared, batches: int, config: BenchmarkConfig, rate: float) -> Json:
    report = finetune(
        model,
        shared.training_loader(),
        epochs=config.finetune_epochs,
        max_batches=batches,
        lr=rate,
        amp=config.finetune_amp,
        seed=shared.seed,
        progress=False,
    )
    first, last = (report.losses[0], report.losses[-1]) if report.losses else (None, None)
    return {"lr": rate, "batches": report.batches, "first_loss": first, "last_loss": last}


def provenance(device: str) -> Json:
    """Record what made a number: versions, commit, machine, command, date."""
    return {**_fixed(device, torch.get_num_threads()), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


@functools.lru_cache(maxsize=4)
def _fixed(device: str, threads: int) -> Json:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None  # an installed package has none
    program = Path(sys.argv[0]).name
    # python's own "-c" stands in the place of a program
    command = ["python", program] if program.startswith("-") else [program]
    command = ["tp-twoaxis"] if program == "__main__.py" else command
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": commit,
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": threads,
            "device": gpu or device,
            "ranks": world_size(),
        },
        "command": shlex.join([*command, *sys.argv[1:]]),
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
