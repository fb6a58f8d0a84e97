"""A loader's batches, taken apart and checked, for everything that reads images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from tp_twoaxis.errors import TwoAxisError, listing


class Batch(NamedTuple):
    """Its number, images [n, ...], class indices [n] or None."""

    number: int
    images: Tensor
    labels: Tensor | None


@contextmanager
def image_batches(
    loader: Iterable[Any], *, max_images: int | None, labels: bool, description: str, progress: bool
) -> Iterator[Iterator[Batch]]:
    """Read a loader under a progress bar, at most ``max_images`` images in all.

    Args:
        loader: see :func:`split_batch` for what it may yield.
        max_images: cut the batch in which this many are reached, and stop; None reads to the end.
        labels: whether labels are wanted; otherwise they may be of any kind and come out as None.
        description: of the progress bar.
        progress: show it, on stderr.

    Yields:
        An iterator of :class:`Batch`; images are finite floats, no batch is empty.

    Raises:
        TwoAxisError: while iterating: the loader raised, or a batch is not what it should be.

    Example:
        >>> loader = [torch.zeros(3, 1), torch.zeros(3, 1)]
        >>> with image_batches(loader, max_images=4, labels=False, description="", progress=False) as batches:
        ...     [len(batch.images) for batch in batches]
        [3, 1]
    """

    def batches(bar: Any) -> Iterator[Batch]:
        left = max_images
        iterator, index = None, 0
        while left is None or left > 0:
            try:
                iterator = iter(loader) if iterator is None else iterator
                batch = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                raise TwoAxisError(
                    f"loader: batch {index} raised {type(error).__name__}: {error}; the model is as it was"
                ) from error
            images, classes = split_batch(batch, index, labels=labels)
            if left is not None:
                surplus = len(images) - left
                if surplus > 0:
                    images = images[:left]
                    if classes is not None and classes.ndim:
                        classes = classes[: len(classes) - surplus]  # as many fewer: a wrong length stays wrong
                left -= len(images)
            if len(images):
                check_images(images, index)
                yield Batch(index, images, classes)
                bar.update(len(images))
            index += 1

    total = expected_images(loader, None, max_images, ranks=False)
    with tqdm(total=total, desc=description, unit="image", disable=not progress, leave=False) as bar:
        yield batches(bar)


def split_shards(batches: Iterator[Batch], shards: int, seed: int = 0) -> Iterator[tuple[int, Batch]]:
    """Split images into disjoint shards, and gather each shard's into batches of the usual size.

    Of every ``shards`` images in a row each shard gets one, at random: shards differ by one image at most, and neither
    an order by class nor a period of the loader ends up in them. Which shard an image goes to does not depend on how
    the loader cuts its batches.

    Args:
        batches: of :func:`image_batches`.
        shards: how many; with 1 the batches pass as they are.
        seed: of the split.

    Yields:
        The shard, and its next batch: about as many images as the loader's first batch has, fewer at the end.

    Raises:
        TwoAxisError: while iterating: a batch has not one label for each image, or only some batches have labels.

    Example:
        >>> batch = Batch(0, torch.zeros(4, 1), torch.arange(4))
        >>> [(shard, len(own.images)) for shard, own in split_shards(iter([batch]), 2)]
        [(0, 2), (1, 2)]
    """
    if shards == 1:
        yield from ((0, batch) for batch in batches)
        return
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    pending: list[list[Batch]] = [[] for _ in range(shards)]
    labelled, size = None, 0
    for number, images, labels in batches:
        size = size or len(images)
        labelled = labels is not None if labelled is None else labelled
        if labelled != (labels is not None):
            raise TwoAxisError(mixed_labels(number, labels))
        if labels is not None and labels.shape[:1] != (len(images),):
            raise TwoAxisError(
                f"batch {number}: expected a label for each of {len(images)} images, got labels {list(labels.shape)}"
            )
        while len(order) < len(images):
            order = torch.cat([order, torch.randperm(shards, generator=generator)])
        assigned, order = order[: len(images)], order[len(images) :]
        for shard, parts in enumerate(pending):
            own = (assigned == shard).nonzero().ravel()
            if parts and parts[0].images.shape[1:] != images.shape[1:]:
                yield shard, _joined(parts)
                parts.clear()
            if len(own):
                rows = own.to(images.device)
                parts.append(Batch(number, images[rows], None if labels is None else labels[own.to(labels.device)]))
            if sum(len(part.images) for part in parts) >= size:
                yield shard, _joined(parts)
                parts.clear()
    yield from ((shard, _joined(parts)) for shard, parts in enumerate(pending) if parts)


def _joined(parts: list[Batch]) -> Batch:
    labels = [part.labels for part in parts if part.labels is not None]
    return Batch(parts[-1].number, torch.cat([part.images for part in parts]), torch.cat(labels) if labels else None)


def mixed_labels(number: int, labels: Tensor | None) -> str:
    """Message for a loader that gives labels with some batches only.

    Example:
        >>> mixed_labels(3, None)
        'loader: batch 3 comes without labels, earlier ones did not agree; yield labels always or never'
    """
    return (
        f"loader: batch {number} comes {'with' if labels is not None else 'without'} labels, "
        "earlier ones did not agree; yield labels always or never"
    )


def split_batch(batch: Any, index: int = 0, *, labels: bool = True) -> tuple[Tensor, Tensor | None]:
    """Take a loader's batch apart.

    Args:
        batch: ``(images, labels)``, ``images`` or a mapping with ``pixel_values`` (or ``image``, ``images``)
            and ``labels`` (or ``label``).
        index: the batch's number, for the message.
        labels: whether labels are wanted; otherwise they may be of any kind and come out as None.

    Returns:
        Images and labels, the latter None when the batch has none.

    Raises:
        TwoAxisError: it is none of these.

    Example:
        >>> images, labels = split_batch([torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])])
        >>> images.shape[0], labels.tolist()
        (2, [0, 1])
    """
    images, classes = batch, None
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in ("pixel_values", "images", "image") if key in batch), None)
        classes = next((batch[key] for key in ("labels", "label") if key in batch), None)
    elif isinstance(batch, (tuple, list)) and batch:
        images, classes = batch[0], batch[1] if len(batch) > 1 else None
    if not labels:
        classes = None
    if not isinstance(images, Tensor) or images.ndim == 0 or not (classes is None or isinstance(classes, Tensor)):
        if isinstance(batch, Mapping):
            got = f"a mapping with {listing(f'{key}: {type(value).__name__}' for key, value in batch.items())}"
        elif images is batch:
            got = type(batch).__name__
        else:
            got = f"({type(images).__name__}, {type(classes).__name__})"
        raise TwoAxisError(
            f"loader: expected tensors (images, labels), images, or a dict with pixel_values and labels in batch "
            f"{index}, got {got}; wrap the loader in a generator that yields them"
        )
    return images, classes


def check_images(images: Tensor, index: int = 0) -> None:
    """Refuse images that no model was trained on: integers, NaN, infinities.

    Raises:
        TwoAxisError: naming the batch.

    Example:
        >>> check_images(torch.zeros(1, 3, 8, 8))
    """
    if not images.is_floating_point():
        raise TwoAxisError(
            f"loader: expected float images normalised as in training, got {images.dtype} in batch {index}; "
            "convert with images.float() / 255 and normalise"
        )
    if not bool(torch.isfinite(images).all()):
        raise TwoAxisError(f"loader: batch {index} holds NaN or infinite pixels; remove or repair those images")


def expected_images(
    loader: Iterable[Any], batch_size: int | None, max_images: int | None, *, ranks: bool = True
) -> int | None:
    """Count the images to come, over all ranks, or None when the loader does not say.

    Args:
        loader: with a ``sampler`` that has a length, like a DataLoader's, or with a length itself.
        batch_size: of the first batch, to count by when there is no sampler.
        max_images: upper bound a rank.
        ranks: multiply by the number of ranks.

    Example:
        >>> expected_images([torch.zeros(8, 1)] * 3, 8, 20)
        20
    """
    count: int | None = None
    try:
        sampler = getattr(loader, "sampler", None)
        if sampler is not None:
            count = len(sampler)
        elif batch_size is not None:
            count = len(loader) * batch_size  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        count = None
    if count is not None and max_images is not None:
        count = min(count, max_images)
    if count is not None and ranks and dist.is_available() and dist.is_initialized():
        count *= dist.get_world_size()
    return count
