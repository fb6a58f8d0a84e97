"""One pass over a calibration set: model and loader go in, mergeable statistics come out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from tp_twoaxis.borrow import evaluating, preserved_rng, unwrap
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.layers import channel_layers
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.recorder import Positions, Recorder
from tp_twoaxis.statistics.store import CalibrationStatistics
from tp_twoaxis.statistics.targets import LABEL_FREE, TARGETS, task_variables


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    target: str | None = "margin",
    layers: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    max_images: int | None = 5000,
    positions: Positions = "auto",
    progress: bool = True,
) -> CalibrationStatistics:
    """Gather every statistic that the scores need, in one forward pass without gradients.

    The model runs in eval mode and comes back exactly as it was: modes, hooks, gradients, device and the
    global random state. Wrappers (DataParallel, DistributedDataParallel, ``torch.compile``) are looked
    through. Memory does not grow with the number of images. Under ``torchrun`` give every rank its shard
    and call ``statistics.all_reduce()`` afterwards.

    Args:
        model: a trained classifier; any float dtype. Its output is logits [n, K], a tuple that starts with
            them, or an object or dict with ``logits``.
        loader: yields ``(images, labels)``, ``images``, or dicts with ``pixel_values`` and ``labels``; images
            are float tensors [n, ...], normalised as in training, labels class indices [n].
        target: default task variable of the target axis, one of ``margin`` (ground-truth margin),
            ``correct_logit``, ``negative_loss``, ``one_vs_rest``, ``predicted_margin``,
            ``predicted_logit``. All of them are recorded. Without labels ``margin`` becomes
            ``predicted_margin``. None records the local axis alone, for models that are no classifiers.
        layers: names of the layers to record; default all convolutions, linear and attention layers.
        device: where to run; default where the model is.
        max_images: stop after this many; None reads the loader to its end.
        positions: ``"auto"``, ``"all"`` or a number: positions of each image that enter the row
            covariance; see :class:`~tp_twoaxis.statistics.recorder.Recorder`. Means and pooled values use all.
        progress: show a progress bar on stderr.

    Returns:
        Statistics by layer name.

    Raises:
        TwoAxisError: no images came; images are not finite floats; labels are missing for a target that
            needs them, or out of range; a layer does not exist or gives non-finite values; the model or
            the loader raised.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> loader = [(torch.randn(16, 3, 8, 8), torch.randint(4, (16,))) for _ in range(3)]
        >>> stats = calibrate(net, loader, progress=False)
        >>> stats["0"].covariance.shape, stats.num_images, stats.target
        (torch.Size([8, 8]), 48, 'margin')
    """
    if target is not None and target not in TARGETS:
        raise TwoAxisError(f"target: expected one of {', '.join(TARGETS)} or None, got {target!r}")
    if max_images is not None and max_images < 1:
        raise TwoAxisError(f"max_images: expected a positive number or None, got {max_images}")
    network = unwrap(model)
    recorded = channel_layers(network, layers)
    if not recorded:
        raise TwoAxisError(f"{type(network).__name__} has no convolution, linear or attention layer to calibrate")
    parameter = next(network.parameters())
    task: CoMoments | None = None
    columns: dict[str, tuple[int, int]] = {}
    images_seen = 0
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(evaluating(network))
        run_device = stack.enter_context(_placed(network, parameter.device, device))
        batches = stack.enter_context(_announced(loader, max_images, progress))
        recorder: Recorder | None = None
        for index, (images, labels) in enumerate(batches):
            check_images(images, index)
            if recorder is None:
                expected = _expected_images(loader, len(images), max_images)
                recorder = Recorder(recorded, positions=positions, expected_images=expected)
                stack.enter_context(recorder)
            recorder.begin(len(images))
            logits = _forward(network, images.to(run_device, parameter.dtype, non_blocking=True), index)
            values = None
            if target is not None:
                variables = _variables(logits, labels, target, index)
                if not columns:
                    columns = _columns(variables)
                    width = max(stop for _, stop in columns.values())
                    task = CoMoments(width, device="cpu" if logits.device.type == "mps" else logits.device)
                if list(variables) != list(columns):
                    raise TwoAxisError(
                        f"loader: batch {index} comes {'with' if labels is not None else 'without'} labels, "
                        "earlier ones did not agree; yield labels always or never"
                    )
                values = torch.cat(list(variables.values()), dim=1)
                if task is not None:
                    task.update(values)
            recorder.finish(values)
            images_seen += len(images)
    if recorder is None:
        raise TwoAxisError("loader: expected at least one batch of images, got none; check the data path and split")
    resolved = target if target in columns else ("predicted_margin" if target else None)
    return CalibrationStatistics.from_records(
        recorded, recorder.records, task, columns, target=resolved, num_images=images_seen, explicit=layers is not None
    )


@contextmanager
def _placed(network: nn.Module, home: torch.device, device: torch.device | str | None) -> Iterator[torch.device]:
    """Run on another device for a while; parameters keep their identity."""
    if device is None or torch.device(device) == home:
        yield home
        return
    try:
        network.to(device)
        yield torch.device(device)
    finally:
        network.to(home)


@contextmanager
def _announced(
    loader: Iterable[Any], max_images: int | None, progress: bool
) -> Iterator[Iterator[tuple[Tensor, Tensor | None]]]:
    """Batches of at most ``max_images`` images in all, under a progress bar; loader errors say which batch."""

    def batches(bar: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
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
            images, labels = split_batch(batch, index)
            if left is not None:
                images, labels = images[:left], None if labels is None else labels[:left]
                left -= len(images)
            index += 1
            if len(images):
                yield images, labels
                bar.update(len(images))

    total = _expected_images(loader, None, max_images, ranks=False)
    with tqdm(total=total, desc="calibrate", unit="image", disable=not progress, leave=False) as bar:
        yield batches(bar)


def split_batch(batch: Any, index: int = 0) -> tuple[Tensor, Tensor | None]:
    """Take a loader's batch apart.

    Args:
        batch: ``(images, labels)``, ``images`` or a mapping with ``pixel_values`` (or ``image``, ``images``)
            and ``labels`` (or ``label``).
        index: the batch's number, for the message.

    Returns:
        Images and labels, the latter None when the batch has none.

    Raises:
        TwoAxisError: it is none of these.

    Example:
        >>> images, labels = split_batch([torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])])
        >>> images.shape[0], labels.tolist()
        (2, [0, 1])
    """
    images, labels = batch, None
    if isinstance(batch, dict):
        images = next((batch[key] for key in ("pixel_values", "images", "image") if key in batch), None)
        labels = next((batch[key] for key in ("labels", "label") if key in batch), None)
    elif isinstance(batch, (tuple, list)) and batch:
        images, labels = batch[0], batch[1] if len(batch) > 1 else None
    if not isinstance(images, Tensor) or not (labels is None or isinstance(labels, Tensor)):
        got = type(batch).__name__ if images is batch else f"{type(images).__name__}, {type(labels).__name__}"
        raise TwoAxisError(f"loader: expected tensors (images, labels) or images in batch {index}, got {got}")
    return images, labels


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


def _forward(network: nn.Module, images: Tensor, index: int) -> Tensor:
    try:
        output = network(images)
    except TwoAxisError:
        raise
    except Exception as error:
        raise TwoAxisError(
            f"{type(network).__name__} raised {type(error).__name__} on batch {index} of shape {list(images.shape)}: "
            f"{error}; the model is as it was"
        ) from error
    while not isinstance(output, Tensor):
        if isinstance(output, (tuple, list)) and output:
            output = output[0]
        elif isinstance(output, dict) and output:
            output = output.get("logits", next(iter(output.values())))
        elif hasattr(output, "logits"):
            output = output.logits
        else:
            raise TwoAxisError(f"expected logits from {type(network).__name__}, got {type(output).__name__}")
    return output


def _variables(logits: Tensor, labels: Tensor | None, target: str, index: int) -> dict[str, Tensor]:
    if labels is None and target not in (*LABEL_FREE, "margin"):
        raise TwoAxisError(
            f"target {target!r} needs labels and batch {index} has none; yield (images, labels) or choose one of "
            f"{', '.join(LABEL_FREE)}"
        )
    try:
        return task_variables(logits if logits.device.type != "mps" else logits.cpu(), labels)
    except TwoAxisError as error:
        raise TwoAxisError(f"batch {index}: {error}") from error


def _columns(variables: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    columns, start = {}, 0
    for name, value in variables.items():
        columns[name] = (start, start + value.shape[1])
        start += value.shape[1]
    return columns


def _expected_images(
    loader: Iterable[Any], batch_size: int | None, max_images: int | None, *, ranks: bool = True
) -> int | None:
    """Count the images to come, over all ranks, or None when the loader does not say."""
    count: int | None = None
    try:
        sampler = getattr(loader, "sampler", None)
        if sampler is not None:
            count = len(sampler)
        elif batch_size is not None:
            count = len(loader) * batch_size  # type: ignore[arg-type]
    except TypeError:
        count = None
    if count is not None and max_images is not None:
        count = min(count, max_images)
    if count is not None and ranks and dist.is_available() and dist.is_initialized():
        count *= dist.get_world_size()
    return count
