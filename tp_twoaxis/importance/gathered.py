"""Importances over statistics that were gathered from one state of one model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.importance.groups import members, merge_repeats, model_of, reduce_members, root_size
from tp_twoaxis.importance.normalize import Normalizer, normalize
from tp_twoaxis.importance.renewal import Interim

Gathered = TypeVar("Gathered", bound="GatheredImportance")


class GatheredImportance(tp.importance.Importance):  # type: ignore[misc]
    """Base of criteria that look at a model while it runs.

    Every call checks that the model is still the one, in the state, that the statistics hold for: the group's own
    modules by a hash of their tensors, all others by shape and, when a tensor's version moved, by hash.

    Args:
        statistics: what :meth:`gather` returns; :meth:`calibrate` does both.
        group_reduction: over the layers that give a score: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: the host's names; see :func:`~tp_twoaxis.importance.normalize.normalize`.
        loader: gather anew from it when the statistics are stale, instead of raising.
    """

    repeats: ClassVar[str] = "mean"
    """How the scores of several features of one layer that stand for one root channel combine."""

    def __init__(
        self,
        statistics: Any,
        *,
        group_reduction: str = "mean",
        normalizer: Normalizer = "mean",
        loader: Iterable[Any] | None = None,
    ) -> None:
        self.statistics = statistics
        self.group_reduction = group_reduction
        self.normalizer = normalizer
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

    def renewed(self: Gathered, interim: Interim) -> Gathered:
        """Copy the importance for the next step of pruning, with new statistics; this one stays as it is.

        Args:
            interim: the network; its loader counts where this importance has none of its own.
        """
        made = copy.copy(self)
        images = interim.images() if self.loader is None else self.loader
        made.statistics = self.gather(interim.model, images, max_images=interim.max_images, progress=interim.progress)
        return made

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Rank a group's root channels; [len(group[0].idxs)] float32 on the CPU, or None to leave it whole."""
        model = model_of(group)
        self._check(model, [member.module for member in members(group)])
        parts = self._parts(group, {module: name for name, module in model.named_modules()})
        if not parts:
            return None
        merged = [merge_repeats(scores, roots, self.repeats) for scores, roots in parts]
        return normalize(reduce_members(merged, root_size(group), self.group_reduction), self.normalizer).float()

    def _parts(self, group: Any, names: dict[nn.Module, str]) -> list[tuple[Tensor, Tensor]]:
        raise NotImplementedError

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
