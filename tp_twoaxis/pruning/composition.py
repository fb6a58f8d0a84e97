"""Several removals as one: what is gone since the dense network, in the dense network's numbering."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from tp_twoaxis.pruning.graph import PrunableGroup
from tp_twoaxis.pruning.repair import LayerLoss
from tp_twoaxis.pruning.report import GroupReport

Root = tuple[str, bool]


def dense_numbers(gone: Iterable[int], channels: Iterable[int]) -> list[int]:
    """Number channels as they were numbered before others left.

    Args:
        gone: those that left, in the old numbering.
        channels: some of those that stayed, in the new one.

    Returns:
        ``channels`` in the old numbering.

    Example:
        >>> dense_numbers([1, 2, 5], [0, 1, 2, 3])
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


def compose_losses(first: LayerLoss, then: LayerLoss) -> LayerLoss:
    """Join a layer's losses in two removals, the second numbered as the first left the layer.

    Example:
        >>> import torch
        >>> nothing = torch.zeros(1, dtype=torch.bool)
        >>> first = LayerLoss(torch.tensor([False, True, False]), nothing)
        >>> compose_losses(first, LayerLoss(torch.tensor([False, True]), nothing)).inputs.tolist()
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
class Removals:
    """All that removals one after another took out of a network.

    Attributes:
        macs: of the dense network; None while nothing is removed.
        budget: the dense network's, as its cost model counts it; likewise.
        groups: the report of every group, with its root layer and whether that writes or reads the group's channels.
        removed_channels: layer -> output channels that left it, ascending.
        losses: layer -> its losses.
    """

    macs: int | None = None
    budget: float | None = None
    groups: list[tuple[Root, GroupReport]] = field(default_factory=list)
    removed_channels: dict[str, list[int]] = field(default_factory=dict)
    losses: dict[str, LayerLoss] = field(default_factory=dict)

    def width(self, group: PrunableGroup, network: nn.Module) -> int:
        """Channels that a group of the present network had in the dense one."""
        place = self._place(*self._dense(group, network))
        if place is None:
            return len(group.channels)
        report = self.groups[place][1]
        return len(report.kept) + len(report.removed)

    def then(
        self,
        groups: list[PrunableGroup],
        reports: list[GroupReport],
        removed: dict[str, list[int]],
        losses: dict[str, LayerLoss],
        network: nn.Module,
        macs: int,
        budget: float,
    ) -> Removals:
        """Join a further removal, described in the numbering of the present network; to be asked before it.

        Args:
            groups: of the present network.
            reports: what each of them keeps.
            removed: layer -> output channels that leave it.
            losses: layer -> its losses.
            network: the present network.
            macs: of the dense network.
            budget: likewise.
        """
        known = list(self.groups)
        for group, report in zip(groups, reports, strict=True):
            root, numbers = self._dense(group, network)
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
            total[layer] = sorted([*gone, *dense_numbers(gone, channels)])
        joined = {
            name: compose_losses(self.losses[name], loss) if name in self.losses else loss
            for name, loss in losses.items()
        }
        return Removals(macs, budget, known, total, joined)

    def _dense(self, group: PrunableGroup, network: nn.Module) -> tuple[Root, list[int]]:
        """Give a group's root layer and its channels as numbered in the dense layer."""
        layer, handler = group.group[0].dep.target.module, group.group[0].dep.handler
        name = next(name for name, module in network.named_modules() if module is layer)
        writes = bool(group.group._DG.is_out_channel_pruning_fn(handler))
        if name not in self.losses:
            return (name, writes), group.channels
        gone = self.losses[name].outputs if writes else self.losses[name].inputs
        return (name, writes), dense_numbers(gone.nonzero()[:, 0].tolist(), group.channels)

    def _place(self, root: Root, numbers: list[int]) -> int | None:
        """Find the group of a root layer that has channels of these dense numbers."""
        places = (at for at, (known, report) in enumerate(self.groups) if known == root and numbers[0] in report.kept)
        return next(places, None)
