"""A bar with the time left and a preview of the table, while a sweep runs; lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tp_twoaxis.benchmark.methods import Trial
from tp_twoaxis.benchmark.results import ResultsFolder
from tp_twoaxis.runtime.progress_bar import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

# a terminal is short: what does not fit is left out
ROWS = 24


class Monitor:
    """Watches a results folder and draws what it finds; without ``enabled`` it does nothing.

    It looks at the trials' files alone, so it shows whatever engine fills the folder.

    Args:
        results: the folder.
        trials: all that the preview shows.
        missing: those that this call runs, which the bar counts.
        enabled: draw on stderr, which needs rich; without a terminal a line is printed now and then.
    """

    def __init__(
        self, results: ResultsFolder, trials: Sequence[Trial], missing: Sequence[Trial], *, enabled: bool
    ) -> None:
        self.results = results
        self.waiting = {trial.file_name: trial for trial in missing}
        self.there = len(trials) - len(missing)
        self.enabled = enabled and bool(missing)
        self.failures = 0
        self.sums: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.started = time.time()
        self._live: Any = None
        self._lines: Any = None
        if self.enabled:
            for trial in trials:
                if trial.file_name not in self.waiting:
                    self._add(trial)

    def __enter__(self) -> Monitor:
        if self.enabled and not sys.stderr.isatty():
            self._lines = progress_bar(total=len(self.waiting), desc="bench", unit="trial", show=True)
        elif self.enabled:
            from rich.console import Console
            from rich.live import Live
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("remaining"),
                # an hour's memory: trials of one method may take much longer than those of another
                TimeRemainingColumn(elapsed_when_finished=True),
                speed_estimate_period=3600,
            )
            self._task = self._bar.add_task("trials", total=len(self.waiting))
            self._live = Live(self._draw(), console=Console(stderr=True), refresh_per_second=2, transient=True)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)
        if self._lines is not None:
            self._lines.close()

    def look(self) -> None:
        """Take in the trials that were written since the last look."""
        if not self.enabled:
            return
        for name, trial in list(self.waiting.items()):
            path = self.results.file(trial)
            # a failed trial that is run again has a file from before
            if path.exists() and path.stat().st_mtime >= self.started - 1:
                del self.waiting[name]
                self._add(trial)
                if self._live is not None:
                    self._bar.advance(self._task)
                if self._lines is not None:
                    self._lines.set_postfix_str(f"{self.failures} failed" if self.failures else "", refresh=False)
                    self._lines.update()
        if self._live is not None:
            self._live.update(self._draw())
        if self._lines is not None:
            self._lines.refresh()

    def _add(self, trial: Trial) -> None:
        record = self.results.read(trial)
        if record is None or record["status"] != "ok":
            self.failures += 1
            return
        self.sums[trial.network, trial.method.name][trial.keep].append(record["accuracy"]["pruned"])

    def preview(self) -> Table:
        """Draw the mean accuracy over the seeds so far: a row for each network and method, a column for each keep."""
        from rich.table import Table

        shares = sorted({keep for row in self.sums.values() for keep in row}, reverse=True)
        table = Table(title="mean accuracy (%) by share kept, so far", title_justify="left")
        table.add_column("network")
        table.add_column("method")
        for keep in shares:
            table.add_column(f"{keep:g}", justify="right")
        # the latest rows: those that are being filled
        for (network, method), row in list(self.sums.items())[-ROWS:]:
            means = [f"{100 * sum(row[k]) / len(row[k]):.1f}" if k in row else "" for k in shares]
            table.add_row(network, method, *means)
        return table

    def _draw(self) -> Any:
        from rich.console import Group

        notes = [f"{self.there} trials were there before"] if self.there else []
        notes += [f"{self.failures} failed"] if self.failures else []
        return Group(self.preview(), *([", ".join(notes)] if notes else []), self._bar)
