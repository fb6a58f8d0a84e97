"""What one removal after another took out of a network, by original indices: those of the dense network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.dependency.graph import PrunableGroup
from tp_twoaxis.dependency.groups import module_names, root_layer, roots_at_outputs
from tp_twoaxis.dependency.removal import GroupReport

Root = tuple[str, bool]


def original_indices(gone: Iterable[int], channels: Iterable[int]) -> list[int]:
    """Give channels the indices that they had before others left.

    Args:
        gone: those that left, by their old indices.
        channels: some of those that stayed, by their new indices.

    Returns:
        The old indices of ``channels``.

    Example:
        >>> original_indices([1, 2, 5], [0, 1, 2, 3])
        [0, 3, 4, 6]
    """
    leaving = sorted(gone)
    numbers = []
    for channel in channels:
        for left in leaving:
            if left > channel:
                break
            channel += 1
        numbers.append(channel)
    return numbers


def compose_masks(first: PrunedChannels, then: PrunedChannels) -> PrunedChannels:
    """Join what a layer loses in two removals, the second by indices of the layer as the first left it.

    Example:
        >>> import torch
        >>> nothing = torch.zeros(1, dtype=torch.bool)
        >>> first = PrunedChannels(torch.tensor([False, True, False]), nothing)
        >>> compose_masks(first, PrunedChannels(torch.tensor([False, True]), nothing)).inputs.tolist()
        [False, True, True]
    """
    return replace(
        first,
        inputs=_compose_masks(first.inputs, then.inputs),
        outputs=_compose_masks(first.outputs, then.outputs),
        norms=tuple(dict.fromkeys((*first.norms, *then.norms))),
    )


def _compose_masks(first: Tensor, then: Tensor) -> Tensor:
    return first.masked_scatter(~first, then)


@dataclass(frozen=True)
class RemovalHistory:
    """All that was removed from a network so far.

    Attributes:
        macs: of the dense network; None while nothing is removed.
        budget: the dense network's, as its cost model counts it; None while nothing is removed.
        groups: the report of every group, with its root layer and whether the group's channels are its outputs.
        removed_channels: layer -> output channels that left it, ascending.
        masks: layer -> the channels that it lost.
    """

    macs: int | None = None
    budget: float | None = None
    groups: list[tuple[Root, GroupReport]] = field(default_factory=list)
    removed_channels: dict[str, list[int]] = field(default_factory=dict)
    masks: dict[str, PrunedChannels] = field(default_factory=dict)

    @property
    def removed_outputs(self) -> dict[str, float]:
        """Layer -> share of its original output channels that is gone."""
        return {name: float(mask.outputs.double().mean()) for name, mask in self.masks.items()}

    @property
    def removed_inputs(self) -> dict[str, float]:
        """Layer -> share of its original input channels that is gone."""
        return {name: float(mask.inputs.double().mean()) for name, mask in self.masks.items()}

    def width(self, group: PrunableGroup) -> int:
        """Channels that a group of the present network had in the dense one."""
        place = self._place(*self._dense(group))
        if place is None:
            return len(group.channels)
        report = self.groups[place][1]
        return len(report.kept) + len(report.removed)

    def then(
        self,
        groups: list[PrunableGroup],
        reports: list[GroupReport],
        removed: dict[str, list[int]],
        masks: dict[str, PrunedChannels],
        macs: int,
        budget: float,
    ) -> RemovalHistory:
        """Join a further removal, given by indices of the present network; call it before that removal.

        Args:
            groups: of the present network.
            reports: what each of them keeps.
            removed: layer -> output channels that leave it.
            masks: layer -> the channels that it loses.
            macs: of the dense network.
            budget: of the dense network, as its cost model counts it.
        """
        known = list(self.groups)
        for group, report in zip(groups, reports, strict=True):
            root, numbers = self._dense(group)
            number = dict(zip(group.channels, numbers, strict=True))
            kept, leaving = ([number[channel] for channel in part] for part in (report.kept, report.removed))
            place = self._place(root, numbers)
            if place is None:  # a removal before made it prunable
                known.append((root, replace(report, kept=kept, removed=leaving)))
            else:
                old = known[place][1]
                known[place] = root, replace(old, kept=kept, removed=sorted([*old.removed, *leaving]))
        total = dict(self.removed_channels)
        for layer, channels in removed.items():
            gone = total.get(layer, [])
            total[layer] = sorted([*gone, *original_indices(gone, channels)])
        joined = {
            name: compose_masks(self.masks[name], mask) if name in self.masks else mask for name, mask in masks.items()
        }
        return RemovalHistory(macs, budget, known, total, joined)

    def _dense(self, group: PrunableGroup) -> tuple[Root, list[int]]:
        """Return a group's root layer and its channels' original indices."""
        name, at_outputs = module_names(group.group)[root_layer(group.group)], roots_at_outputs(group.group)
        if name not in self.masks:
            return (name, at_outputs), group.channels
        gone = self.masks[name].outputs if at_outputs else self.masks[name].inputs
        return (name, at_outputs), original_indices(gone.nonzero()[:, 0].tolist(), group.channels)

    def _place(self, root: Root, numbers: list[int]) -> int | None:
        """Find the group of a root layer that has channels of these original indices."""
        places = (at for at, (known, report) in enumerate(self.groups) if known == root and numbers[0] in report.kept)
        return next(places, None)
