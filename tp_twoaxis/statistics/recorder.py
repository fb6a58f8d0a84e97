"""Forward hooks that turn what layers write into moments, and leave no trace."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tp_twoaxis.errors import TwoAxisError, listing
from tp_twoaxis.runtime.layers import flatten_positions, out_channels_of
from tp_twoaxis.statistics.moments import CoMoments

Positions = Literal["auto", "all"] | int

# rows a layer needs over the whole set: this many a channel, and never fewer than the second number; with them
# sampling moves ranks by capture and hull less than drawing other images does (benchmarks/sampled_rows.py)
ROWS_PER_CHANNEL = 32
MINIMUM_ROWS = 2**14
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
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.rows = CoMoments(width, device=device)
        self.pooled = CoMoments(width, device=device)
        self.cross: CoMoments | None = None
        self.inputs: CoMoments | None = None


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
            ``max(32 C, 16384)`` rows over the whole set, a power of two. Sampled positions are the same for
            every image, one from each of equally long stretches, so the rows do not depend on batch size,
            order or rank. Pooled values always use every position.
        expected_images: images in the whole set, over all ranks; ``"auto"`` without it means ``"all"``.
        consumers: also record what the layers read. Rows are positions of the input as the layer is given it,
            without the zeros that its padding adds, sampled by the same rule as outputs with C_in in the place
            of C. Left out are ``nn.MultiheadAttention``, whose projections run as functions so that the value
            channels cannot be seen, and inputs of more than 8,192 numbers.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3))
        >>> with torch.no_grad(), Recorder({"0": net[0]}, positions="all") as recorder:
        ...     recorder.begin(2)
        ...     _ = net(torch.randn(2, 3, 8, 8))
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
    ) -> None:
        if positions not in ("auto", "all") and not (isinstance(positions, int) and positions > 0):
            raise TwoAxisError(f"positions: expected 'auto', 'all' or a positive number, got {positions!r}")
        self.layers = layers
        self.positions = positions
        self.expected_images = expected_images
        self.consumers = consumers
        self.records: dict[str, LayerRecord] = {}
        self._handles: list[RemovableHandle] = []
        self._batch_size = 0
        self._ran: set[str] | None = None
        self._pooled: dict[str, tuple[Tensor, int]] = {}
        self._pending: dict[str, list[Tensor]] = {}
        self._pending_task: list[Tensor] = []
        self._pending_images = 0
        self._samples: dict[tuple[int, int, torch.device], Tensor | None] = {}

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

    def begin(self, batch_size: int) -> None:
        """Announce a batch of ``batch_size`` images, at least one."""
        self._batch_size = batch_size
        self._pooled = {}

    def finish(self, task: Tensor | None = None) -> None:
        """Close the batch.

        Args:
            task: [batch, T] task variables, or None.

        Raises:
            TwoAxisError: a layer ran in this batch and not in the first one, or the other way round.
        """
        ran = set(self._pooled)
        if self._ran is None:
            self._ran = ran
        if changing := [name for name in self.layers if (name in ran) != (name in self._ran)]:
            raise TwoAxisError(
                f"{listing(changing)}: expected a layer to run in every batch or in none, got both, so its statistics "
                "would be of fewer images than the others'; leave it out with layers=[...]"
            )
        for name, (pooled, _) in self._pooled.items():
            self._pending.setdefault(name, []).append(pooled)
        self._pooled = {}
        if task is not None:
            self._pending_task.append(task)
        self._pending_images += self._batch_size
        self._batch_size = 0
        if self._pending_images >= PENDING_IMAGES:
            self._flush()

    def _flush(self) -> None:
        task = torch.cat(self._pending_task) if self._pending_task else None
        for name, parts in self._pending.items():
            pooled = torch.cat(parts)
            record = self.records[name]
            record.pooled.update(pooled)
            if task is not None:
                if record.cross is None:
                    record.cross = CoMoments(pooled.shape[1], task.shape[1], device=record.pooled.mean.device)
                record.cross.update(pooled, task)
        self._pending, self._pending_task, self._pending_images = {}, [], 0

    def _record(self, name: str, values: Tensor) -> LayerRecord:
        if name not in self.records:
            # float64 lives on CPU and CUDA; other accelerators hand their rows over
            device = values.device if values.device.type in ("cpu", "cuda") else torch.device("cpu")
            self.records[name] = LayerRecord(values.shape[-1], device)
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
        view = flatten_positions(x, layer, self._batch_size, name)
        width = view.shape[-1]
        if width > WIDEST_INPUT:
            return
        record = self.records[name]
        if record.inputs is None:
            record.inputs = CoMoments(width, device=record.rows.mean.device)
        sample = self._sample(view.shape[1], width, view.device)
        record.inputs.update(view if sample is None else _select(view, sample))

    def _take(self, name: str, layer: nn.Module, y: Tensor) -> None:
        view = flatten_positions(y, layer, self._batch_size, name)
        positions = count = view.shape[1]
        # a reduced-precision mean is accumulated, and kept, in float32
        pooled = view.mean(1, dtype=torch.float64 if view.dtype == torch.float64 else torch.float32)
        if name in self._pooled:  # called again in this batch: average over the positions of all calls
            before, seen = self._pooled[name]
            pooled = (before.double() * seen + pooled.double() * count) / (seen + count)
            count += seen
        self._pooled[name] = (pooled, count)
        sample = self._sample(positions, out_channels_of(layer), view.device)
        self._record(name, view).rows.update(view if sample is None else _select(view, sample))

    def _sample(self, available: int, channels: int, device: torch.device) -> Tensor | None:
        """Choose the positions to keep of ``available``, or None for all of them."""
        key = (available, channels, device)
        if key not in self._samples:
            wanted = self._wanted(channels)
            self._samples[key] = (
                None if wanted is None or wanted >= available else stratified(available, wanted).to(device)
            )
        return self._samples[key]

    def _wanted(self, channels: int) -> int | None:
        if isinstance(self.positions, int):
            return self.positions
        if self.positions == "all" or self.expected_images is None:
            return None
        rows = max(ROWS_PER_CHANNEL * channels, MINIMUM_ROWS)
        # a power of two: shards of slightly unequal length still agree on the number
        exponent = round(math.log2(rows / max(self.expected_images, 1)))
        return 1 << max(exponent, 0)


def stratified(available: int, wanted: int) -> Tensor:
    """Pick ``wanted`` of ``available`` positions, one at random from each of equally long stretches.

    Returns:
        [wanted] increasing indices; the same ones on every call.

    Example:
        >>> stratified(4, 4).tolist(), len(stratified(1024, 16).unique())
        ([0, 1, 2, 3], 16)
    """
    generator = torch.Generator().manual_seed(0)
    edges = torch.arange(wanted + 1) * available // wanted
    offsets = torch.rand(wanted, generator=generator, dtype=torch.float64) * (edges[1:] - edges[:-1])
    return edges[:-1] + offsets.long()


def _select(view: Tensor, sample: Tensor) -> Tensor:
    """Gather positions of [B, P, C]; along the dense dimension, which is P when channels come first."""
    if view.stride(1) == 1 and view.stride(2) != 1:
        return view.transpose(1, 2).index_select(2, sample).transpose(1, 2)
    return view.index_select(1, sample)
