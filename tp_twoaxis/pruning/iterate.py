"""Pruning in steps: score, remove, repair, and again on what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from tp_twoaxis.borrow import ModelSnapshot
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.pruning.composition import Removals
from tp_twoaxis.pruning.cut import Cut, Limits, cut_to
from tp_twoaxis.pruning.macs import ExampleInputs, MacsCount
from tp_twoaxis.pruning.phases import timed
from tp_twoaxis.pruning.repair import LayerLoss, RepairReport


def step_shares(flops: float, steps: int) -> list[float]:
    """Say what share of the dense budget each step leaves: a geometric series that ends at the target.

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
class Pruned:
    """What came out of all steps together.

    Attributes:
        count: MACs of the pruned network.
        achieved: share of the dense network's budget that is left.
        removals: of all steps, in dense numbering.
        mended: the last repair, which mends them all.
        notes: each once.
    """

    count: MacsCount
    achieved: float
    removals: Removals
    mended: RepairReport
    notes: list[str]


def prune_in_steps(
    network: nn.Module,
    inputs: ExampleInputs,
    importance: Callable[[Any], Tensor],
    limits: Limits,
    dense: MacsCount,
    seconds: dict[str, float],
    *,
    flops: float,
    steps: int,
    mend: Callable[[dict[str, LayerLoss], bool], RepairReport],
    renew: Callable[[dict[str, LayerLoss]], Callable[[Any], Tensor]],
    progress: bool,
) -> Pruned:
    """Remove channels in one step or in several.

    Between two steps the network is repaired, and the importance renewed on the repaired network. What the repair
    wrote is then taken back and the next channels are removed from the network as it was cut, so that a repair
    always mends all removals at once, from the dense network's weights and towards the dense network's outputs:
    errors of repairs do not add up, and the last repair is the one that the same channels would get in one step. A
    least-squares fold is not made worse by that: predicting what left first from what stays, or first from
    what was there in between and that from what stays, is the same projection.

    Steps before the last stop short of their share rather than pass it, and fill no gap with cheaper channels, which
    would use those up for a precision that nobody asked for. So if the scores of what stays never changed, several
    steps would remove what one removes.

    Args:
        network: changed in place; on an error the caller restores it.
        inputs: of its forward.
        importance: ranks the channels of the first step.
        limits: what every step keeps to; floors are shares of the dense groups.
        dense: MACs of the network.
        seconds: phase -> seconds, summed over the steps.
        flops: share of the budget to keep in the end.
        steps: how many.
        mend: repairs the network, given all its losses since the dense one and whether its errors will be read.
        renew: gives an importance for the repaired network, given the same.
        progress: show which step is running.

    Raises:
        TwoAxisError: as of :func:`~tp_twoaxis.pruning.cut.cut_to`, ``mend`` and ``renew``; the message of a later step
            says which.
    """
    trains = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    removals, count, bare = Removals(), dense, None
    notes: dict[str, None] = {}
    with tqdm(total=steps, unit="step", leave=False, disable=not progress or steps == 1) as bar:
        for step, share in enumerate(step_shares(flops, steps), 1):
            bar.set_description(f"step {step} of {steps}")
            with _said(step, steps):
                if step > 1:
                    with timed(seconds, "calibrate"):
                        # removal makes new parameters, which all train and may carry a cut of older gradients
                        network.zero_grad(set_to_none=True)
                        for name, parameter in network.named_parameters():
                            parameter.requires_grad_(trains.get(name, parameter.requires_grad))
                        importance = renew(removals.losses)
                cut: Cut = cut_to(
                    network, inputs, importance, share, limits, removals, count, seconds, goal=flops, bare=bare
                )
                removals, count = cut.removals, cut.count
                bare = ModelSnapshot(network) if step < steps else None
                with timed(seconds, "repair"):
                    mended = mend(removals.losses, step == steps)
                for phase, time in mended.seconds.items():
                    seconds[phase] = seconds.get(phase, 0.0) + time
            notes |= dict.fromkeys(cut.notes)
            bar.update()
    return Pruned(count, cut.achieved, removals, mended, list(notes))


@contextmanager
def _said(step: int, steps: int) -> Iterator[None]:
    """Say in errors of later steps which it was."""
    try:
        yield
    except TwoAxisError as error:
        if step == 1:
            raise
        raise type(error)(f"step {step} of {steps}: {error}") from error
