"""Pruning in steps: score, remove, repair, and again on what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.dependency.flops import ExampleInputs, MacsCount
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance import Criterion, Importance, PruningState
from tp_twoaxis.pruning.config import PruningConfig
from tp_twoaxis.pruning.history import RemovalHistory
from tp_twoaxis.pruning.latency_step import DenseLatency, prune_step_to_latency
from tp_twoaxis.pruning.step import Removal, prune_step
from tp_twoaxis.repair import RepairReport
from tp_twoaxis.runtime.model_state import ModelSnapshot
from tp_twoaxis.runtime.progress_bar import progress_bar
from tp_twoaxis.runtime.timing import timed


def step_shares(flops: float, steps: int) -> list[float]:
    """Share of the dense budget that each step leaves: a geometric series that ends at the target.

    Every step then removes the same part of what is there. Equal amounts instead would take an ever larger part of
    an ever smaller network, and the last step the largest, where a choice can be corrected least (ours).

    Args:
        flops: share to keep in the end, in (0, 1].
        steps: how many, at least 1.

    Example:
        >>> [round(share, 3) for share in step_shares(0.343, 3)]
        [0.7, 0.49, 0.343]
    """
    return [flops ** (step / steps) for step in range(1, steps)] + [flops]


@dataclass(frozen=True)
class PruningOutcome:
    """What came out of all steps together.

    Attributes:
        importance: what ranked the channels of the dense network.
        count: MACs of the pruned network.
        achieved: share of the dense network's budget that is left.
        history: all removals, by original indices.
        repair: the last repair, which covers all removals.
        notes: each once.
    """

    importance: Importance
    count: MacsCount
    achieved: float
    history: RemovalHistory
    repair: RepairReport
    notes: list[str]


def prune_in_steps(
    inputs: ExampleInputs,
    importance: Importance,
    criterion: Criterion,
    state: PruningState,
    config: PruningConfig,
    dense: MacsCount,
    seconds: dict[str, float],
    repair: Callable[[dict[str, PrunedChannels], bool], RepairReport],
    latency: DenseLatency | None = None,
) -> PruningOutcome:
    """Remove channels in one step or in several.

    Between two steps the network is repaired, and the criterion built anew on the repaired network. What the repair
    wrote is then taken back and the next channels are removed from the unrepaired network, so that a repair always
    covers all removals at once, from the dense network's weights and towards the dense network's outputs: errors of
    repairs do not add up, and the last repair is the one that the same channels would get in one step. A
    least-squares reconstruction is not made worse by that: predicting what left first from what stays, or first from
    what was there in between and that from what stays, is the same projection.

    Steps before the last stop short of their share rather than pass it, and fill no gap with cheaper channels, which
    would use those up for a precision that is not needed. So if the scores of what stays never changed, several
    steps would remove what one removes.

    Args:
        inputs: of the network's forward.
        importance: ranks the channels of the first step.
        criterion: builds the importance of later steps.
        state: the dense network, which is changed in place; on an error the caller restores it.
        config: what every step keeps to; floors are shares of the dense groups.
        dense: MACs of the network.
        seconds: phase -> seconds, summed over the steps.
        repair: repairs the network, given all channels that it lost and whether its errors will be read.
        latency: the dense network beside which outcomes are timed, where the budget is a latency.

    Raises:
        TwoAxisError: as of :func:`~tp_twoaxis.pruning.step.prune_step`, of ``repair`` and of the criterion; the
            message of a later step names it.
    """
    network = _model_of(state)
    first = importance
    trains = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    history, count, unrepaired = RemovalHistory(), dense, None
    notes: dict[str, None] = {}
    steps = config.steps
    with progress_bar(total=steps, desc="", unit="step", show=state.progress and steps > 1) as bar:
        for step, share in enumerate(step_shares(config.flops, steps), 1):
            bar.set_description(f"step {step} of {steps}")
            with _named_in_errors(step, steps):
                if step > 1:
                    with timed(seconds, "calibrate"):
                        # removal makes new parameters, which all train and may carry a part of older gradients
                        network.zero_grad(set_to_none=True)
                        for name, parameter in network.named_parameters():
                            parameter.requires_grad_(trains.get(name, parameter.requires_grad))
                        importance = criterion.build(state.after_step(history.removed_outputs, history.removed_inputs))
                removal = Removal(network, inputs, importance, config, history, count, seconds, unrepaired=unrepaired)
                if latency is None:
                    result = prune_step(removal, share)
                else:
                    result = prune_step_to_latency(removal, share, latency)
                history, count = result.history, result.count
                unrepaired = ModelSnapshot(network) if step < steps else None
                with timed(seconds, "repair"):
                    repaired = repair(history.masks, step == steps)
                for phase, time in repaired.seconds.items():
                    seconds[phase] = seconds.get(phase, 0.0) + time
            notes |= dict.fromkeys(result.notes)
            bar.update()
    return PruningOutcome(first, count, result.achieved, history, repaired, list(notes))


def _model_of(state: PruningState) -> nn.Module:
    assert state.model is not None
    return state.model


@contextmanager
def _named_in_errors(step: int, steps: int) -> Iterator[None]:
    """Name a later step in its errors."""
    try:
        yield
    except TwoAxisError as error:
        if step == 1:
            raise
        raise type(error)(f"step {step} of {steps}: {error}") from error
