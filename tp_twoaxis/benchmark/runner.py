"""Run a sweep: the cells that are missing, one after another or by a pool of processes, each to its own file."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import connection
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from tp_twoaxis.benchmark.cells import Cell, ResultsFolder, claim_folder
from tp_twoaxis.benchmark.config import BenchmarkConfig
from tp_twoaxis.benchmark.context import LoadedNetwork, Shared, check_inputs
from tp_twoaxis.benchmark.measure import measure_cell
from tp_twoaxis.benchmark.progress import Monitor
from tp_twoaxis.errors import TwoAxisError

# seconds between two looks at the folder while a pool works
LOOK = 0.5


@dataclass(frozen=True)
class RunSummary:
    """What a call of :func:`run_benchmark` did.

    Attributes:
        folder: where the cells are.
        total: cells of the config, or of the asked-for part of it.
        ran: cells measured by this call, failed ones included.
        skipped: cells that were there before.
        failed: keys of the cells whose record is a failure.
    """

    folder: ResultsFolder
    total: int
    ran: int
    skipped: int
    failed: list[str]


def run_benchmark(
    config: BenchmarkConfig,
    folder: str | Path,
    *,
    workers: int = 1,
    device: str = "cpu",
    part: tuple[int, int] | None = None,
    retry_failed: bool = False,
    extend: bool = False,
    progress: bool = True,
) -> RunSummary:
    """Measure every cell of a sweep that is not in the folder yet.

    Stopped in whatever way, SIGKILL included, it loses no more than the cells that were running; the same call
    goes on. A cell that fails is recorded with its error, and the sweep goes on; a later call leaves it alone
    unless ``retry_failed``. Several calls, also on several machines with a shared file system, may fill one
    folder, each with its ``part``.

    With ``workers`` above 1 a script must call this under ``if __name__ == "__main__":``, because the workers
    import it. Threads are shared out among the workers; with another number of threads, sums are rounded in
    another order, and an accuracy may differ by an image.

    Args:
        config: the sweep.
        folder: of the results; made if missing, refused if it holds results of another config.
        workers: processes; 1 runs in this one.
        device: where the networks run, such as ``cpu`` or ``cuda:0``.
        part: ``(k, n)``: the k-th of n shares of the cells, 1 <= k <= n; whole groups of network and seed.
        retry_failed: measure cells again whose record is a failure.
        extend: accept a folder of a smaller config; see :func:`~tp_twoaxis.benchmark.cells.claim_folder`.
        progress: a bar with the time left and a preview of the table, on stderr.

    Raises:
        TwoAxisError: the config, a file or the folder does not fit; a cell could not be written; a worker died.
    """
    config.check()
    if workers < 1:
        raise TwoAxisError(f"workers: expected at least 1, got {workers}")
    check_inputs(config)
    results = claim_folder(folder, config, extend=extend)
    groups = _grouped(config.cells())
    if part is not None:
        number, count = part
        if not 1 <= number <= count:
            raise TwoAxisError(f"part: expected k of n with 1 <= k <= n, got {number} of {count}")
        groups = groups[number - 1 :: count]
    cells = [cell for group in groups for cell in group]
    missing = [cell for cell in cells if _is_missing(results, cell, retry_failed)]
    with Monitor(results, cells, missing, enabled=progress) as monitor:
        if workers == 1 or len(missing) < 2:
            run_cells(results, missing, device, monitor.look)
        else:
            _run_pool(results, missing, device, workers, monitor.look)
    failed = [record["key"] for cell in cells if (record := results.read(cell)) and record["status"] == "failed"]
    return RunSummary(results, len(cells), len(missing), len(cells) - len(missing), failed)


def run_cells(
    results: ResultsFolder,
    cells: Sequence[Cell],
    device: str = "cpu",
    done: Callable[[], None] | None = None,
    loaded: dict[str, LoadedNetwork] | None = None,
) -> None:
    """Measure cells one after another and write each; the unit of work of any pool.

    Cells of one network and seed that follow each other share its statistics.

    Args:
        results: where to write.
        cells: what to measure; all are measured, whether they are there or not.
        device: where the networks run.
        done: called after each cell.
        loaded: the network of an earlier call in the same process for the same sweep, with its images in memory;
            replaced when another one is needed.

    Raises:
        TwoAxisError: a cell could not be written.
    """
    loaded = {} if loaded is None else loaded
    for group in _grouped(cells):
        first = group[0]
        if first.network not in loaded:
            loaded.clear()
            loaded[first.network] = LoadedNetwork(results.config, first.network, device)
        shared = Shared(loaded[first.network], first.seed)
        for cell in group:
            results.write(cell, measure_cell(shared, cell, results.config))
            if done is not None:
                done()


def _is_missing(results: ResultsFolder, cell: Cell, retry_failed: bool) -> bool:
    record = results.read(cell)
    return record is None or (retry_failed and record["status"] == "failed")


def _grouped(cells: Sequence[Cell]) -> list[list[Cell]]:
    return [list(group) for _, group in groupby(cells, key=lambda cell: (cell.network, cell.seed))]


def _chunks(cells: Sequence[Cell], workers: int) -> list[list[Cell]]:
    """Cut the cells into one chunk a network and seed; into more where that would leave workers idle."""
    groups = _grouped(cells)
    pieces = -(-workers // len(groups))
    return [part for group in groups for k in range(pieces) if (part := group[k::pieces])]


def _run_pool(
    results: ResultsFolder, cells: Sequence[Cell], device: str, workers: int, look: Callable[[], None]
) -> None:
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // workers))
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(threads, stop))
    try:
        pending = {pool.submit(_work, results, chunk, device) for chunk in _chunks(cells, workers)}
        while pending:
            finished, pending = wait(pending, timeout=LOOK, return_when=FIRST_COMPLETED)
            look()
            for future in finished:
                future.result()
    except BrokenProcessPool as error:
        raise TwoAxisError(
            f"{results.path}: a worker process ended without a word, probably for lack of memory; what is done is "
            "kept, run again, perhaps with fewer workers"
        ) from error
    finally:
        # after a failure or Ctrl-C the other workers end with the cell that they are at, not with their chunk
        stop.set()
        pool.shutdown(cancel_futures=True)


# a worker's own; it serves one sweep and ends with it
_stop: Event | None = None
_loaded: dict[str, LoadedNetwork] = {}


def _work(results: ResultsFolder, cells: Sequence[Cell], device: str) -> None:
    run_cells(results, cells, device, _end_if_asked, _loaded)


def _end_if_asked() -> None:
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
