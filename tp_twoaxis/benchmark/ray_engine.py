"""A sweep on a Ray cluster: the same trials in the same folder, run on as many machines as there are."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tp_twoaxis.benchmark.engines import LOOK
from tp_twoaxis.benchmark.methods import Trial
from tp_twoaxis.benchmark.results import ResultsFolder
from tp_twoaxis.benchmark.sweep import BenchmarkConfig
from tp_twoaxis.benchmark.trial_runner import TrialRunner, chunks
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.serialization import Json


@dataclass(frozen=True)
class RayEngine:
    """Ray actors, one trial at a time each; the calling process alone writes the folder.

    So the folder need not be shared between machines, and a trial is never there twice. Weights and images must be
    found at the config's paths on every machine. An actor that dies (a machine is lost, memory runs out) is started
    again by Ray and runs its trial anew.

    Attributes:
        workers: actors.
        cpus: of each, and its torch threads unless ``OMP_NUM_THREADS`` is set where it runs.
        gpus: of each; 0.25 puts four on one GPU. Above 0 they run on ``cuda`` whatever the device given.
        retries: how often a dead actor is started again.
        address: of a running cluster, ``auto`` finds the machine's own; None takes ``RAY_ADDRESS``, or else starts
            one on this machine and ends it afterwards. A cluster that this process is connected to is used as it is.

    Raises:
        TwoAxisError: a number is out of range.
    """

    workers: int = 1
    cpus: float = 1
    gpus: float = 0
    retries: int = 3
    address: str | None = None

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus <= 0 or self.gpus < 0 or self.retries < 0:
            raise TwoAxisError(
                "ray: expected workers >= 1, cpus > 0, gpus >= 0 and retries >= 0, got "
                f"{self.workers}, {self.cpus:g}, {self.gpus:g} and {self.retries}"
            )

    def fill(self, results: ResultsFolder, trials: Sequence[Trial], device: str, look: Callable[[], None]) -> None:
        """Run and write all of ``trials``.

        Raises:
            TwoAxisError: Ray is missing, the cluster has not the resources, an actor died too often, or a trial could
                not be written.
        """
        if not trials:
            return
        ray = _ray()
        own = not ray.is_initialized()
        if own:
            ray.init(address=self.address, include_dashboard=False, log_to_driver=False, logging_level="warning")
        try:
            self._check_resources(ray.cluster_resources())
            self._fill(ray, results, trials, "cuda" if self.gpus else device, look)
        finally:
            if own:
                ray.shutdown()

    def _check_resources(self, there: dict[str, float]) -> None:
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        short = {name: number for name, number in wanted.items() if number > there.get(name, 0.0)}
        if short:
            name, number = next(iter(short.items()))
            raise TwoAxisError(
                f"ray: expected a cluster with {number:g} {name} for a trial, it has {there.get(name, 0.0):g} in all; "
                "request less, or connect to a larger one with RAY_ADDRESS"
            )

    def _fill(
        self, ray: Any, results: ResultsFolder, trials: Sequence[Trial], device: str, look: Callable[[], None]
    ) -> None:
        actor = ray.remote(_Worker).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=self.retries, max_task_retries=self.retries
        )
        waiting = deque(deque(chunk) for chunk in chunks(trials, self.workers))
        running: dict[Any, tuple[Any, deque[Trial], Trial]] = {}
        workers = []

        def start(worker: Any, chunk: deque[Trial]) -> None:
            trial = chunk.popleft()
            running[worker.run.remote(trial)] = worker, chunk, trial

        try:
            for _ in range(min(self.workers, len(waiting))):
                workers.append(actor.remote(results.config, device, max(1, int(self.cpus))))
                start(workers[-1], waiting.popleft())
            while running:
                finished, _ = ray.wait(list(running), num_returns=1, timeout=LOOK)
                for reference in finished:
                    worker, chunk, trial = running.pop(reference)
                    results.write(trial, self._record(ray, reference, results))
                    if chunk or waiting:
                        start(worker, chunk or waiting.popleft())
                look()
        finally:
            for worker in workers:
                ray.kill(worker)

    def _record(self, ray: Any, reference: Any, results: ResultsFolder) -> Json:
        try:
            record: Json = ray.get(reference)
        except ray.exceptions.RayActorError as error:
            raise TwoAxisError(
                f"{results.path}: a Ray worker died more than {self.retries} times, probably for lack of memory; "
                "what is done is kept, run again, perhaps with fewer workers or more resources for each"
            ) from error
        return record


class _Worker:
    """Lives in an actor."""

    def __init__(self, config: BenchmarkConfig, device: str, threads: int) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or threads))
        self.runner = TrialRunner(config, device)

    def run(self, trial: Trial) -> Json:
        return self.runner.run(trial)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise TwoAxisError('engine "ray": needs Ray, it is missing; pip install "tp-twoaxis[ray]"') from error
    return ray
