"""Two importances in one: the first decides how many channels each group loses, the second which."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_twoaxis.dependency.groups import root_name, root_size
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance.constant_channels import rank_first
from tp_twoaxis.importance.criterion import Importance, criterion_from_importance
from tp_twoaxis.importance.distortion_curves import DistortionCurves
from tp_twoaxis.importance.pruning_state import PruningState
from tp_twoaxis.importance.registry import make_importance
from tp_twoaxis.importance.two_axis import TwoAxisImportance
from tp_twoaxis.scores.quantiles import assign_by_rank
from tp_twoaxis.statistics.store import CalibrationStatistics


class HybridImportance(tp.importance.Importance):  # type: ignore[misc]
    """The allocation of one importance with the ranking of another.

    Inside each group the sorted values of the allocation are assigned in the order of the ranking: the group's
    largest value goes to its highest ranked channel. A global threshold then removes as many channels of every group
    as the allocation alone would, and those that the ranking puts last (the paper's hybrid: Taylor decides how
    many, the local axis which). Equal ranks go by the allocation's own value. Channels that either part knows to be
    constant leave first, whatever was assigned to them.

    With Torch-Pruning's Taylor as allocation and capture as ranking, two CIFAR-10 ResNet-20 (conv shortcuts / option A)
    keep 60.1 / 64.4 % at half the MACs where capture alone keeps 58.0 / 65.5 %; protocol:
    :mod:`~tp_twoaxis.scores.composite`.

    The exact numbers hold for groups whose channels leave one by one. Where they leave in blocks (grouped
    convolutions, ``round_to``), the planner averages over a block after the values were assigned.

    Args:
        allocation: an importance, ours or Torch-Pruning's, or a criterion expression.
            Its normalisation is the hybrid's.
        ranking: the same for the order; only that counts, so its normalisation does not.
        stats: for names that need statistics.
        model: for names that need gradients: they are gathered here and **stay on the model**, as with
            :func:`~tp_twoaxis.importance.registry.make_importance`.
        loader: yields ``(images, labels)``; for names, with ``model``.

    Raises:
        TwoAxisError: here, a name is unknown or lacks what it needs; on a call, one of the two gave something else
            than one finite number a channel.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, [0, 1, 2, 3])
        >>> ranking = lambda group: torch.tensor([3.0, 1.0, 2.0, 0.0])
        >>> HybridImportance("l2", ranking)(group).argsort().tolist()
        [3, 1, 2, 0]
    """

    def __init__(
        self,
        allocation: str | Importance = "taylor",
        ranking: str | Importance = "capture",
        *,
        stats: CalibrationStatistics | None = None,
        model: nn.Module | None = None,
        loader: Iterable[Any] | None = None,
    ) -> None:
        def build(what: str | Importance) -> Importance:
            if not isinstance(what, str):
                if not callable(what):
                    raise TwoAxisError(f"hybrid: expected names or importances, got {type(what).__name__}")
                return what
            return make_importance(what, stats=stats, model=model, loader=loader, progress=False)

        self.allocation = build(allocation)
        self.ranking = build(ranking)

    def __repr__(self) -> str:
        return f"HybridImportance(allocation={_name(self.allocation)}, ranking={_name(self.ranking)})"

    @property
    def stats(self) -> CalibrationStatistics | None:
        """Statistics that the ranking, or else the allocation, was built from, if any."""
        ours = (getattr(part, "stats", None) for part in (self.ranking, self.allocation))
        return next((stats for stats in ours if stats is not None), None)

    def prepare_groups(self, groups: list[Any]) -> None:
        """Let each part see all groups that will be ranked, where it wants to."""
        for part in (self.allocation, self.ranking):
            if hasattr(part, "prepare_groups"):
                part.prepare_groups(groups)

    @property
    def per_macs(self) -> bool:
        """Whether the allocation's scores are per MAC."""
        return bool(getattr(self.allocation, "per_macs", False))

    @property
    def curves(self) -> DistortionCurves:
        """What the allocation measured of each group, or else the ranking; empty where neither measures curves."""
        found = (getattr(part, "curves", None) for part in (self.allocation, self.ranking))
        return next((curves for curves in found if curves), DistortionCurves([]))

    @property
    def is_ready(self) -> bool:
        """Whether both parts can rank as they are."""
        return all(getattr(part, "is_ready", True) for part in (self.allocation, self.ranking))

    def build(self, state: PruningState) -> HybridImportance:
        """Copy the hybrid for a network as it is now, each part built anew; this one stays as it is."""
        made = copy.copy(self)
        made.allocation, made.ranking = (
            criterion_from_importance(part).build(state) for part in (self.allocation, self.ranking)
        )
        return made

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Rank a group; [len(group[0].idxs)] float32 on the CPU, or None where either importance declines."""
        values: Tensor | None = self.allocation(group)
        ranking: Tensor | None = self.ranking(group)
        if values is None or ranking is None:
            return None
        for role, what, scores in (("allocation", self.allocation, values), ("ranking", self.ranking, ranking)):
            if scores.shape != (root_size(group),) or not bool(torch.isfinite(scores).all()):
                shape = list(scores.shape)
                got = f"shape {shape}" if shape != [root_size(group)] else "values that are not finite"
                raise TwoAxisError(
                    f"{role} {_name(what)}: expected {root_size(group)} finite scores for the group of "
                    f"{root_name(group)}, got {got}"
                )
        assigned = assign_by_rank(values.detach().double().cpu(), ranking.detach().double().cpu())
        constant = self.constant_channels(group)
        return (rank_first(assigned, constant) if bool(constant.any()) else assigned).float()

    def constant_channels(self, group: Any) -> Tensor:
        """Find the root channels that either part knows to be constant, [len(group[0].idxs)] bool."""
        constant = torch.zeros(root_size(group), dtype=torch.bool)
        for part in (self.allocation, self.ranking):
            if hasattr(part, "constant_channels"):
                constant |= part.constant_channels(group)
        return constant


def _name(importance: Importance) -> str:
    if isinstance(importance, (TwoAxisImportance, HybridImportance)):
        return repr(importance)
    return str(getattr(importance, "__name__", type(importance).__name__))
