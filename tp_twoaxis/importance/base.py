"""What importances of groups share: scores of layers, reduced to root channels, made comparable between groups."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_twoaxis.dependency.groups import members, model_of, root_size
from tp_twoaxis.errors import StaleStatisticsError, TwoAxisError, check_name
from tp_twoaxis.importance.constant_channels import constant_roots, normalize_varying
from tp_twoaxis.importance.normalize import Normalizer, check_normalizer
from tp_twoaxis.importance.pruning_state import PruningState

REDUCTIONS = ("mean", "sum", "max", "first")
Part = tuple[Tensor, Tensor]
"""Scores [n] that a layer gives to channels of a group, and their root positions [n]."""
Gathered = TypeVar("Gathered", bound="GatheredImportance")


class GroupImportance(tp.importance.Importance):  # type: ignore[misc]
    """Base of our importances: parts of a group's layers -> one number a root channel -> normalised.

    Args:
        group_reduction: over the layers that give a score: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: Torch-Pruning's names; see :func:`~tp_twoaxis.importance.normalize.normalize`.

    Raises:
        TwoAxisError: here, an unknown reduction or normaliser.
    """

    repeats: ClassVar[str] = "mean"
    """How the scores of several features of one layer that stand for one root channel combine."""

    def __init__(self, *, group_reduction: str = "mean", normalizer: Normalizer = "mean") -> None:
        check_name("group_reduction", group_reduction, REDUCTIONS)
        check_normalizer(normalizer)
        self.group_reduction = group_reduction
        self.normalizer = normalizer

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Rank a group's root channels.

        Args:
            group: a ``torch_pruning`` group, full or partial.

        Returns:
            [len(group[0].idxs)] float32 on the CPU, finite; None to leave the group whole.
        """
        parts = self._parts(group)
        if not parts:
            return None
        merged = [merge_repeats(scores.cpu(), roots, self.repeats) for scores, roots in parts]
        reduced = reduce_members(merged, root_size(group), self.group_reduction)
        return normalize_varying(reduced, self.constant_channels(group), self.normalizer).float()

    def constant_channels(self, group: Any) -> Tensor:
        """Find the root channels that never vary, as far as the criterion's statistics tell.

        Args:
            group: a ``torch_pruning`` group, full or partial.

        Returns:
            [len(group[0].idxs)] bool; none of them for criteria that do not look at activations.
        """
        return constant_roots(self._varying(group), root_size(group))

    def _parts(self, group: Any) -> list[Part]:
        """Score the group's layers; an empty list declines the group."""
        raise NotImplementedError

    def _varying(self, group: Any) -> list[Part]:
        """Tell which channels of the group's layers vary, [n] bool; nothing of layers without statistics."""
        return []


class GatheredImportance(GroupImportance):
    """Base of criteria that look at a model while it runs, over statistics of one state of one model.

    Every call checks that the model is still the one, in the state, that the statistics hold for: the group's own
    modules by a hash of their tensors, all others by shape and, when a tensor's version moved, by hash.

    Args:
        statistics: what :meth:`gather` returns; :meth:`calibrate` does both.
        group_reduction: over the layers that give a score: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: Torch-Pruning's names; see :func:`~tp_twoaxis.importance.normalize.normalize`.
        loader: gather anew from it when the statistics are stale, instead of raising.
    """

    def __init__(
        self,
        statistics: Any,
        *,
        group_reduction: str = "mean",
        normalizer: Normalizer = "mean",
        loader: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(group_reduction=group_reduction, normalizer=normalizer)
        self.statistics = statistics
        self.loader = loader

    @classmethod
    def calibrate(
        cls: type[Gathered],
        model: nn.Module,
        loader: Iterable[Any],
        /,
        *,
        max_images: int | None = 5000,
        progress: bool = True,
        **options: Any,
    ) -> Gathered:
        """Gather the statistics and build the importance.

        Args:
            model: the model to prune, or a copy of it.
            loader: as :meth:`gather` needs it.
            max_images: use at most this many images; None reads the loader to its end.
            progress: show a progress bar on stderr.
            options: of the class; its ``loader=`` among them.
        """
        importance = cls(None, **options)
        importance.statistics = importance.gather(model, loader, max_images=max_images, progress=progress)
        return importance

    def gather(self, model: nn.Module, loader: Iterable[Any], *, max_images: int | None, progress: bool) -> Any:
        """Gather what the criterion needs from a model and a loader."""
        raise NotImplementedError

    def build(self: Gathered, state: PruningState) -> Gathered:
        """Copy the importance for a network as it is now, with new statistics; this one stays as it is.

        Args:
            state: the network; its loader counts where this importance has none of its own.
        """
        made = copy.copy(self)
        model, images = state.images(self.loader)
        made.statistics = self.gather(model, images, max_images=state.max_images, progress=state.progress)
        return made

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Rank a group's root channels; [len(group[0].idxs)] float32 on the CPU, or None to leave it whole."""
        self._check(model_of(group), [member.module for member in members(group)])
        return super().__call__(group)

    def _check(self, model: nn.Module, own: list[nn.Module]) -> None:
        try:
            self.statistics.state.verify(model, own)
        except StaleStatisticsError as error:
            if self.loader is None:
                raise StaleStatisticsError(
                    f"{error}, or build the importance with loader=... to do so between steps"
                ) from None
            with torch.enable_grad():
                self.statistics = self.gather(model, self.loader, max_images=self.statistics.num_images, progress=False)


def reduce_members(parts: list[tuple[Tensor, Tensor]], size: int, reduction: str) -> Tensor:
    """Reduce the scores of several layers to one number a root channel.

    Args:
        parts: for each layer its scores [n] and their root positions [n].
        size: root channels.
        reduction: ``mean``, ``sum`` or ``max`` over everything that a root channel stands for, or
            ``first``: the first layer alone, averaged where a root channel repeats in it.

    Returns:
        [size] float64.

    Raises:
        TwoAxisError: a root channel got no score, or the reduction is unknown.

    Example:
        >>> reduce_members([(torch.tensor([1.0, 2.0]), torch.tensor([0, 1])),
        ...                 (torch.tensor([3.0, 6.0]), torch.tensor([1, 0]))], 2, "mean").tolist()
        [3.5, 2.5]
    """
    check_name("group_reduction", reduction, REDUCTIONS)
    chosen = parts[:1] if reduction == "first" else parts
    values = torch.cat([scores.double() for scores, _ in chosen])
    roots = torch.cat([positions for _, positions in chosen])
    count = torch.zeros(size, dtype=torch.float64).index_add_(0, roots, torch.ones_like(values))
    if bool((count == 0).any()):
        missing = int((count == 0).sum())
        raise TwoAxisError(
            f"{missing} of {size} root channels of the group have no calibrated producer; calibrate with all layers"
        )
    if reduction == "max":
        return torch.full((size,), -torch.inf, dtype=torch.float64).scatter_reduce(0, roots, values, "amax")
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, roots, values)
    return total if reduction == "sum" else total / count


def merge_repeats(scores: Tensor, roots: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Merge the scores that one layer gives the same root channel, as behind a flattening layer or in fused qkv.

    Args:
        scores: [n].
        roots: [n] root positions, some perhaps repeated.
        reduction: ``mean``, ``sum`` or ``max``.

    Returns:
        Scores [m] float64 and their root positions [m], each once and ascending.

    Example:
        >>> merge_repeats(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 2, 0]), "mean")
        (tensor([5., 2.], dtype=torch.float64), tensor([0, 2]))
    """
    present, place = torch.unique(roots, return_inverse=True)
    return reduce_members([(scores, place)], len(present), reduction), present
