"""The images that a repair reads, several times over, with some held out that no fit sees."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.batches import ONE_INPUT, image_batches, read_batch
from tp_twoaxis.runtime.forward import ForwardPass, forward_pass
from tp_twoaxis.runtime.inputs import CallSignature, Inputs

# of every so many images the last is held out, up to so many
HELD_OUT_EVERY, MOST_HELD_OUT = 5, 128
# with fewer images held out nothing can be judged
FEWEST_HELD_OUT = 2
# so many of them run at a time
HELD_OUT_BATCH = 32


class ImageChunk(NamedTuple):
    """Images that run together, and whether they judge fits instead of being fitted."""

    inputs: Inputs
    held_out: bool


class _FitBatches:
    """The batches of a loader without the images that are held out, in whatever order they come."""

    def __init__(self, images: RepairImages) -> None:
        self._images = images

    def __iter__(self) -> Iterator[Inputs]:
        held_out = self._images.held_out_keys
        for number, batch in enumerate(self._images.loader):
            inputs, _ = read_batch(batch, number, labels=False, call=self._images.call)
            kept = torch.tensor([key not in held_out for key in _keys(inputs)]) if held_out else torch.ones(1) > 0
            if bool(kept.all()):
                yield inputs
            elif bool(kept.any()):
                yield inputs[kept.nonzero()[:, 0]]

    def __len__(self) -> int:
        return len(self._images.loader)  # type: ignore[arg-type]


@dataclass(frozen=True)
class RepairImages:
    """Images of a repair.

    Every fifth image is held out, at most 128. They are known by their pixels, so a loader may shuffle.

    Attributes:
        loader: re-iterable; yields ``(images, labels)`` or images.
        max_images: at most so many for each pass.
        progress: show progress bars.
        hold_out: whether to hold images out.
        call: of the model that runs on them.
        max_memory: GiB for the activations of those that wait for each other.

    Example:
        >>> images = RepairImages([torch.arange(16.0)[:, None]], None, False)
        >>> images.held_out.images.flatten().tolist(), images.count
        ([4.0, 9.0, 14.0], 13)
    """

    loader: Iterable[Any]
    max_images: int | None
    progress: bool
    hold_out: bool = True
    call: CallSignature = ONE_INPUT
    max_memory: float = 4.0

    @property
    def fit_batches(self) -> Iterable[Inputs]:
        """What fits are made from: all but the images held out."""
        return _FitBatches(self)

    @cached_property
    def held_out(self) -> Inputs | None:
        """Images that no fit sees; None unless ``hold_out``.

        Raises:
            TwoAxisError: there are too few images to hold some out.
        """
        if not self.hold_out:
            return None
        limit = HELD_OUT_EVERY * MOST_HELD_OUT
        limit = limit if self.max_images is None else min(limit, self.max_images)
        chosen: list[Inputs] = []
        seen = 0
        with image_batches(
            self.loader, max_images=limit, labels=False, description="hold out", progress=False, call=self.call
        ) as batches:
            for batch in batches:
                first = (HELD_OUT_EVERY - 1 - seen) % HELD_OUT_EVERY
                chosen.append(batch.inputs[first::HELD_OUT_EVERY])
                seen += len(batch.inputs)
        if sum(map(len, chosen)) < FEWEST_HELD_OUT:
            raise TwoAxisError(
                f"repair: expected at least {FEWEST_HELD_OUT * HELD_OUT_EVERY} images, so that some can be held out to "
                f"judge what is fitted to the others, got {seen}; give more, choose repair='bn', or switch the "
                "judgement off with guard=False"
            )
        return Inputs.concatenate([part for part in chosen if len(part)])

    @cached_property
    def held_out_batches(self) -> list[Inputs]:
        """The images held out, in batches."""
        return [] if self.held_out is None else self.held_out.split(HELD_OUT_BATCH)

    @cached_property
    def held_out_keys(self) -> frozenset[bytes]:
        """What images held out are known by."""
        return frozenset() if self.held_out is None else frozenset(_keys(self.held_out))

    @contextmanager
    def fitted(self) -> Iterator[Iterator[Inputs]]:
        """Read the images that are fitted, once, in the loader's batches."""
        with image_batches(
            self.fit_batches,
            max_images=self.most_fitted,
            labels=False,
            description="repair",
            progress=False,
            call=self.call,
        ) as batches:
            yield (batch.inputs for batch in batches)

    @contextmanager
    def chunks(self, size: int) -> Iterator[Iterator[ImageChunk]]:
        """Read the images in chunks: some to be fitted, and of those held out a quarter as many, in turn.

        Args:
            size: about how many are fitted in a chunk.

        Example:
            >>> images = RepairImages([torch.arange(16.0)[:, None]], None, False)
            >>> with images.chunks(8) as chunks:
            ...     [(len(inputs), held_out) for inputs, held_out in chunks]
            [(8, False), (2, True), (5, False), (1, True)]
        """
        judges = [] if self.held_out is None else self.held_out.split(-(-size // (HELD_OUT_EVERY - 1)))
        with self.fitted() as batches:
            fitted = _cut(batches, size)
            yield (
                ImageChunk(inputs, held_out)
                for pair in itertools.zip_longest(fitted, judges)
                for inputs, held_out in zip(pair, (False, True), strict=True)
                if inputs is not None
            )

    @property
    def most_fitted(self) -> int | None:
        """Limit of the images for each pass over :attr:`fit_batches`."""
        return None if self.max_images is None else max(self.max_images - self._judges, 1)

    @property
    def _judges(self) -> int:
        return 0 if self.held_out is None else len(self.held_out)

    @cached_property
    def count(self) -> int:
        """About how many images ``fit_batches`` has: batches as large as the first are counted, or all read."""
        sizes = (len(read_batch(batch, labels=False, call=self.call)[0]) for batch in self.loader)
        first = next(sizes, 0)
        try:
            sampler = getattr(self.loader, "sampler", None)
            total = len(sampler) if sampler is not None else len(self.loader) * first  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            total = first + sum(sizes)
        total = max(total - self._judges, 1)
        return total if self.most_fitted is None else min(total, self.most_fitted)

    def forward_pass(self, model: nn.Module, what: str) -> AbstractContextManager[ForwardPass]:
        """Run a model over ``fit_batches``; see :func:`~tp_twoaxis.runtime.forward.forward_pass`."""
        return forward_pass(model, self.fit_batches, what=what, max_images=self.most_fitted, progress=self.progress)


def _cut(batches: Iterable[Inputs], size: int) -> Iterator[Inputs]:
    """Join batches of equal shapes, and cut them into chunks of ``size`` images; the last ones may be smaller."""
    pending: list[Inputs] = []
    for batch in batches:
        if pending and pending[0][:0].shapes != batch[:0].shapes:
            yield Inputs.concatenate(pending)
            pending = []
        pending.append(batch)
        if sum(map(len, pending)) >= size:
            *whole, rest = Inputs.concatenate(pending).split(size)
            yield from whole if len(rest) < size else [*whole, rest]
            pending = [rest] if len(rest) < size else []
    if pending:
        yield Inputs.concatenate(pending)


def _keys(inputs: Inputs) -> Iterator[bytes]:
    """What each image is known by: its pixels, or those of all images that the model takes together."""
    tensors = [tensor.detach().cpu().contiguous().flatten(1) for tensor in inputs.tensors]
    for parts in zip(*tensors, strict=True):
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(part.view(torch.uint8).numpy().tobytes())
        yield digest.digest()
