"""The images that a repair reads, several times over, with a few held out to measure on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.runtime.batches import split_batch
from tp_twoaxis.runtime.forward import ForwardPass, forward_pass

# measured errors come from so many images of the first batch; no fit of ours uses that batch if there are others
HELD_OUT = 64


class _FitBatches:
    """All batches but the first; all of them when there is only one."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        first = next(batches, None)
        second = next(batches, None)
        if first is not None:
            yield first if second is None else second
        yield from batches

    def __len__(self) -> int:
        return max(len(self.loader) - 1, 1)  # type: ignore[arg-type]


@dataclass(frozen=True)
class RepairImages:
    """Images of a repair.

    Attributes:
        loader: re-iterable; yields ``(images, labels)`` or images.
        max_images: at most so many for each pass.
        progress: show progress bars.

    Example:
        >>> images = RepairImages([torch.zeros(4, 1), torch.ones(2, 1)], None, False)
        >>> images.held_out.tolist()[0], images.count
        ([0.0], 4)
    """

    loader: Iterable[Any]
    max_images: int | None
    progress: bool

    @property
    def fit_batches(self) -> Iterable[Any]:
        """What fits are made from: all but the held-out batch."""
        return _FitBatches(self.loader)

    @cached_property
    def held_out(self) -> Tensor:
        """The first images of the first batch."""
        return next((split_batch(batch, labels=False)[0][:HELD_OUT] for batch in self.loader), torch.zeros(0))

    @cached_property
    def count(self) -> int:
        """About how many images ``fit_batches`` has: batches as large as the first are counted, or all read."""
        first = next((len(split_batch(batch, labels=False)[0]) for batch in self.loader), 0)
        try:
            sampler = getattr(self.loader, "sampler", None)
            total = len(sampler) if sampler is not None else len(self.loader) * first  # type: ignore[arg-type]
            total = total - first if total > first else total
        except (TypeError, NotImplementedError):
            total = sum(len(split_batch(batch, labels=False)[0]) for batch in self.fit_batches)
        return total if self.max_images is None else min(total, self.max_images)

    def forward_pass(self, model: nn.Module, what: str) -> AbstractContextManager[ForwardPass]:
        """Run a model over ``fit_batches``; see :func:`~tp_twoaxis.runtime.forward.forward_pass`."""
        return forward_pass(model, self.fit_batches, what=what, max_images=self.max_images, progress=self.progress)
