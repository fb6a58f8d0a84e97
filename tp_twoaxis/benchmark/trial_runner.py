"""Trials, run one after another: what a process of any engine does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from tp_twoaxis.benchmark.methods import Trial
from tp_twoaxis.benchmark.results import ResultsFolder
from tp_twoaxis.benchmark.shared_work import LoadedNetwork, Shared
from tp_twoaxis.benchmark.sweep import BenchmarkConfig
from tp_twoaxis.benchmark.trial import run_trial
from tp_twoaxis.runtime.serialization import Json


class TrialRunner:
    """Runs a sweep's trials, and keeps what the next one may share: images in memory, statistics, gradients.

    Trials of one network and seed that follow each other share everything that one of them made.

    Args:
        config: the sweep.
        device: where the networks run.
    """

    def __init__(self, config: BenchmarkConfig, device: str = "cpu") -> None:
        self.config = config
        self.device = device
        self._shared: Shared | None = None

    def run(self, trial: Trial) -> Json:
        """Run a trial; a failure is a record too, see :func:`~tp_twoaxis.benchmark.trial.run_trial`."""
        if self._shared is None or (self._shared.network.entry.name, self._shared.seed) != (trial.network, trial.seed):
            self._shared = Shared(self._network(trial), trial.seed)
        return run_trial(self._shared, trial, self.config)

    def _network(self, trial: Trial) -> LoadedNetwork:
        if self._shared is not None and self._shared.network.entry.name == trial.network:
            return self._shared.network.for_seed(trial.seed)
        return LoadedNetwork(self.config, trial.network, trial.seed, self.device)


def run_trials(
    results: ResultsFolder, trials: Sequence[Trial], runner: TrialRunner, done: Callable[[], None] | None = None
) -> None:
    """Run trials one after another and write each.

    Args:
        results: where to write.
        trials: what to run; all are run, whether they are there or not.
        runner: of the same sweep.
        done: called after each trial.

    Raises:
        TwoAxisError: a trial could not be written.
    """
    for trial in trials:
        results.write(trial, runner.run(trial))
        if done is not None:
            done()


def grouped(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Split the trials, which are in the config's order, into one list a network and seed."""
    return [list(group) for _, group in groupby(trials, key=lambda trial: (trial.network, trial.seed))]


def chunks(trials: Sequence[Trial], workers: int) -> list[list[Trial]]:
    """Split the trials into one chunk a network and seed; into more where workers would have nothing to do."""
    groups = grouped(trials)
    pieces = -(-workers // max(len(groups), 1))
    return [part for group in groups for k in range(pieces) if (part := group[k::pieces])]
