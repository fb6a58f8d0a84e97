"""One pass over a calibration set: model and loader go in, mergeable statistics come out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.errors import TwoAxisError, check_count, check_name, is_number, listing, reason
from tp_twoaxis.runtime.batches import Batch, expected_images, mixed_labels, split_shards
from tp_twoaxis.runtime.distributed import world_size
from tp_twoaxis.runtime.forward import ForwardPass, NoImagesError, find_logits, forward_pass
from tp_twoaxis.runtime.image_rows import image_rows
from tp_twoaxis.runtime.inputs import Inputs
from tp_twoaxis.runtime.layers import channel_layers
from tp_twoaxis.runtime.model_state import refuse_quantised, unwrap
from tp_twoaxis.statistics.gradients import OutputSaliency
from tp_twoaxis.statistics.layouts import BatchLayout, find_layouts
from tp_twoaxis.statistics.memory import GIB, MemoryPlan
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.passes import Survey
from tp_twoaxis.statistics.pooling import POOLINGS, Pooling
from tp_twoaxis.statistics.recorder import PENDING_IMAGES, LayerRecord, Positions, Recorder
from tp_twoaxis.statistics.store import CalibrationStatistics
from tp_twoaxis.statistics.targets import TARGETS, batch_variables, class_logits, count_columns


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
    max_memory: float | None = None,
    pooling: Pooling = "mean",
    progress: bool = True,
) -> CalibrationStatistics:
    """Gather every statistic that the scores need, in one forward pass; without gradients by default.

    Before it the model runs on three and on two images, to find where layers have the images of a batch
    (:func:`~tp_twoaxis.statistics.layouts.find_layouts`).
    The model runs in eval mode and comes back exactly as it was: modes, hooks, gradients and device; so does
    torch's random state. Wrappers (DataParallel, DistributedDataParallel, ``torch.compile``) are looked
    through. Memory does not grow with the number of images: beside the model it is that of the statistics, ``[C, C]``
    twice a layer, and of one batch's rows; what does not fit is refused before the pass.

    Under ``torchrun`` give every rank its shard of the images, which may be none, and call
    ``statistics.all_reduce()`` afterwards. The result is that of one process on all images; with
    ``positions="auto"`` it is so up to the positions that are sampled, which depend on a shard's length where shards
    are very unequal.

    Args:
        model: a trained classifier; any float dtype. Its output is logits [n, K], a tuple that starts with
            them and has no other [n, L], or an object or dict with ``logits``; with ``target=None`` it may be anything.
        loader: yields ``(images, labels)``, ``images``, or dicts with ``pixel_values`` and ``labels``; images
            are float tensors [n, ...], normalised as in training, labels class indices [n]. For models with several
            inputs ``((left, right), labels)`` or dicts with the names that ``forward`` has; see
            :func:`~tp_twoaxis.runtime.batches.read_batch`.
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
        max_memory: GiB that statistics may take on the model's device while they are gathered; where all layers need
            more, they are gathered in several passes, for which the loader must give the same images in the same
            order every time. Layers that are done wait in the CPU's memory, and are not counted. Default: all in one.
        pooling: what correlates with the task: the ``"mean"`` over positions; or ``"cls"``, the first token of layers
            that write tokens, where a vision transformer's head reads that one alone.
        progress: show a progress bar on stderr.

    Returns:
        Statistics by layer name.

    Raises:
        TwoAxisError: memory does not suffice, or a loader gives other images in a second pass; no images came, and
            there is one process; images are not finite floats; labels are missing for a target or for gradients that
            need them, or out of range; a layer does not exist, gives non-finite values, or has the images of a batch
            in no dimension; the model or the loader raised.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> loader = [(torch.randn(16, 3, 8, 8), torch.randint(4, (16,))) for _ in range(3)]
        >>> stats = calibrate(net, loader, progress=False)
        >>> stats["0"].covariance.shape, stats.num_images, stats.target
        (torch.Size([8, 8]), 48, 'margin')
    """
    request = CalibrationRequest(
        target, layers, device, max_images, positions, gradients, consumers, progress, max_memory, pooling
    )
    try:
        return gather(model, loader, request)[0]
    except NoImagesError:
        if world_size() == 1:
            raise
        return CalibrationStatistics.empty()  # the images of an uneven split are on other ranks


@dataclass(frozen=True)
class CalibrationRequest:
    """The arguments of :func:`calibrate`; see there.

    Raises:
        TwoAxisError: here, an unknown target, or a number out of range.
    """

    target: str | None
    layers: Iterable[str] | None
    device: torch.device | str | None
    max_images: int | None
    positions: Positions
    gradients: bool
    consumers: bool
    progress: bool
    max_memory: float | None = None
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        if self.target is not None:
            check_name("target", self.target, TARGETS, more=" or None")
        check_name("pooling", self.pooling, POOLINGS)
        if self.max_images is not None:
            check_count("max_images", self.max_images, more=" or None")
        if self.max_memory is not None and not (is_number(self.max_memory) and self.max_memory > 0):
            raise TwoAxisError(f"max_memory: expected a positive number of GiB or None, got {self.max_memory!r}")


@torch.inference_mode(mode=False)  # the statistics can then be merged outside of the caller's inference mode too
@torch.no_grad()
def gather(
    model: nn.Module, loader: Iterable[Any], request: CalibrationRequest, *, shards: int = 1, seed: int = 0
) -> list[CalibrationStatistics]:
    """Run the pass behind :func:`calibrate` and :func:`~tp_twoaxis.statistics.resampling.calibrate_shards`.

    Args:
        model: see :func:`calibrate`.
        loader: its images.
        request: what to gather.
        shards: how many parts the images are split into; see :func:`~tp_twoaxis.runtime.batches.split_shards`.
        seed: of the split.

    Returns:
        The statistics of each shard.
    """
    network = unwrap(model)
    refuse_quantised(network)
    recorded = channel_layers(network, request.layers)
    if not recorded:
        raise TwoAxisError(f"{type(network).__name__} has no convolution, linear or attention layer to calibrate")
    parts: dict[int, _Part] = {}
    survey: Survey | None = None
    number = 0
    while survey is None or number < len(survey.passes):
        with forward_pass(
            network,
            loader,
            what="calibrate" if survey is None else f"calibrate, pass {number + 1} of {len(survey.passes)}",
            max_images=request.max_images,
            labels=request.target is not None or request.gradients,
            gradients=request.gradients,
            device=request.device,
            progress=request.progress,
        ) as run:
            first = next(run.batches)
            if survey is None:
                survey = _survey(run, recorded, first, loader, request, shards)
            survey.check_batch(first, number)
            _gather_pass(run, first, survey, survey.passes[number], parts, request, (shards, seed))
        survey.check_count(run.images, number)
        number += 1
    if len(parts) < shards:
        raise TwoAxisError(
            f"shards: expected at least one image for each of {shards} shards, got "
            f"{run.images} images; give more images or fewer shards"
        )
    if not parts[0].records:
        raise TwoAxisError(
            f"none of the layers {listing(recorded)} ran in the forward pass; "
            "the model calls their weights as functions, or runs code that was traced before: pass the eager model"
        )
    rows = image_rows(loader, run.images) if shards == 1 else None
    return [_statistics(part, recorded, request, rows) for _, part in sorted(parts.items())]


def _survey(
    run: ForwardPass,
    layers: dict[str, nn.Module],
    first: Batch,
    loader: Iterable[Any],
    request: CalibrationRequest,
    shards: int,
) -> Survey:
    """Find out where layers have their images, and how many passes there must be."""
    outputs: list[Any] = []
    handle = run.network.register_forward_hook(lambda network, inputs, output: outputs.append(output))
    try:
        layouts = find_layouts(run, layers, first)
    finally:
        handle.remove()
    columns = 0
    if request.target is not None:
        with contextlib.suppress(TwoAxisError):  # the pass itself says what is wrong with the logits of its batch
            columns = count_columns(find_logits(outputs[-1], run.network).shape[-1], first.labels is not None)
    # positions are chosen for the whole set, so that the parts merge into what one pass would give
    expected = expected_images(loader, len(first.inputs), request.max_images)
    running = {name: layer for name, layer in layers.items() if name in layouts}
    sizes = _recorder(running, layouts, expected, request).sizes()
    plan = MemoryPlan.of(sizes, batch=len(first.inputs), columns=columns, pooled_images=PENDING_IMAGES, shards=shards)
    if request.max_memory is None:
        plan.check_free(run.device)
        passes = [list(running)]
    else:
        passes = plan.passes(int(request.max_memory * GIB))
    if len(passes) > 1 and isinstance(loader, Iterator):
        raise TwoAxisError(
            f"max_memory: expected a loader that can be read {len(passes)} times, got a {type(loader).__name__}, which "
            f"is used up by the first; pass a DataLoader or a list, or max_memory={plan.total() / GIB + 1e-3:.3f}"
        )
    # one that did not run takes no memory, and is watched: if it runs later, the pass says so
    passes[0] += [name for name in layers if name not in running]
    return Survey(layouts, expected, [{name: layers[name] for name in names} for names in passes], first)


def _recorder(
    layers: dict[str, nn.Module], layouts: dict[str, BatchLayout], expected: int | None, request: CalibrationRequest
) -> Recorder:
    return Recorder(
        layers,
        positions=request.positions,
        expected_images=expected,
        consumers=request.consumers,
        layouts=layouts,
        pooling=request.pooling,
    )


def _gather_pass(
    run: ForwardPass,
    first: Batch,
    survey: Survey,
    layers: dict[str, nn.Module],
    parts: dict[int, _Part],
    request: CalibrationRequest,
    split: tuple[int, int],
) -> None:
    """Gather some layers' statistics from all images into the parts."""
    with ExitStack() as stack:
        begun: set[int] = set()
        for shard, batch in split_shards(chain([first], run.batches), *split):
            part = parts.setdefault(shard, _Part())
            if shard not in begun:
                begun.add(shard)
                part.start(_recorder(layers, survey.layouts, survey.expected, request), request.gradients, stack)
            part.begin(batch.inputs)
            output = run(batch)
            values = None
            if request.target is not None:
                logits = class_logits(output, run.network)
                variables = batch_variables(logits, batch, request.target)
                survey.columns = survey.columns or _columns(variables)
                if list(variables) != list(survey.columns):
                    raise TwoAxisError(mixed_labels(batch.number, batch.labels))
                values = torch.cat(list(variables.values()), dim=1)
            if part.saliency is not None:
                _backward(part.saliency, class_logits(output, run.network), batch.labels, batch.number)
            part.finish(values, len(batch.inputs))
    for shard in begun:
        parts[shard].keep(survey.columns)


@dataclass
class _Part:
    """What one shard has gathered."""

    recorder: Recorder = field(default_factory=lambda: Recorder({}))
    saliency: OutputSaliency | None = None
    task: CoMoments | None = None
    images: int = 0
    columns: dict[str, tuple[int, int]] = field(default_factory=dict)
    records: dict[str, LayerRecord] = field(default_factory=dict)
    saliencies: dict[str, CoMoments] = field(default_factory=dict)

    def start(self, recorder: Recorder, gradients: bool, stack: ExitStack) -> None:
        """Begin a pass."""
        self.recorder, self.task, self.images = stack.enter_context(recorder), None, 0
        # after the recorder, whose hooks then see the outputs first
        self.saliency = stack.enter_context(OutputSaliency(recorder.layers, recorder.layouts)) if gradients else None

    def begin(self, inputs: Inputs) -> None:
        self.recorder.begin(*inputs.tensors)
        if self.saliency is not None:
            self.saliency.begin(len(inputs))

    def finish(self, task: Tensor | None, images: int) -> None:
        if task is not None:
            if self.task is None:
                self.task = CoMoments(task.shape[1], device=task.device)
            self.task.update(task)
        self.recorder.finish(task)
        self.images += images

    def keep(self, columns: dict[str, tuple[int, int]]) -> None:
        """Close a pass; the memory of its statistics on the device is free again."""
        self.columns = columns
        self.records |= {name: record.to("cpu") for name, record in self.recorder.records.items()}
        if self.saliency is not None:
            self.saliencies |= self.saliency.records


def _statistics(
    part: _Part, layers: dict[str, nn.Module], request: CalibrationRequest, rows: Tensor | None
) -> CalibrationStatistics:
    target = request.target
    return CalibrationStatistics.from_records(
        layers,
        part.records,
        part.task,
        part.columns,
        part.saliencies if request.gradients else None,
        target=target if target in part.columns else ("predicted_margin" if target else None),
        num_images=part.images,
        explicit=request.layers is not None,
        image_rows=rows,
    )


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
            f"the backward pass of batch {index} raised {reason(error)}; the model is as it was"
        ) from error


def _columns(variables: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    columns, start = {}, 0
    for name, value in variables.items():
        columns[name] = (start, start + value.shape[1])
        start += value.shape[1]
    return columns
