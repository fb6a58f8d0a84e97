"""Cells, measured one after another: what a process of any engine does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from tp_twoaxis.benchmark.cells import Cell, ResultsFolder
from tp_twoaxis.benchmark.config import BenchmarkConfig, seeded
from tp_twoaxis.benchmark.context import LoadedNetwork, Shared
from tp_twoaxis.benchmark.measure import measure_cell
from tp_twoaxis.files import Json


class Measurer:
    """Measures a sweep's cells, and keeps what the next one may share: images in memory, statistics, gradients.

    Cells of one network and seed that follow each other share everything that one of them made.

    Args:
        config: the sweep.
        device: where the networks run.
    """

    def __init__(self, config: BenchmarkConfig, device: str = "cpu") -> None:
        self.config = config
        self.device = device
        self._shared: Shared | None = None

    def measure(self, cell: Cell) -> Json:
        """Measure a cell; a failure is a record too, see :func:`~tp_twoaxis.benchmark.measure.measure_cell`."""
        if self._shared is None or (self._shared.network.entry.name, self._shared.seed) != (cell.network, cell.seed):
            self._shared = Shared(self._network(cell), cell.seed)
        return measure_cell(self._shared, cell, self.config)

    def _network(self, cell: Cell) -> LoadedNetwork:
        entry = seeded(self.config.network(cell.network), cell.seed)
        there = None if self._shared is None else self._shared.network
        if there is not None and there.entry == entry:
            return there
        images = there.images if there is not None and there.entry.name == entry.name else None
        return LoadedNetwork(self.config, cell.network, cell.seed, self.device, images)


def run_cells(
    results: ResultsFolder, cells: Sequence[Cell], measurer: Measurer, done: Callable[[], None] | None = None
) -> None:
    """Measure cells one after another and write each.

    Args:
        results: where to write.
        cells: what to measure; all are measured, whether they are there or not.
        measurer: of the same sweep.
        done: called after each cell.

    Raises:
        TwoAxisError: a cell could not be written.
    """
    for cell in cells:
        results.write(cell, measurer.measure(cell))
        if done is not None:
            done()


def grouped(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cut the cells, which are in the config's order, into one list a network and seed."""
    return [list(group) for _, group in groupby(cells, key=lambda cell: (cell.network, cell.seed))]


def chunks(cells: Sequence[Cell], workers: int) -> list[list[Cell]]:
    """Cut the cells into one chunk a network and seed; into more where that would leave workers idle."""
    groups = grouped(cells)
    pieces = -(-workers // max(len(groups), 1))
    return [part for group in groups for k in range(pieces) if (part := group[k::pieces])]
