"""Who runs the trials: this process, a pool of processes on this machine, or Ray on many."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.synchronize import Event
from typing import Protocol

import torch

from tp_twoaxis.benchmark.methods import Trial
from tp_twoaxis.benchmark.results import ResultsFolder
from tp_twoaxis.benchmark.trial_runner import TrialRunner, chunks, run_trials
from tp_twoaxis.errors import TwoAxisError

# seconds between two looks at the folder while a pool works
LOOK = 0.5


class Engine(Protocol):
    """Fills a results folder."""

    def fill(self, results: ResultsFolder, trials: Sequence[Trial], device: str, look: Callable[[], None]) -> None:
        """Run and write all of ``trials``; call ``look`` now and then, so that progress can be shown.

        Raises:
            TwoAxisError: a trial could not be written, or workers died.
        """


@dataclass(frozen=True)
class LocalEngine:
    """Processes on this machine.

    A script that uses more than one must run under ``if __name__ == "__main__":``, because the workers import
    it. Threads are shared out among them (``OMP_NUM_THREADS`` decides if it is set); with another number of
    threads, sums are rounded in another order, and an accuracy may differ by an image.

    Attributes:
        workers: processes; 1 is this one.

    Raises:
        TwoAxisError: fewer than one worker.
    """

    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise TwoAxisError(f"workers: expected at least 1, got {self.workers}")

    def fill(self, results: ResultsFolder, trials: Sequence[Trial], device: str, look: Callable[[], None]) -> None:
        """Run and write all of ``trials``."""
        if self.workers == 1 or len(trials) < 2:
            run_trials(results, trials, TrialRunner(results.config, device), look)
            return
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // self.workers))
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        pool = ProcessPoolExecutor(self.workers, context, initializer=_start_worker, initargs=(threads, stop))
        try:
            pending = {pool.submit(_work, results, chunk, device) for chunk in chunks(trials, self.workers)}
            while pending:
                finished, pending = wait(pending, timeout=LOOK, return_when=FIRST_COMPLETED)
                look()
                for future in finished:
                    future.result()
        except BrokenProcessPool as error:
            raise TwoAxisError(
                f"{results.path}: a worker process ended without an error, probably for lack of memory; what is done "
                "is kept, run again, perhaps with fewer workers"
            ) from error
        finally:
            # after a failure or Ctrl-C the other workers end with the trial that they are at, not with their chunk
            stop.set()
            pool.shutdown(cancel_futures=True)


# a worker's own; it serves one sweep and ends with it
_stop: Event | None = None
_runner: TrialRunner | None = None


def _work(results: ResultsFolder, trials: Sequence[Trial], device: str) -> None:
    global _runner
    _runner = _runner or TrialRunner(results.config, device)
    run_trials(results, trials, _runner, _end_if_stopped)


def _end_if_stopped() -> None:
    if _stop is not None and _stop.is_set():
        raise KeyboardInterrupt


def _start_worker(threads: int, stop: Event) -> None:
    global _stop
    _stop = stop
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # a worker whose parent was killed would finish its chunk and then wait for ever
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
