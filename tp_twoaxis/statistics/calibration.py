"""One pass over a calibration set: model and loader go in, mergeable statistics come out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.batches import expected_images, image_batches
from tp_twoaxis.borrow import eager, evaluating, preserved_rng, unwrap
from tp_twoaxis.errors import TwoAxisError, listing
from tp_twoaxis.statistics.gradients import OutputSaliency
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
    gradients: bool = False,
    consumers: bool = False,
    progress: bool = True,
) -> CalibrationStatistics:
    """Gather every statistic that the scores need, in one forward pass; without gradients unless asked for.

    The model runs in eval mode and comes back exactly as it was: modes, hooks, gradients and device; so does
    torch's random state. Wrappers (DataParallel, DistributedDataParallel, ``torch.compile``) are looked
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
        gradients: also run the backward pass of the cross-entropy, and keep each channel's first-order Taylor
            saliency (:class:`~tp_twoaxis.statistics.gradients.OutputSaliency`); needs labels. No parameter's
            ``grad`` is touched, and frozen parameters may stay frozen.
        consumers: also record mean and covariance of what each layer reads, for repair:
            ``LayerStatistics.input_mean`` and ``input_covariance``, of input positions without padding. They
            need one more product of rows a layer; ``nn.MultiheadAttention`` and inputs of more than 8,192 numbers
            are left out.
        progress: show a progress bar on stderr.

    Returns:
        Statistics by layer name.

    Raises:
        TwoAxisError: no images came; images are not finite floats; labels are missing for a target or for
            gradients that need them, or out of range; a layer does not exist or gives non-finite values; the model or
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
    if max_images is not None and not (isinstance(max_images, int) and max_images > 0):
        raise TwoAxisError(f"max_images: expected a positive whole number or None, got {max_images!r}")
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
        stack.enter_context(eager(network))
        saliency = OutputSaliency(recorded) if gradients else None
        run_device = stack.enter_context(_placed(network, parameter.device, device))
        batches = stack.enter_context(
            image_batches(
                loader,
                max_images=max_images,
                labels=target is not None or gradients,
                description="calibrate",
                progress=progress,
            )
        )
        recorder: Recorder | None = None
        for index, images, labels in batches:
            if recorder is None:
                expected = expected_images(loader, len(images), max_images)
                recorder = Recorder(recorded, positions=positions, expected_images=expected, consumers=consumers)
                stack.enter_context(recorder)
                if saliency is not None:  # after the recorder, whose hooks then see the outputs first
                    stack.enter_context(saliency)
                    stack.enter_context(torch.enable_grad())
            recorder.begin(len(images))
            if saliency is not None:
                saliency.begin(len(images))
            logits = forward_logits(network, images.to(run_device, parameter.dtype, non_blocking=True), index)
            values = None
            if target is not None:
                variables = _variables(logits, labels, target, index, len(images))
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
            if saliency is not None:
                _backward(saliency, logits, labels, index)
            recorder.finish(values)
            images_seen += len(images)
    if recorder is None:
        raise TwoAxisError("loader: expected at least one batch of images, got none; check the data path and split")
    if not recorder.records:
        raise TwoAxisError(
            f"none of the layers {listing(recorded)} ran in the forward pass; "
            "the model calls their weights as functions, or runs code that was traced before: pass the eager model"
        )
    resolved = target if target in columns else ("predicted_margin" if target else None)
    return CalibrationStatistics.from_records(
        recorded,
        recorder.records,
        task,
        columns,
        None if saliency is None else saliency.records,
        target=resolved,
        num_images=images_seen,
        explicit=layers is not None,
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


def forward_logits(network: nn.Module, images: Tensor, index: int) -> Tensor:
    """Run a network and find the logits in what it returns.

    Args:
        network: its output is logits, a tuple that starts with them, or an object or dict with ``logits``.
        images: one batch.
        index: the batch's number, for the message.

    Raises:
        TwoAxisError: the network raised, or its output holds no logits.

    Example:
        >>> forward_logits(nn.Linear(4, 2), torch.zeros(3, 4), 0).shape
        torch.Size([3, 2])
    """
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


def _variables(logits: Tensor, labels: Tensor | None, target: str, index: int, images: int) -> dict[str, Tensor]:
    if labels is None and target not in (*LABEL_FREE, "margin"):
        raise TwoAxisError(
            f"target {target!r} needs labels and batch {index} has none; yield (images, labels) or choose one of "
            f"{', '.join(LABEL_FREE)}"
        )
    if logits.ndim == 2 and len(logits) != images:
        raise TwoAxisError(
            f"expected logits [{images}, K] of the {images} images of batch {index}, got {list(logits.shape)}; "
            "pass target=None to calibrate the local axis alone"
        )
    try:
        return task_variables(logits if logits.device.type != "mps" else logits.cpu(), labels)
    except TwoAxisError as error:
        raise TwoAxisError(f"batch {index}: {error}") from error


def _backward(saliency: OutputSaliency, logits: Tensor, labels: Tensor | None, index: int) -> None:
    if labels is None:
        raise TwoAxisError(
            f"gradients=True needs labels and batch {index} has none; yield (images, labels), or leave gradients out"
        )
    try:
        saliency.finish(logits, labels)
    except TwoAxisError as error:
        raise TwoAxisError(f"batch {index}: {error}") from error
    except Exception as error:  # a model's own autograd function may raise anything
        raise TwoAxisError(
            f"the backward pass of batch {index} raised {type(error).__name__}: {error}; the model is as it was"
        ) from error


def _columns(variables: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    columns, start = {}, 0
    for name, value in variables.items():
        columns[name] = (start, start + value.shape[1])
        start += value.shape[1]
    return columns
