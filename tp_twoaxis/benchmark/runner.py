"""Run a sweep: the cells that are missing, by whatever engine, each to its own file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tp_twoaxis import ranks as dist
from tp_twoaxis.benchmark.cells import Cell, ResultsFolder, claim_folder
from tp_twoaxis.benchmark.config import BenchmarkConfig
from tp_twoaxis.benchmark.context import check_inputs
from tp_twoaxis.benchmark.engines import Engine, LocalEngine
from tp_twoaxis.benchmark.progress import Monitor
from tp_twoaxis.benchmark.work import Measurer, chunks, run_cells
from tp_twoaxis.errors import TwoAxisError


@dataclass(frozen=True)
class RunSummary:
    """What a call of :func:`run_benchmark` did.

    Attributes:
        folder: where the cells are.
        total: cells of the config, or of the asked-for part of it.
        ran: cells measured by this call, failed ones included.
        skipped: cells that were there before.
        failed: keys of the cells whose record is a failure.
        left: cells that are still not there, because the engine stopped early.
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
    only: Callable[[Cell], bool] | None = None,
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

    Under ``torch.distributed`` (torchrun) every rank calls this, and all ranks work at one cell together: each
    calibrates, fine-tunes and evaluates on its share of the images, rank 0 decides what is removed and writes. An
    error on one rank alone ends the run when the process group's timeout has passed.

    Args:
        config: the sweep.
        folder: of the results; made if missing, refused if it holds results of another config.
        engine: who measures; default this process. See :class:`~tp_twoaxis.benchmark.engines.LocalEngine` and
            :class:`~tp_twoaxis.benchmark.ray_engine.RayEngine`.
        device: where the networks run, such as ``cpu`` or ``cuda:0``.
        only: measure the cells for which this is true; the others' weights and images need not be there.
        part: ``(k, n)``: the k-th of n shares of the cells, 1 <= k <= n; whole groups of network and seed, unless
            these are fewer than n.
        retry_failed: measure cells again whose record is a failure.
        extend: accept a folder of a smaller config; see :func:`~tp_twoaxis.benchmark.cells.claim_folder`.
        progress: a bar with the time left and a preview of the table, on stderr.

    Raises:
        TwoAxisError: the config, a file or the folder does not fit; a cell could not be written; a worker died.
    """
    config.check()
    together = dist.ranks() > 1
    if together and engine is not None:
        raise TwoAxisError("under torchrun all ranks measure a cell together; leave workers and engine out")
    cells = [cell for cell in config.cells() if only is None or only(cell)]
    check_inputs(config, cells)
    leads = dist.rank() == 0
    with dist.leader_first():
        results = claim_folder(folder, config, extend=extend)
    if part is not None:
        number, count = part
        if not 1 <= number <= count:
            raise TwoAxisError(f"part: expected k of n with 1 <= k <= n, got {number} of {count}")
        cells = [cell for chunk in chunks(cells, count)[number - 1 :: count] for cell in chunk]
    # what rank 0 sees counts: another rank may look when the first cell is already there
    missing = dist.from_leader([cell for cell in cells if _is_missing(results, cell, retry_failed)])
    with Monitor(results, cells, missing, enabled=progress and leads) as monitor:
        if together:
            _run_together(results, missing, device, monitor)
        else:
            (engine or LocalEngine()).fill(results, missing, device, monitor.look)
    records = [record for cell in cells if (record := results.read(cell)) is not None]
    failed = [record["key"] for record in records if record["status"] == "failed"]
    left = len(cells) - len(records)
    return RunSummary(results, len(cells), len(missing) - left, len(cells) - len(missing), failed, left)


def _run_together(results: ResultsFolder, cells: Sequence[Cell], device: str, monitor: Monitor) -> None:
    measurer = Measurer(results.config, device)
    if dist.rank() == 0:
        run_cells(results, cells, measurer, monitor.look)
    else:
        for cell in cells:
            measurer.measure(cell)
    dist.barrier()


def _is_missing(results: ResultsFolder, cell: Cell, retry_failed: bool) -> bool:
    record = results.read(cell)
    return record is None or (retry_failed and record["status"] == "failed")
