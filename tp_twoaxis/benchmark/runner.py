"""Run a sweep: the trials that are missing, by whatever engine, each to its own file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tp_twoaxis.benchmark.engines import Engine, LocalEngine
from tp_twoaxis.benchmark.methods import Trial
from tp_twoaxis.benchmark.progress import Monitor
from tp_twoaxis.benchmark.results import ResultsFolder, claim_folder
from tp_twoaxis.benchmark.shared_work import check_inputs
from tp_twoaxis.benchmark.sweep import BenchmarkConfig
from tp_twoaxis.benchmark.trial_runner import TrialRunner, chunks, run_trials
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime import distributed


@dataclass(frozen=True)
class RunSummary:
    """What a call of :func:`run_benchmark` did.

    Attributes:
        folder: where the results are.
        total: trials of the config, or of the part of it that was chosen.
        ran: trials that this call ran, failed ones included.
        skipped: trials that were there before.
        failed: keys of the trials whose record is a failure.
        left: trials that are still not there, because the engine stopped early.
    """

    folder: ResultsFolder
    total: int
    ran: int
    skipped: int
    failed: list[str]
    left: int = 0


def run_benchmark(
    config: BenchmarkConfig,
    folder: str | Path,
    *,
    engine: Engine | None = None,
    device: str = "cpu",
    only: Callable[[Trial], bool] | None = None,
    part: tuple[int, int] | None = None,
    retry_failed: bool = False,
    extend: bool = False,
    progress: bool = True,
) -> RunSummary:
    """Run every trial of a sweep that is not in the folder yet.

    Stopped in whatever way, SIGKILL included, it loses no more than the trials that were running; the same call
    goes on. A trial that fails is recorded with its error, and the sweep goes on; a later call does not repeat it
    unless ``retry_failed``. Several calls, also on several machines with a shared file system, may fill one
    folder, each with its ``part``.

    Under ``torch.distributed`` (torchrun) every rank calls this, and all ranks work at one trial together: each
    calibrates, fine-tunes and evaluates on its share of the images, rank 0 decides what is removed and writes. An
    error on one rank alone ends the run when the process group's timeout has passed.

    Args:
        config: the sweep.
        folder: of the results; made if missing, refused if it holds results of another config.
        engine: who runs the trials; default this process. See :class:`~tp_twoaxis.benchmark.engines.LocalEngine` and
            :class:`~tp_twoaxis.benchmark.ray_engine.RayEngine`.
        device: where the networks run, such as ``cpu`` or ``cuda:0``.
        only: run the trials for which this is true; the others' weights and images need not be there.
        part: ``(k, n)``: the k-th of n shares of the trials, 1 <= k <= n; whole groups of network and seed, unless
            these are fewer than n.
        retry_failed: run trials again whose record is a failure.
        extend: accept a folder of a smaller config; see :func:`~tp_twoaxis.benchmark.results.claim_folder`.
        progress: a bar with the time left and a preview of the table, on stderr.

    Raises:
        TwoAxisError: the config, a file or the folder does not fit; a trial could not be written; a worker died.
    """
    config.check()
    together = distributed.world_size() > 1
    if together and engine is not None:
        raise TwoAxisError("under torchrun all ranks run a trial together; leave workers and engine out")
    trials = [trial for trial in config.trials() if only is None or only(trial)]
    check_inputs(config, trials)
    leads = distributed.rank() == 0
    with distributed.rank_zero_first():
        results = claim_folder(folder, config, extend=extend)
    if part is not None:
        number, count = part
        if not 1 <= number <= count:
            raise TwoAxisError(f"part: expected k of n with 1 <= k <= n, got {number} of {count}")
        trials = [trial for chunk in chunks(trials, count)[number - 1 :: count] for trial in chunk]
    # what rank 0 sees counts: another rank may look when the first trial is already there
    missing = distributed.broadcast_from_rank_zero([t for t in trials if _is_missing(results, t, retry_failed)])
    with Monitor(results, trials, missing, enabled=progress and leads) as monitor:
        if together:
            _run_together(results, missing, device, monitor)
        else:
            (engine or LocalEngine()).fill(results, missing, device, monitor.look)
    records = [record for trial in trials if (record := results.read(trial)) is not None]
    failed = [record["key"] for record in records if record["status"] == "failed"]
    left = len(trials) - len(records)
    return RunSummary(results, len(trials), len(missing) - left, len(trials) - len(missing), failed, left)


def _run_together(results: ResultsFolder, trials: Sequence[Trial], device: str, monitor: Monitor) -> None:
    runner = TrialRunner(results.config, device)
    if distributed.rank() == 0:
        run_trials(results, trials, runner, monitor.look)
    else:
        for trial in trials:
            runner.run(trial)
    distributed.barrier()


def _is_missing(results: ResultsFolder, trial: Trial, retry_failed: bool) -> bool:
    record = results.read(trial)
    return record is None or (retry_failed and record["status"] == "failed")
