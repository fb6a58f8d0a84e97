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
        raise TwoAxisError(f"loader: batch {index} holds NaN or infinite pixels; remove or mend those images")


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
