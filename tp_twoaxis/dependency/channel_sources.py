"""Which channel of which layer is in each input channel: through norms, activations, pooling, sums, concatenations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.errors import TwoAxisError, reason
from tp_twoaxis.runtime.forward import inference_state
from tp_twoaxis.runtime.layers import (
    MIXING_NORMS,
    channel_axis,
    channel_layers,
    in_channels_of,
    out_channels_of,
)
from tp_twoaxis.runtime.model_state import ModelSnapshot, unwrap


@dataclass(frozen=True)
class ChannelSource:
    """A layer that writes what another one reads, with no layer between them.

    Attributes:
        layer: the producer's name.
        channels: [C_in] int64, for each input channel of the consumer the producer's channel that is in it, or -1 where
            none is (of a concatenation), or several are.
    """

    layer: str
    channels: Tensor


def channel_sources(model: nn.Module, example: Tensor) -> dict[str, list[ChannelSource]]:
    """Find the sources of every layer's input channels.

    Channels are followed as by :func:`~tp_twoaxis.dependency.channel_marks.follow_marks`: where a layer writes NaN,
    every operation passes it on, until the next layer. Which channel it is, a code tells: of each pair of images the
    first has marks in the channels with some bit of their number set, the second in the others. Layers themselves only
    write zeros of the shape that they wrote once, so that a pass costs next to nothing. What two layers write into a
    sum, or into a product such as that of a gate, are two sources of one channel.

    Args:
        model: any network; afterwards it is as before.
        example: [n, ...], of which the first image is run; its values do not matter.

    Returns:
        Layer -> its sources in the model's order; none of a layer that reads the network's input, does not run, or has
        its images in another dimension than the first.

    Raises:
        TwoAxisError: the model raised.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))
        >>> [(source.layer, source.channels.tolist()) for source in channel_sources(net, torch.zeros(1, 3, 8, 8))["4"]]
        [('0', [0, 1, 2, 3])]
    """
    network = unwrap(model)
    layers = channel_layers(network)
    bits = {name: max(1, (out_channels_of(layer) - 1).bit_length()) for name, layer in layers.items()}
    images = 2 * max(bits.values(), default=1)
    parameter = next(network.parameters(), example)
    batch = example[:1].to(parameter.device, parameter.dtype).expand(images, *example.shape[1:]).contiguous()
    sources: dict[str, list[ChannelSource]] = {name: [] for name in layers}
    probe = _Probe(network, layers, images)
    try:
        with inference_state(network):
            probe.learn_shapes(batch)
            with probe.replacing():
                for name, layer in layers.items():
                    marks = _code(out_channels_of(layer), bits[name], images).to(batch.device)
                    for consumer, seen in probe.run(batch, name, marks).items():
                        channels = _decode(seen.cpu(), bits[name])
                        if bool((channels >= 0).any()):
                            sources[consumer].append(ChannelSource(name, channels))
    except Exception as error:  # a model is anybody's code
        raise TwoAxisError(
            f"{type(network).__name__}: its channels could not be followed from layer to layer "
            f"({reason(error)}); it must run on batches of any size, and pass NaN on"
        ) from error
    return sources


def _code(channels: int, bits: int, images: int) -> Tensor:
    """[images, channels] bool: two images a bit, where it is set and where it is not; others have no marks."""
    digits = torch.arange(channels) >> torch.arange(bits)[:, None] & 1 == 1
    code = torch.zeros(images, channels, dtype=torch.bool)
    code[0 : 2 * bits : 2], code[1 : 2 * bits : 2] = digits, ~digits
    return code


def _decode(seen: Tensor, bits: int) -> Tensor:
    """[C] numbers of the channels whose marks [images, C] were seen; -1 for none or several."""
    digits, others = seen[0 : 2 * bits : 2], seen[1 : 2 * bits : 2]
    numbers = (digits.long() << torch.arange(bits)[:, None]).sum(0)
    return torch.where((digits ^ others).all(0), numbers, -1)


@dataclass
class _Probe:
    """Runs a network whose layers write zeros, and marks in one of them.

    Attributes:
        images: of its batches.
        shapes: what each call of each layer writes.
        marked: the layer with marks.
        marks: [images, C_out] bool, where.
        seen: layer -> [images, C_in] bool, in which channels it read marks.
        calls: of each layer in this pass.
    """

    network: nn.Module
    layers: dict[str, nn.Module]
    images: int
    shapes: dict[str, list[torch.Size]] = field(default_factory=dict)
    marked: str = ""
    marks: Tensor = field(default_factory=lambda: torch.zeros(0))
    seen: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def learn_shapes(self, batch: Tensor) -> None:
        """Run the network once as it is."""

        def keep(name: str) -> Any:
            def hook(layer: nn.Module, _: Any, output: Any) -> None:
                self.shapes.setdefault(name, []).append(_first(output).shape)

            return hook

        handles = [layer.register_forward_hook(keep(name)) for name, layer in self.layers.items()]
        try:
            self.network(batch)
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Let layers write zeros, and norms over channels leave marks with their channels, inside the block."""
        snapshot = ModelSnapshot(self.network)
        try:
            for name, layer in self.layers.items():
                layer.forward = self._replaced(name, layer)
            for module in self.network.modules():
                if isinstance(module, MIXING_NORMS):
                    module.forward = _past_norm(module.forward)
            yield
        finally:
            snapshot.restore()

    def run(self, batch: Tensor, marked: str, marks: Tensor) -> dict[str, Tensor]:
        """Run with marks [images, C_out] in a layer's output; returns those [images, C_in] that each layer reads."""
        self.marked, self.marks, self.seen = marked, marks, {}
        self.calls = dict.fromkeys(self.layers, 0)
        self.network(batch)
        return self.seen

    def _replaced(self, name: str, layer: nn.Module) -> Callable[..., Any]:
        axis = channel_axis(layer)

        def forward(*args: Any, **kwargs: Any) -> Any:
            read = next(iter((*args, *kwargs.values())))
            if len(read) == self.images and read.shape[axis] == in_channels_of(layer):
                seen = read.isnan().movedim(axis, 1).reshape(self.images, read.shape[axis], -1).any(2)
                self.seen[name] = self.seen.get(name, False) | seen
            shapes = self.shapes[name]
            output = read.new_zeros(shapes[self.calls[name] % len(shapes)])
            self.calls[name] += 1
            if name == self.marked and len(output) == self.images:
                places = self.marks.reshape(self.images, -1, *[1] * (output.ndim - 2)).movedim(1, axis)
                output = output.masked_fill(places, torch.nan)
            return (output, None) if isinstance(layer, nn.MultiheadAttention) else output

        return forward


def _past_norm(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A norm over channels gives each output a part of every input; a mark stays with its own channel."""

    def passed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return forward(x.nan_to_num(0.0), *args, **kwargs).masked_fill(x.isnan(), torch.nan)

    return passed


def _first(output: Any) -> Tensor:
    values: Tensor = output[0] if isinstance(output, tuple) else output
    return values
