"""What the layers that read channels are given: one forward pass, one accumulator a layer, no labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.batches import image_batches
from tp_twoaxis.borrow import eager, evaluating, preserved_rng, unwrap
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.freshness import ModelState
from tp_twoaxis.statistics.layers import channel_layers, channels_last_view

# batches are converted to float64 in parts of about this many numbers
BLOCK_NUMBERS = 2**20


class Measure(Protocol):
    """An accumulator of one layer."""

    def update(self, read: Tensor, written: Tensor) -> None:
        """Take in one call of the layer.

        Args:
            read: [images, positions, C_in], the layer's input.
            written: [images, positions, C_out], its output; the positions may be others.
        """

    @property
    def finite(self) -> bool:
        """Whether all numbers so far are finite."""


M = TypeVar("M", bound=Measure)


class ReaderStatistics(Generic[M]):
    """One accumulator for every convolution and linear layer that ran, and the model state they hold for.

    Attributes:
        records: layer name -> accumulator.
        num_images: images seen.
        state: to :meth:`~tp_twoaxis.statistics.freshness.ModelState.verify` a model with.
    """

    def __init__(self, records: dict[str, M], num_images: int, state: ModelState) -> None:
        self.records = records
        self.num_images = num_images
        self.state = state

    def __repr__(self) -> str:
        return f"ReaderStatistics({len(self.records)} layers, {self.num_images} images)"


def gather_reader_inputs(
    model: nn.Module,
    loader: Iterable[Any],
    measure: Callable[[nn.Module], M],
    *,
    max_images: int | None = 5000,
    progress: bool = True,
) -> ReaderStatistics[M]:
    """Run a model over images and let an accumulator see what each convolution and linear layer reads.

    The input of a layer is the value after normalisation, activation, addition and pooling: what is lost when
    a channel of it is removed. The model runs in eval mode without gradients and comes back as it was, and so
    does torch's random state.

    Args:
        model: any network that takes an image batch; wrappers are looked through.
        loader: yields ``images`` or ``(images, labels)``; labels are not used.
        measure: layer -> its accumulator.
        max_images: stop after this many; None reads the loader to its end.
        progress: show a progress bar on stderr.

    Raises:
        TwoAxisError: no images came, the model or the loader raised, or values are not finite.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> images = [torch.randn(8, 3, 8, 8)]
        >>> statistics = gather_reader_inputs(net, images, InputMoments, progress=False)
        >>> statistics.num_images, statistics.records["2"].variance.shape
        (8, torch.Size([4]))
    """
    network = unwrap(model)
    layers = {n: m for n, m in channel_layers(network).items() if isinstance(m, (_ConvNd, nn.Linear))}
    parameter = next(network.parameters(), None)
    if not layers or parameter is None:
        raise TwoAxisError(f"{type(network).__name__} has no convolution or linear layer that reads channels")
    records: dict[str, M] = {}
    batch_size = used = 0

    def hook(name: str) -> Callable[..., None]:
        def record(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
                return
            with torch.autocast(inputs[0].device.type, enabled=False):
                read, written = (channels_last_view(value, layer, batch_size, name) for value in (inputs[0], output))
                records.setdefault(name, measure(layer)).update(read, written)

        return record

    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(evaluating(network))
        stack.enter_context(eager(network))
        batches = stack.enter_context(
            image_batches(loader, max_images=max_images, labels=False, description="activations", progress=progress)
        )
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook(name)).remove)
        for index, images, _ in batches:
            batch_size = len(images)
            try:
                network(images.to(parameter.device, parameter.dtype, non_blocking=True))
            except TwoAxisError:
                raise
            except Exception as error:
                raise TwoAxisError(
                    f"{type(network).__name__} raised {type(error).__name__} on batch {index} of shape "
                    f"{list(images.shape)}: {error}; the model is as it was"
                ) from error
            used += batch_size
    if used == 0:
        raise TwoAxisError("loader: expected at least one batch of images, got none; check the data path and split")
    for name, record in records.items():
        if not record.finite:
            raise TwoAxisError(
                f"{name}: what the layer reads is not finite on finite images; check the model's weights"
            )
    ordered = {name: records[name] for name in layers if name in records}
    return ReaderStatistics(ordered, used, ModelState(network))


class InputMoments:
    """Mean and variance of every channel that a layer reads, over images and positions, in float64.

    Args:
        layer: a convolution or linear layer.

    Attributes:
        count: values seen of each channel.
        mean: [C_in] float64.

    Example:
        >>> moments = InputMoments(nn.Linear(2, 1))
        >>> moments.update(torch.tensor([[[3.0, 1.0]], [[5.0, 1.0]]]), torch.zeros(2, 1, 1))
        >>> moments.mean.tolist(), moments.variance.tolist(), moments.root_mean_square.tolist()
        ([4.0, 1.0], [1.0, 0.0], [4.1231..., 1.0])
    """

    def __init__(self, layer: nn.Module) -> None:
        self.count = 0
        self.mean = torch.zeros(num_inputs(layer), dtype=torch.float64)
        self._squares = torch.zeros_like(self.mean)

    @property
    def variance(self) -> Tensor:
        """Population variance, [C_in] float64."""
        return self._squares / max(self.count, 1)

    @property
    def root_mean_square(self) -> Tensor:
        """Square root of the mean square, [C_in] float64."""
        return (self.mean.square() + self.variance).sqrt()

    @property
    def finite(self) -> bool:
        """Whether all numbers so far are finite."""
        return bool(torch.isfinite(self._squares).all())

    def update(self, read: Tensor, written: Tensor) -> None:
        """Take in one call of the layer; what it wrote is not looked at."""
        for part in torch.split(read, max(1, BLOCK_NUMBERS // max(read[0].numel(), 1))):
            # in the layout it has: channels of a map stay far apart in memory, and each is summed along it
            values = part.to(torch.float64)
            mean = values.mean((0, 1))
            squares = (values - mean).square_().sum((0, 1)).cpu()
            rows = part.shape[0] * part.shape[1]
            total = self.count + rows
            delta = mean.cpu() - self.mean
            self._squares += squares + delta.square() * (self.count * rows / total)
            self.mean += delta * (rows / total)
            self.count = total


def num_inputs(layer: nn.Module) -> int:
    """Channels that a convolution or linear layer reads.

    Example:
        >>> num_inputs(nn.Conv2d(6, 4, 1, groups=2))
        6
    """
    return int(layer.in_channels if isinstance(layer, _ConvNd) else layer.in_features)  # type: ignore[arg-type]
