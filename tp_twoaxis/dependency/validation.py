"""Which groups may really be pruned: their channels arrive where Torch-Pruning says, and nobody else reads them.

Torch-Pruning maps channels through reshapes by rules of its own. Common patterns break them and still run:
``permute(0, 2, 3, 1).flatten(1)`` (it takes the flattened order for channel-major) and ``chunk`` (it takes
the halves in the order in which it met them); then the wrong inputs of the next layer would be removed. And a feature
that is read may be an output of the model too, or the input of a head that runs in training only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from tp_twoaxis.dependency.acting_weights import layers_with_other_weights
from tp_twoaxis.dependency.attention import AttentionUnit
from tp_twoaxis.dependency.channel_marks import (
    MIXING_LAYERS,
    ChooseUnits,
    Sightings,
    first_third,
    follow_marks,
    own_layers,
    scattered_third,
    single_units,
    unit_count,
)
from tp_twoaxis.dependency.flops import ExampleInputs
from tp_twoaxis.dependency.graph import PrunableGroup, group_key, prunable_groups
from tp_twoaxis.dependency.head_removal import fixed_heads
from tp_twoaxis.dependency.trial_removal import trial_removal
from tp_twoaxis.errors import listing
from tp_twoaxis.runtime.model_state import eval_mode

_HOW = {
    "heads": ", its code does not run with one less",
    "head-dims": " as wide as they are, its code does not work with narrower ones",
}


def verified_groups(
    graph: Any,
    model: nn.Module,
    example_inputs: ExampleInputs,
    ignored_layers: list[nn.Module],
    attention: AttentionUnit = "heads",
    *,
    try_all: bool = False,
) -> tuple[list[PrunableGroup], list[str]]:
    """List the prunable groups whose channels arrive at the inputs that Torch-Pruning would remove, and only there.

    Args:
        graph: the model's, of :func:`~tp_twoaxis.dependency.graph.build_graph`.
        model: the dense model; afterwards it is as before.
        example_inputs: of its forward.
        ignored_layers: layers that keep their channels.
        attention: what attention loses.
        try_all: also remove channels of every group on trial: a network did not run after a removal, and the groups
            that its code does not follow are to stay whole.

    Returns:
        The groups, and notes on what stays whole or may break.
    """
    groups, notes = prunable_groups(graph, model, ignored_layers, attention)
    if any(group.attention for group in groups):
        stuck = fixed_heads(model, example_inputs, ignored_layers, attention)
        groups = [group for group in groups if group_key(group) not in stuck]
        if stuck:
            reason = next(iter(stuck.values()))
            notes.append(f"{listing(stuck, 3)}: keeps its heads{_HOW[attention]} ({reason})")
    reasons = layers_with_other_weights(groups, model, example_inputs)
    groups = [group for group in groups if group_key(group) not in reasons]
    faults = {key: fault.reason for key, fault in routing_faults(groups, model, example_inputs).items()}
    groups = [group for group in groups if group_key(group) not in faults]
    called = set(own_layers(model))
    idle: dict[nn.Module, str] = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, MIXING_LAYERS) and module in called and module not in graph.module2node
    }
    if idle:
        read, unheard = read_in_training(groups, idle, model, example_inputs)
        faults |= read
        groups = [group for group in groups if group_key(group) not in read]
        if unheard:
            notes.append(
                f"{listing(unheard)} did not run on example_inputs, or without gradients, where Torch-Pruning cannot "
                "follow; they may no longer fit what they read"
            )
    if try_all:
        misfits = _misfits(groups, model, example_inputs)
        faults |= {key: fault.reason for key, fault in misfits.items()}
        groups = [group for group in groups if group_key(group) not in misfits]
    notes += [f"{name}: stays whole, because {reason}" for name, reason in (reasons | faults).items()]
    return groups, notes


@dataclass(frozen=True)
class RoutingFault:
    """Why a group must stay whole.

    Attributes:
        misread: layers that would lose other inputs than those where its channels arrive.
        outputs: whether its channels are outputs of the model too.
        misfit: what went wrong when channels were removed on trial, in words.
    """

    misread: tuple[str, ...] = ()
    outputs: bool = False
    misfit: str | None = None

    @property
    def reason(self) -> str:
        """The fault in words, to follow "because"."""
        if self.misread:
            return f"Torch-Pruning maps it to the wrong inputs of {listing(self.misread)}"
        if self.outputs:
            return "its channels are outputs of the model too"
        return f"the network does not go on with fewer ({self.misfit})"


def routing_faults(
    groups: Sequence[PrunableGroup], model: nn.Module, example_inputs: ExampleInputs
) -> dict[str, RoutingFault]:
    """Find groups whose channels reach other inputs than would be removed, or outputs of the model.

    All groups are marked at once (:func:`~tp_twoaxis.dependency.channel_marks.follow_marks`), by a first and by a
    scattered third of their channels. Where something disagrees the groups are halved until it is known whose fault it
    is. A layer that receives nothing but marks, or none, proves nothing: then fewer channels are marked, down to single
    ones, and if no number tells, because an operation mixes channels, some are removed on trial
    (:func:`~tp_twoaxis.dependency.trial_removal.trial_removal`).

    Args:
        groups: the prunable groups.
        model: the dense model; afterwards it is as before.
        example_inputs: of its forward.

    Returns:
        Group key -> fault; empty when all is well.

    Example:
        >>> import torch
        >>> from tp_twoaxis.dependency.graph import build_graph
        >>> net, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6 * 4, 2)), torch.randn(1, 3, 4, 4)
        >>> groups, _ = prunable_groups(build_graph(net, x), net, [])
        >>> routing_faults(groups, net, x)
        {}
    """
    void: list[bool] = []  # whether the model writes NaN by itself, found out when it matters

    def look(chosen: Sequence[PrunableGroup], *patterns: ChooseUnits) -> Iterator[Sightings]:
        for choose in patterns:
            seen = follow_marks(chosen, choose, model, example_inputs)
            if seen.outputs and not void:
                void.append(follow_marks((), choose, model, example_inputs).outputs)
            seen.outputs = seen.outputs and not void[0]
            yield seen

    def first_trouble(chosen: Sequence[PrunableGroup]) -> Sightings | None:
        return next(filter(None, look(chosen, first_third, scattered_third)), None)

    names = dict(model.named_modules())

    def readers(chosen: Sequence[PrunableGroup], seen: Sightings) -> list[PrunableGroup]:
        """Give the groups that the layers in question should read; none where it may be anybody's fault."""
        layers = {names[name] for name in (*seen.misread, *seen.blind)}
        read = [group for group in chosen if any(part.module in layers for part in group.parts if part.is_consumer)]
        return [] if seen.outputs or seen.error else read

    faults: dict[str, RoutingFault] = {}
    undecided: list[PrunableGroup] = []
    for group in _singled_out(list(groups), first_trouble, readers):
        fault = _judged(look([group], first_third, scattered_third, *single_units(unit_count(group))))
        if fault is None:
            undecided.append(group)
        elif fault.misread or fault.outputs:
            faults[group_key(group)] = fault
    return faults | _misfits(undecided, model, example_inputs)


def _judged(sightings: Iterator[Sightings]) -> RoutingFault | None:
    """Judge one group by ever fewer marks; None where no marks tell."""
    blind: set[str] | None = None
    for seen in sightings:
        if seen.error is None and (seen.misread or seen.outputs):
            return RoutingFault(tuple(seen.misread), seen.outputs)
        if seen.error is None:
            blind = set(seen.blind) if blind is None else blind & set(seen.blind)
    return RoutingFault() if blind is not None and not blind else None


def _singled_out(
    groups: list[PrunableGroup],
    look: Callable[[Sequence[PrunableGroup]], Any],
    suspect: Callable[[Sequence[PrunableGroup], Any], list[PrunableGroup]] = lambda groups, seen: [],
) -> list[PrunableGroup]:
    """Find single groups that look wrong among many, by looking at suspects and others apart, or at halves."""
    seen = look(groups) if groups else None
    if not seen:
        return []
    if len(groups) == 1:
        return groups
    first = suspect(groups, seen)
    if not 0 < len(first) < len(groups):
        first = groups[: len(groups) // 2]
    keys = {group_key(group) for group in first}
    rest = [group for group in groups if group_key(group) not in keys]
    return _singled_out(first, look, suspect) + _singled_out(rest, look, suspect)


def _misfits(
    groups: Sequence[PrunableGroup],
    model: nn.Module,
    example_inputs: ExampleInputs,
    sound: Sequence[PrunableGroup] = (),
) -> dict[str, RoutingFault]:
    """Find groups with whose removal, beside that of the sound ones, the network does not go on.

    By halving; the second half is tried beside what is sound of the first, so that all that is sound goes together.
    """
    reason = trial_removal([*sound, *groups], model, example_inputs) if groups else None
    if reason is None:
        return {}
    if len(groups) == 1:
        return {group_key(groups[0]): RoutingFault(misfit=reason)}
    half = len(groups) // 2
    first = _misfits(groups[:half], model, example_inputs, sound)
    sound = [*sound, *(group for group in groups[:half] if group_key(group) not in first)]
    return first | _misfits(groups[half:], model, example_inputs, sound)


def read_in_training(
    groups: Sequence[PrunableGroup], idle: dict[nn.Module, str], model: nn.Module, example_inputs: ExampleInputs
) -> tuple[dict[str, str], list[str]]:
    """Find groups that are read by layers that ran in training mode only.

    The model's own code runs in training mode, its layers (dropout, norms) in evaluation mode.

    Args:
        groups: the prunable groups.
        idle: layers that do not run in evaluation mode, with their names.
        model: the dense model; afterwards it is as before.
        example_inputs: of its forward.

    Returns:
        Group key -> why it stays whole; names of layers that did not run in training mode either.
    """
    ran: set[str] = set()
    handles = [m.register_forward_pre_hook(lambda m, _: ran.add(idle[m])) for m in idle]
    errors: list[Exception] = []

    def look(chosen: Sequence[PrunableGroup]) -> list[str]:
        seen = follow_marks(chosen, first_third, model, example_inputs, mode=_branches_of_training, unlisted=idle)
        if seen.error is not None:
            errors.append(seen.error)
        return [name for name in seen.misread if name in idle.values()]

    try:
        reads = {group_key(group): look([group]) for group in _singled_out(list(groups), look)}
    finally:
        for handle in handles:
            handle.remove()
    reasons = {key: f"{listing(layers)} reads it in training mode" for key, layers in reads.items()}
    return reasons, [name for name in idle.values() if name not in ran or errors]


@contextmanager
def _branches_of_training(model: nn.Module) -> Iterator[None]:
    """Run a block with modules that hold others in training mode and all others in evaluation mode."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with eval_mode(model):
        for module in model.modules():
            module.training = next(module.children(), None) is not None
        try:
            yield
        finally:
            for buffer, values in buffers:
                buffer.copy_(values)
