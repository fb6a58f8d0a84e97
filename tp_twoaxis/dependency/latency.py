"""Time networks and layers in turn with a reference: medians of ratios, which a busy machine hardly touches."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tp_twoaxis.dependency.flops import ExampleInputs, call, synchronize
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.model_state import eval_mode, fork_rng

Floats = npt.NDArray[np.float64]
Run = tuple[nn.Module, ExampleInputs]
"""What is timed: a module and what it is called with."""

# a reading of the clock covers at least so many seconds: what is quicker runs several times
READING = 1e-3
MOST_REPEATS = 200
# a comparison reads in batches of so many ratios, at least two of them, at most sixteen or for so many seconds, until
# the median's standard error is this share of it
BATCH, MOST_RATIOS, LONGEST, PRECISION = 6, 96, 10.0, 0.005


def clock(devices: set[torch.device]) -> float:
    """Wait for devices and read the clock, in seconds; nothing else reads it here.

    Where a processor computes with one thread, it is that thread's own time, which other jobs on the machine do not
    lengthen; everywhere else it is the wall's.

    Args:
        devices: on which something computes.
    """
    synchronize({device for device in devices if device.type == "cuda"})
    alone = all(device.type == "cpu" for device in devices) and torch.get_num_threads() == 1
    return time.thread_time() if alone else time.perf_counter()


@dataclass(frozen=True)
class LatencyRatio:
    """How long one network takes beside another.

    Attributes:
        ratio: of their latencies, a median.
        standard_error: of that median.
        milliseconds: of the one, and of the other; medians.
    """

    ratio: float
    standard_error: float
    milliseconds: tuple[float, float]


def compare_latency(network: nn.Module, other: nn.Module, inputs: ExampleInputs) -> LatencyRatio:
    """Measure how long a network takes for its inputs, as a share of what another one takes.

    The two run in turn, and each reading is divided by the mean of the other network's before and after it, so that
    what slows the machine down slows down both; the median of these ratios counts. (On a machine with more jobs than
    cores it scatters far less than a ratio of medians or of quickest times, which belong to other moments.) After
    twelve ratios more follow, up to 96 or ten seconds, until the standard error (from the quartiles, as of a normal
    distribution's median) is half a percent.

    Args:
        network: timed in evaluation and inference mode, with the threads that there are.
        other: in the same way.
        inputs: as for :func:`~tp_twoaxis.dependency.flops.count_macs`; the time is of this batch.

    Raises:
        TwoAxisError: something is on the meta device.

    Example:
        >>> wide, narrow = nn.Linear(64, 64), nn.Linear(64, 64)
        >>> compare_latency(narrow, wide, torch.zeros(1, 64)).ratio > 0.0
        True
    """
    own, beside = (network, inputs), (other, inputs)
    ratios: list[float] = []
    times: list[tuple[float, float]] = []
    spent = 0.0
    with timing_mode([own, beside]):
        pair = _Reading(own), _Reading(beside)
        while len(ratios) < MOST_RATIOS:
            found, readings = _in_turn(pair[1], [pair[0]] * BATCH)
            ratios += found
            times += readings
            spent += sum(one * pair[0].repeats + another * pair[1].repeats for one, another in readings)
            precise = _error(ratios) <= PRECISION * statistics.median(ratios)
            if len(ratios) >= 2 * BATCH and (precise or spent > LONGEST):
                break
    one, another = (1000.0 * statistics.median(part) for part in zip(*times, strict=True))
    return LatencyRatio(statistics.median(ratios), _error(ratios), (one, another))


def relative_latencies(reference: Run, runs: Sequence[Run], rounds: int) -> list[float]:
    """Time several runs in turn with one that they are compared with.

    Args:
        reference: timed before and after every run.
        runs: what is timed.
        rounds: how often.

    Returns:
        Of each run the median of its time over the reference's.

    Example:
        >>> run = nn.Linear(4, 4), torch.zeros(1, 4)
        >>> len(relative_latencies(run, [run, run], rounds=3))
        2
    """
    with timing_mode([reference, *runs]):
        beside, readings = _Reading(reference), [_Reading(run) for run in runs]
        ratios = [_in_turn(beside, readings)[0] for _ in range(rounds)]
    return [statistics.median(own) for own in zip(*ratios, strict=True)]


def layer_shares(
    network: nn.Module, inputs: ExampleInputs, layers: Iterable[nn.Module], rounds: int
) -> tuple[dict[nn.Module, float], float]:
    """Find out which part of a network's time each of some layers takes, in place.

    Args:
        network: timed as it is.
        inputs: of its forward.
        layers: of the network, none of them inside another.
        rounds: passes whose median counts; two before these warm up.

    Returns:
        Of each layer its share of the time of a pass, all of its calls together; and milliseconds of a pass.
    """
    found: dict[nn.Module, list[float]] = {layer: [] for layer in layers}
    totals: list[float] = []
    devices = _devices(network, inputs)
    taken: dict[nn.Module, float] = {}
    began: dict[nn.Module, float] = {}

    def enter(layer: nn.Module, *_: Any) -> None:
        began[layer] = clock(devices)

    def leave(layer: nn.Module, *_: Any) -> None:
        taken[layer] = taken.get(layer, 0.0) + clock(devices) - began[layer]

    handles = [layer.register_forward_pre_hook(enter) for layer in found]
    handles += [layer.register_forward_hook(leave) for layer in found]
    try:
        with timing_mode([(network, inputs)]):
            for _ in range(2 + rounds):
                taken.clear()
                start = clock(devices)
                call(network, inputs)
                totals.append(clock(devices) - start)
                for layer, shares in found.items():
                    shares.append(taken.get(layer, 0.0) / max(totals[-1], 1e-12))
    finally:
        for handle in handles:
            handle.remove()
    shares_of = {layer: statistics.median(shares[2:]) for layer, shares in found.items()}
    return shares_of, 1000.0 * statistics.median(totals[2:])


@contextmanager
def timing_mode(runs: Sequence[Run]) -> Iterator[None]:
    """Run a block in which modules compute as in use: evaluation mode, inference mode; random state is put back.

    Raises:
        TwoAxisError: one of them is on the meta device.
    """
    modules = nn.ModuleList(module for module, _ in runs)
    leaves = [leaf for _, inputs in runs for leaf in tree_leaves(inputs)]
    if any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in [*modules.parameters(), *leaves]):
        raise TwoAxisError("latency: expected a model and inputs that compute, got meta tensors; load them on a device")
    with fork_rng(), eval_mode(modules), torch.inference_mode():
        yield


class _Reading:
    """Reads the clock around a run, which it warms up first; quick ones run several times."""

    def __init__(self, run: Run) -> None:
        self.module, self.inputs = run
        self.devices = _devices(*run)
        self.repeats = 1
        self()
        self.repeats = min(MOST_REPEATS, max(1, math.ceil(READING / max(self(), 1e-9))))

    def __call__(self) -> float:
        """Seconds of one run."""
        start = clock(self.devices)
        for _ in range(self.repeats):
            call(self.module, self.inputs)
        return (clock(self.devices) - start) / self.repeats


def _devices(module: nn.Module, inputs: ExampleInputs) -> set[torch.device]:
    return {leaf.device for leaf in (*module.parameters(), *tree_leaves(inputs)) if isinstance(leaf, Tensor)}


def _in_turn(beside: _Reading, readings: Sequence[_Reading]) -> tuple[list[float], list[tuple[float, float]]]:
    """Read each beside the reference: its time over the mean of the reference's before and after; and both times."""
    ratios, times = [], []
    before = beside()
    for reading in readings:
        own, after = reading(), beside()
        reference = (before + after) / 2
        ratios.append(own / max(reference, 1e-12))
        times.append((own, reference))
        before = after
    return ratios, times


def _error(ratios: list[float]) -> float:
    low, high = np.quantile(ratios, [0.25, 0.75])
    # a normal distribution's quartiles are 1.349 deviations apart, and its median has sqrt(pi / 2) times a mean's error
    return float(math.sqrt(math.pi / 2) * (high - low) / 1.349 / math.sqrt(len(ratios)))
