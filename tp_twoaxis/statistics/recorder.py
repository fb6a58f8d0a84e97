"""Forward hooks that turn what layers write into moments, and leave no trace."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.layers import in_channels_of, out_channels_of
from tp_twoaxis.statistics.layouts import BatchLayout, usual_layout
from tp_twoaxis.statistics.memory import LayerSize
from tp_twoaxis.statistics.moments import CoMoments, float64_device
from tp_twoaxis.statistics.pooling import PooledOutputs, Pooling, runs_in_some, writes_tokens
from tp_twoaxis.statistics.row_queue import RowQueue, SideStream
from tp_twoaxis.statistics.sampling import image_keys, sampled_positions, select_rows

Positions = Literal["auto", "all"] | int

# rows a layer needs over the whole set: this many a channel, and never fewer than the last number. With them sampling
# moves ranks by capture and hull less than drawing other images does (benchmarks/sampled_positions.py). In layers of
# MobileNetV1 with 768 channels, 8 rows a channel rank by capture, overlap and hull as all positions do, to 0.987 and
# more. What a layer reads is regressed on too, for which there are more
ROWS_PER_CHANNEL = 8
INPUT_ROWS_PER_CHANNEL = 32
MINIMUM_ROWS = 2**14
# of many images each gives at least so many: fewer would save nothing beside the forward pass
FEWEST_POSITIONS = 8
# pooled rows are few and wide: they wait until this many make one matrix product worth its overhead
PENDING_IMAGES = 512
# the moments of an input as wide as this take 512 MiB; a flattened map of VGG-16 (25,088 numbers) would take 4.7 GiB
WIDEST_INPUT = 2**13


class LayerRecord:
    """What one layer has shown so far.

    Attributes:
        rows: moments of (image, position) rows, C wide; of the sampled positions only.
        pooled: moments of the outputs averaged over all positions, one row an image.
        cross: moments of pooled outputs with the task variables, or None without them.
        inputs: moments of the rows that the layer reads, C_in wide, or None when they are not recorded.
        dtype: of what the layer writes.
        pooling: how outputs are pooled.
        product: of the products that rows are multiplied in; what is read is multiplied in float64, as layers are
            reconstructed from it.
    """

    def __init__(
        self, width: int, device: torch.device, dtype: torch.dtype = torch.float32, pooling: Pooling = "mean"
    ) -> None:
        self.dtype = dtype
        self.pooling = pooling
        self.product = torch.float64 if dtype == torch.float64 else torch.float32
        self.rows = CoMoments(width, device=device, product=self.product)
        self.pooled = CoMoments(width, device=device, product=self.product)
        self.cross: CoMoments | None = None
        self.inputs: CoMoments | None = None

    def to(self, device: torch.device | str) -> LayerRecord:
        """Move all moments; returns self."""
        for moments in (self.rows, self.pooled, self.cross, self.inputs):
            if moments is not None:
                moments.to(device)
        return self

    def add_cross(self, columns: int) -> CoMoments:
        """Moments of pooled outputs with this many task variables; the same ones every time."""
        if self.cross is None:
            device, width = self.pooled.mean.device, len(self.pooled.mean)
            self.cross = CoMoments(width, columns, device=device, product=self.product)
        return self.cross

    def add_inputs(self, width: int) -> CoMoments:
        """Moments of what the layer reads, so wide; the same ones every time."""
        if self.inputs is None:
            self.inputs = CoMoments(width, device=self.rows.mean.device)
        return self.inputs


class Recorder:
    """Record layers' outputs while the model runs inside the ``with`` block.

    Hooks see what a layer returns before anything else touches it: post-convolution, pre-BatchNorm,
    pre-activation, pre-addition (paper, section 2.1). Each batch is announced with :meth:`begin` and closed
    with :meth:`finish`, which pairs the pooled outputs with the batch's task variables; what runs outside of the
    two is not seen, so that several recorders can take turns. A layer called several times a batch contributes
    rows from each call and one pooled average over all of them.

    Args:
        layers: name -> layer, from :func:`~tp_twoaxis.runtime.layers.channel_layers`.
        positions: ``"all"``; a number of positions an image; or ``"auto"``: as many as give
            ``max(8 C, 16384)`` rows over the whole set, a power of two and at least 8. Of each of equally long
            stretches of an image one position is drawn by a hash of the image
            (:mod:`~tp_twoaxis.statistics.sampling`): over images every position is seen, and the rows do not depend on
            batch size, order or rank. A row stands for as many as its image has positions for each that is sampled.
            Pooled values always use every position.
        expected_images: images in the whole set, over all ranks; ``"auto"`` without it means ``"all"``.
        consumers: also record what the layers read. Rows are positions of the input as the layer is given it,
            without the zeros that its padding adds, sampled by the same rule as outputs with ``32 C_in`` in the place
            of ``8 C``. Left out are ``nn.MultiheadAttention``, whose projections run as functions so that the value
            channels cannot be seen, and inputs of more than 8,192 numbers.
        layouts: name -> where the layer has its images, of every layer that runs
            (:func:`~tp_twoaxis.statistics.layouts.find_layouts`); default where layers of its kind usually have them.
        pooling: of the pooled outputs; see :class:`~tp_twoaxis.statistics.pooling.PooledOutputs`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3))
        >>> images = torch.randn(2, 3, 8, 8)
        >>> with torch.no_grad(), Recorder({"0": net[0]}, positions="all") as recorder:
        ...     recorder.begin(images)
        ...     _ = net(images)
        ...     recorder.finish()
        >>> recorder.records["0"].rows.count
        72
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        *,
        positions: Positions = "auto",
        expected_images: int | None = None,
        consumers: bool = False,
        layouts: Mapping[str, BatchLayout] | None = None,
        pooling: Pooling = "mean",
    ) -> None:
        if positions not in ("auto", "all") and not (isinstance(positions, int) and positions > 0):
            raise TwoAxisError(f"positions: expected 'auto', 'all' or a positive number, got {positions!r}")
        self.layers = layers
        self.positions = positions
        self.expected_images = expected_images
        self.consumers = consumers
        self.layouts = layouts
        self.pooling = pooling
        self.records: dict[str, LayerRecord] = {}
        self._handles: list[RemovableHandle] = []
        self._batch_size = 0
        self._pooled = PooledOutputs(layers, pooling)
        self._queues: dict[int, RowQueue] = {}
        self._sides: dict[torch.device, SideStream] = {}
        self._pending: dict[str, list[Tensor]] = {}
        self._pending_task: list[Tensor] = []
        self._pending_images = 0
        self._images: tuple[Tensor, ...] = ()
        self._keys: Tensor | None = None
        self._sampled: dict[tuple[int, int], Tensor] = {}

    def __enter__(self) -> Recorder:
        self._handles = [
            layer.register_forward_hook(self._hook(name), always_call=False) for name, layer in self.layers.items()
        ]
        if self.consumers:
            # behind the others, so that each layer has its record; by keyword too, as some models pass their input
            self._handles += [
                layer.register_forward_hook(self._input_hook(name), with_kwargs=True)
                for name, layer in self.layers.items()
                if not isinstance(layer, nn.MultiheadAttention)
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if kind is None:
            self._flush()
            for queue in self._queues.values():
                queue.flush()
        for side in self._sides.values():
            side.join()

    def sizes(self) -> dict[str, LayerSize]:
        """What decides the memory of each layer's statistics."""
        sizes = {}
        for name, layer in self.layers.items():
            width, read = out_channels_of(layer), in_channels_of(layer)
            if not self.consumers or isinstance(layer, nn.MultiheadAttention) or read > WIDEST_INPUT:
                read = 0
            sizes[name] = LayerSize(width, read, self._wanted(width) or 0, self._wanted_inputs(read) or 0)
        return sizes

    def begin(self, *images: Tensor) -> None:
        """Announce a batch.

        Args:
            images: [n, ...], n at least 1: what the model is about to be given, all tensors of it.
        """
        self._images, self._batch_size = images, len(images[0])
        self._keys, self._sampled = None, {}
        self._pooled.begin()

    def finish(self, task: Tensor | None = None) -> None:
        """Close the batch.

        Args:
            task: [batch, T] task variables, or None.

        Raises:
            TwoAxisError: a layer ran in this batch and not in the first one, or the other way round.
        """
        for name, pooled in self._pooled.finish().items():
            self._pending.setdefault(name, []).append(pooled)
        if task is not None:
            self._pending_task.append(task)
        self._pending_images += self._batch_size
        self._images, self._batch_size = (), 0
        if self._pending_images >= PENDING_IMAGES:
            self._flush()

    def _flush(self) -> None:
        task = torch.cat(self._pending_task) if self._pending_task else None
        for name, parts in self._pending.items():
            record = self.records[name]
            with self._side(record.pooled).after(*parts, *self._pending_task):
                pooled = torch.cat(parts)
                record.pooled.update(pooled)
                if task is not None:
                    record.add_cross(task.shape[1]).update(pooled, task)
        self._pending, self._pending_task, self._pending_images = {}, [], 0

    def _record(self, name: str, values: Tensor) -> LayerRecord:
        if name not in self.records:
            # float64 lives on CPU and CUDA; other accelerators hand their rows over
            device = float64_device(values.device)
            self.records[name] = LayerRecord(values.shape[-1], device, values.dtype, self.pooling)
        return self.records[name]

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not self._batch_size:
                return
            y = output[0] if isinstance(output, tuple) else output
            with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
                self._take(name, layer, y.detach())

        return hook

    def _input_hook(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if not self._batch_size:
                return
            x = (inputs or tuple(named.values()))[0]
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                self._take_input(name, layer, x.detach())

        return hook

    def _take_input(self, name: str, layer: nn.Module, x: Tensor) -> None:
        view = self._layout(name, layer).rows(x, layer, self._batch_size, name)
        width = view.shape[-1]
        if width > WIDEST_INPUT:
            return
        self._update(self.records[name].add_inputs(width), view, self._wanted_inputs(width))

    def _take(self, name: str, layer: nn.Module, y: Tensor) -> None:
        view = self._layout(name, layer).rows(y, layer, self._batch_size, name)
        self._pooled.add(name, view, tokens=writes_tokens(layer, y))
        self._update(self._record(name, view).rows, view, self._wanted(view.shape[2]))

    def _layout(self, name: str, layer: nn.Module) -> BatchLayout:
        if self.layouts is None:
            return usual_layout(layer)
        if name not in self.layouts:
            raise TwoAxisError(runs_in_some([name]))
        return self.layouts[name]

    def _update(self, moments: CoMoments, view: Tensor, wanted: int | None) -> None:
        """Take in the rows [n, P, C], or those at so many positions that stand for them."""
        available = view.shape[1]
        if id(moments) not in self._queues:
            self._queues[id(moments)] = RowQueue(moments, self._side(moments))
        queue = self._queues[id(moments)]
        if wanted is None or wanted >= available:
            queue.add(view, owned=False)
            return
        if self._keys is None:
            self._keys = image_keys(*self._images)
        if (available, wanted) not in self._sampled:
            positions = sampled_positions(self._keys, available, wanted)
            self._sampled[available, wanted] = positions.to(view.device, non_blocking=True)
        queue.add(select_rows(view, self._sampled[available, wanted]), available / wanted, owned=True)

    def _side(self, moments: CoMoments) -> SideStream:
        device = moments.mean.device
        if device not in self._sides:
            self._sides[device] = SideStream(device)
        return self._sides[device]

    def _wanted_inputs(self, channels: int) -> int | None:
        return self._wanted(channels, INPUT_ROWS_PER_CHANNEL)

    def _wanted(self, channels: int, per_channel: int | None = None) -> int | None:
        if isinstance(self.positions, int):
            return self.positions
        if self.positions == "all" or self.expected_images is None:
            return None
        rows = max((per_channel or ROWS_PER_CHANNEL) * channels, MINIMUM_ROWS)
        # a power of two: shards of slightly unequal length still agree on the number
        exponent = round(math.log2(rows / max(self.expected_images, 1)))
        return max(1 << max(exponent, 0), FEWEST_POSITIONS)
