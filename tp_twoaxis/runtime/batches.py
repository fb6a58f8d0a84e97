"""A loader's batches, taken apart and checked, for everything that reads images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from tp_twoaxis.errors import TwoAxisError, listing, reason
from tp_twoaxis.runtime.inputs import CallSignature, Inputs, usable
from tp_twoaxis.runtime.progress_bar import progress_bar

ONE_INPUT = CallSignature()
# keys of a mapping: what a model's only input may be called where the model calls it otherwise, and labels
IMAGE_KEYS = ("pixel_values", "images", "image")
LABEL_KEYS = ("labels", "label")


class Batch(NamedTuple):
    """Its number, what the model is called with for its n images, class indices [n] or None.

    Example:
        >>> batch = Batch(0, Inputs((torch.zeros(2, 3),)), None)
        >>> len(batch.inputs), batch.images.shape
        (2, torch.Size([2, 3]))
    """

    number: int
    inputs: Inputs
    labels: Tensor | None

    @property
    def images(self) -> Tensor:
        """The images [n, ...] of a model with one input; a TwoAxisError for models with several."""
        return self.inputs.images


@contextmanager
def image_batches(
    loader: Iterable[Any],
    *,
    max_images: int | None,
    labels: bool,
    description: str,
    progress: bool,
    call: CallSignature = ONE_INPUT,
) -> Iterator[Iterator[Batch]]:
    """Read a loader under a progress bar, at most ``max_images`` images in all.

    Args:
        loader: see :func:`read_batch` for what it may yield.
        max_images: cut the batch in which this many are reached, and stop; None reads to the end.
        labels: whether labels are wanted; otherwise they may be of any kind and come out as None.
        description: of the progress bar.
        progress: show it, on stderr.
        call: of the model that the batches are for.

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
    check_loader(loader)

    def batches(bar: Any) -> Iterator[Batch]:
        left = max_images
        iterator, index = None, 0
        while left is None or left > 0:
            try:
                iterator = iter(loader) if iterator is None else iterator
                batch = next(iterator)
            except StopIteration:
                return
            except TwoAxisError:
                raise
            except Exception as error:
                raise TwoAxisError(f"loader: batch {index} raised {reason(error)}; the model is as it was") from error
            inputs, classes = read_batch(batch, index, labels=labels, call=call)
            if left is not None:
                surplus = len(inputs) - left
                if surplus > 0:
                    inputs = inputs[:left]
                    if classes is not None and classes.ndim:
                        classes = classes[: len(classes) - surplus]  # as many fewer: a wrong length stays wrong
                left -= len(inputs)
            if len(inputs):
                check_inputs(inputs, index)
                yield Batch(index, inputs.usable(), classes if classes is None else usable(classes))
                bar.update(len(inputs))
            index += 1

    total = expected_images(loader, None, max_images, ranks=False)
    with progress_bar(total=total, desc=description, unit="image", show=progress) as bar:
        yield batches(bar)


def check_loader(loader: object) -> None:
    """Refuse what yields no batches: a path, a tensor, one batch, a data set of single images.

    Raises:
        TwoAxisError: saying what to wrap it in.

    Example:
        >>> check_loader([(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))])
        >>> check_loader(torch.zeros(4, 3, 8, 8).split(2))
    """
    way = ""
    if isinstance(loader, (str, os.PathLike)):
        way = f"open it: make_loader(open_dataset({str(loader)!r}), batch_size=64) of tp_twoaxis.data"
    elif isinstance(loader, Tensor):
        way = "put it into a list: [images]"
    elif _is_images_and_labels(loader):
        way = "it is one batch, put it into a list: [(images, labels)]"
    elif isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        way = "its items are single images: torch.utils.data.DataLoader(dataset, batch_size=64)"
    elif not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        way = "give a DataLoader or a list of (images, labels)"
    if way:
        raise TwoAxisError(f"loader: expected an iterable of batches, got {type(loader).__name__}; {way}")


def _is_images_and_labels(loader: object) -> bool:
    """Whether this is one batch; ``images.split(64)`` is a tuple too, of tensors with as many dimensions each."""
    if not (isinstance(loader, tuple) and len(loader) == 2 and all(isinstance(part, Tensor) for part in loader)):
        return False
    images, labels = loader
    return bool(labels.ndim < images.ndim)


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
        >>> batch = Batch(0, Inputs((torch.zeros(4, 1),)), torch.arange(4))
        >>> [(shard, len(own.inputs)) for shard, own in split_shards(iter([batch]), 2)]
        [(0, 2), (1, 2)]
    """
    if shards == 1:
        yield from ((0, batch) for batch in batches)
        return
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    pending: list[list[Batch]] = [[] for _ in range(shards)]
    labelled, size = None, 0
    for number, inputs, labels in batches:
        size = size or len(inputs)
        labelled = labels is not None if labelled is None else labelled
        if labelled != (labels is not None):
            raise TwoAxisError(mixed_labels(number, labels))
        if labels is not None and labels.shape[:1] != (len(inputs),):
            raise TwoAxisError(
                f"batch {number}: expected a label for each of {len(inputs)} images, got labels {list(labels.shape)}"
            )
        while len(order) < len(inputs):
            order = torch.cat([order, torch.randperm(shards, generator=generator)])
        assigned, order = order[: len(inputs)], order[len(inputs) :]
        for shard, parts in enumerate(pending):
            own = (assigned == shard).nonzero().ravel()
            if parts and parts[0].inputs[:0].shapes != inputs[:0].shapes:
                yield shard, _joined(parts)
                parts.clear()
            if len(own):
                parts.append(Batch(number, inputs[own], None if labels is None else labels[own.to(labels.device)]))
            if sum(len(part.inputs) for part in parts) >= size:
                yield shard, _joined(parts)
                parts.clear()
    yield from ((shard, _joined(parts)) for shard, parts in enumerate(pending) if parts)


def _joined(parts: list[Batch]) -> Batch:
    labels = [part.labels for part in parts if part.labels is not None]
    inputs = Inputs.concatenate([part.inputs for part in parts])
    return Batch(parts[-1].number, inputs, torch.cat(labels) if labels else None)


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
    """Take a loader's batch for a model with one input apart; see :func:`read_batch`.

    Returns:
        Images and labels, the latter None when the batch has none.

    Raises:
        TwoAxisError: it is none of what ``read_batch`` takes, or of several inputs.

    Example:
        >>> images, labels = split_batch([torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])])
        >>> images.shape[0], labels.tolist()
        (2, [0, 1])
    """
    inputs, classes = read_batch(batch, index, labels=labels)
    return inputs.images, classes


def read_batch(
    batch: Any, index: int = 0, *, labels: bool = True, call: CallSignature = ONE_INPUT
) -> tuple[Inputs, Tensor | None]:
    """Take a loader's batch apart.

    Args:
        batch: one of

            - ``images``, or ``(images, labels)``; what follows them may be anything but a tensor;
            - for a model whose ``forward`` needs k inputs, the k tensors, ``(left, right)``, and labels behind them;
            - ``(inputs, labels)`` or ``(inputs,)`` with a tuple of positional inputs, a mapping of named ones, or an
              :class:`~tp_twoaxis.runtime.inputs.Inputs`;
            - a mapping with the inputs as ``forward`` names them, or with ``pixel_values`` (``image``, ``images``) for
              its first one; labels are ``labels`` (``label``). Other tensors in it are an error, for they may be meant
              as inputs; other things are passed over.
        index: the batch's number, for the message.
        labels: whether labels are wanted; otherwise they may be of any kind and come out as None.
        call: of the model that the batch is for.

    Returns:
        What the model is to be called with, and labels, None when the batch has none.

    Raises:
        TwoAxisError: it is none of these, or could be more than one of them.

    Example:
        >>> inputs, labels = read_batch(((torch.zeros(2, 3), torch.ones(2, 1)), torch.tensor([0, 1])))
        >>> len(inputs.args), labels.tolist()
        (2, [0, 1])
    """
    try:
        inputs, classes, others = _parts(batch, call)
    except (TwoAxisError, TypeError) as error:
        raise _unreadable(batch, index, f": {error}" if isinstance(error, TwoAxisError) else "") from error
    if not labels:
        classes = None
    if not (classes is None or isinstance(classes, Tensor)):
        raise _unreadable(batch, index)
    if others:
        raise _unreadable(batch, index, f"; {others}")
    return inputs, classes


def _parts(batch: Any, call: CallSignature) -> tuple[Inputs, Any, str]:
    """Inputs, labels, and what is wrong with the rest."""
    if isinstance(batch, Inputs):
        return batch, None, ""
    if isinstance(batch, Mapping):
        return _named_parts(batch, call)
    if isinstance(batch, Tensor):
        return Inputs((batch,)), None, ""
    if not isinstance(batch, (tuple, list)) or not batch:
        raise TypeError
    first, rest = batch[0], batch[1:]
    if isinstance(first, Inputs):
        inputs = first
    elif isinstance(first, Mapping):
        inputs, labels, others = _named_parts(first, call)
        if labels is not None and rest:
            others = "labels come twice"
        return inputs, rest[0] if rest else labels, others or _surplus(rest)
    elif isinstance(first, (tuple, list)):
        inputs = Inputs(tuple(first))
    else:
        inputs, rest = Inputs(tuple(batch[: call.required])), batch[call.required :]
        if len(inputs.args) < call.required:
            return inputs, None, f"the model needs {call.required} inputs ({', '.join(call.names[: call.required])})"
        if rest and len(call.names) > call.required and isinstance(rest[0], Tensor) and rest[0].is_floating_point():
            name = call.names[call.required]
            return inputs, None, f"the last may be labels or the input {name!r}: yield (inputs, labels) or (inputs,)"
    return inputs, rest[0] if rest else None, _surplus(rest)


def _surplus(rest: Sequence[Any]) -> str:
    more = any(isinstance(value, Tensor) for value in rest[1:])
    return "more tensors than inputs and labels: yield ((first, second, ...), labels)" if more else ""


def _named_parts(batch: Mapping[str, Any], call: CallSignature) -> tuple[Inputs, Any, str]:
    labels = [key for key in LABEL_KEYS if key in batch]
    named = {name: batch[name] for name in call.names if name in batch and name not in LABEL_KEYS}
    args: tuple[Any, ...] = ()
    used = {*labels, *named}
    lacking = [name for name in call.names[: call.required] if name not in named]
    if not named or lacking == list(call.names[:1]):
        images = [key for key in IMAGE_KEYS if key in batch and key not in named]
        if len(images) == 1:
            args, lacking = (batch[images[0]],), lacking[1:]
            used.add(images[0])
    if not args and not named:
        raise TypeError
    others = [key for key, value in batch.items() if isinstance(value, Tensor) and key not in used]
    wrong = ""
    if others:
        wrong = f"the model has no input {listing(others)}: leave it out"
    elif lacking and call.names:
        wrong = f"the model's input {listing(lacking)} is missing"
    elif len(labels) > 1:
        wrong = "labels come twice"
    return Inputs(args, named), batch[labels[0]] if labels else None, wrong


def _unreadable(batch: Any, index: int, why: str = "") -> TwoAxisError:
    if isinstance(batch, Mapping):
        got = f"a mapping with {listing(f'{key}: {type(value).__name__}' for key, value in batch.items())}"
    elif isinstance(batch, (tuple, list)) and batch:
        got = f"({', '.join(type(value).__name__ for value in (*batch, None)[: max(2, len(batch))])})"
    else:
        got = type(batch).__name__
    return TwoAxisError(
        f"loader: expected tensors (images, labels), images, or a dict with pixel_values and labels in batch "
        f"{index}, got {got}{why}; wrap the loader in a generator that yields them, several inputs as "
        "((first, second), labels) or by the names that the model's forward gives them"
    )


def check_inputs(inputs: Inputs, index: int = 0) -> None:
    """Refuse images that no model was trained on: integers alone, bytes, NaN, infinities.

    Raises:
        TwoAxisError: naming the batch.

    Example:
        >>> check_inputs(Inputs((torch.zeros(1, 3, 8, 8),)))
    """
    for tensor in inputs.tensors:
        whole = not tensor.is_floating_point()
        if (whole and len(inputs.tensors) == 1) or tensor.dtype == torch.uint8:
            raise TwoAxisError(
                f"loader: expected float images normalised as in training, got {tensor.dtype} in batch {index}; "
                "convert with images.float() / 255 and normalise"
            )
        if not whole and not bool(torch.isfinite(tensor).all()):
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
