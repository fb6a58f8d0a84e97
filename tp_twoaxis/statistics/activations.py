"""What consumers of channels read: one forward pass, one accumulator a layer, no labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.fingerprints import ModelFingerprints
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.layers import channel_layers, in_channels_of, out_channels_of
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.statistics.layer_statistics import CONSTANT
from tp_twoaxis.statistics.layouts import BatchLayout, find_layouts
from tp_twoaxis.statistics.moments import CoMoments

# batches are converted to float64 in parts of about this many numbers
BLOCK_NUMBERS = 2**20
# of adjacent layers: positions are averaged to so many cells at most, and a layer's accumulators hold 1 GiB at most
CELLS = 16
MAX_NUMBERS = 2**27


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

    @property
    def varying(self) -> Tensor:
        """Which channels that the layer reads are not constant, [C_in] bool."""


M = TypeVar("M", bound=Measure)


class ActivationStatistics(Generic[M]):
    """One accumulator for every convolution and linear layer that ran, and the model state they hold for.

    Attributes:
        records: layer name -> accumulator.
        num_images: images seen.
        state: to :meth:`~tp_twoaxis.runtime.fingerprints.ModelFingerprints.verify` a model with.
    """

    def __init__(self, records: dict[str, M], num_images: int, state: ModelFingerprints) -> None:
        self.records = records
        self.num_images = num_images
        self.state = state

    def __repr__(self) -> str:
        return f"ActivationStatistics({len(self.records)} layers, {self.num_images} images)"


def gather_activations(
    model: nn.Module,
    loader: Iterable[Any],
    measure: Callable[[nn.Module], M],
    *,
    max_images: int | None = 5000,
    progress: bool = True,
) -> ActivationStatistics[M]:
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
        >>> statistics = gather_activations(net, images, InputMoments, progress=False)
        >>> statistics.num_images, statistics.records["2"].variance.shape
        (8, torch.Size([4]))
    """
    network = unwrap(model)
    layers = {n: m for n, m in channel_layers(network).items() if isinstance(m, (_ConvNd, nn.Linear))}
    if not layers:
        raise TwoAxisError(f"{type(network).__name__} has no convolution or linear layer that reads channels")
    records: dict[str, M] = {}
    layouts: dict[str, BatchLayout] = {}
    batch_size = 0

    def hook(name: str) -> Callable[..., None]:
        def record(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
                return
            with torch.autocast(inputs[0].device.type, enabled=False):
                layout = layouts.get(name) or BatchLayout()
                read, written = (layout.rows(value, layer, batch_size, name) for value in (inputs[0], output))
                records.setdefault(name, measure(layer)).update(read, written)

        return record

    with forward_pass(network, loader, what="activations", max_images=max_images, progress=progress) as run:
        first = next(run.batches)
        layouts.update(find_layouts(run, layers, first))
        for name, layer in layers.items():
            run.hook(layer, hook(name))
        for batch in chain([first], run.batches):
            batch_size = len(batch.inputs)
            run(batch)
    for name, record in records.items():
        if not record.finite:
            raise TwoAxisError(
                f"{name}: what the layer reads is not finite on finite images; check the model's weights"
            )
    ordered = {name: records[name] for name in layers if name in records}
    return ActivationStatistics(ordered, run.images, ModelFingerprints.of_model(network))


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
        self.mean = torch.zeros(in_channels_of(layer), dtype=torch.float64)
        self._squares = torch.zeros_like(self.mean)

    @property
    def variance(self) -> Tensor:
        """Population variance, [C_in] float64."""
        return self._squares / max(self.count, 1)

    @property
    def varying(self) -> Tensor:
        """Which channels are not constant up to rounding, [C_in] bool."""
        return self.variance > CONSTANT * self.mean.square()

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


class AdjacentMoments:
    """Variances of a layer's inputs, covariance of its outputs, and the covariance between the two.

    A row is one image and one of at most 16 cells: positions, in their order in memory, are cut into equally
    many cells on both sides and averaged, so that a stride or padding does not shift the two against
    each other by more than a cell. For maps the cells are bands of rows of the image.

    Args:
        layer: a convolution or linear layer.

    Attributes:
        too_wide: the accumulators would take more than 1 GiB; nothing is accumulated then.

    Example:
        >>> moments = AdjacentMoments(nn.Conv2d(3, 5, 3))
        >>> moments.update(torch.randn(4, 64, 3), torch.randn(4, 36, 5))
        >>> moments.rows, moments.input_variance.shape, moments.output_covariance.shape, moments.cross_covariance.shape
        (64, torch.Size([3]), torch.Size([5, 5]), torch.Size([3, 5]))
    """

    def __init__(self, layer: nn.Module) -> None:
        read, written = in_channels_of(layer), out_channels_of(layer)
        self.too_wide = (read + written) * written > MAX_NUMBERS
        self._inputs = InputMoments(layer)
        self._outputs = CoMoments(0 if self.too_wide else written)
        self._cross = CoMoments(*((0, 0) if self.too_wide else (read, written)))

    @property
    def rows(self) -> int:
        """Rows seen: images times cells."""
        return self._outputs.count

    @property
    def varying(self) -> Tensor:
        """Which channels that the layer reads are not constant up to rounding, [C_in] bool."""
        return self._inputs.varying

    @property
    def input_variance(self) -> Tensor:
        """[C_in] float64."""
        return self._inputs.variance

    @property
    def output_covariance(self) -> Tensor:
        """[C_out, C_out] float64."""
        return self._outputs.covariance

    @property
    def cross_covariance(self) -> Tensor:
        """[C_in, C_out] float64."""
        return self._cross.covariance

    @property
    def finite(self) -> bool:
        """Whether all numbers so far are finite."""
        return self._inputs.finite and self._outputs.finite

    def update(self, read: Tensor, written: Tensor) -> None:
        """Take in one call of the layer."""
        if self.too_wide:
            return
        cells = min(CELLS, read.shape[1], written.shape[1])
        size = max(1, BLOCK_NUMBERS // max(read[0].numel(), written[0].numel(), 1))
        x, y = (torch.cat([_cells(part, cells) for part in torch.split(side, size)]) for side in (read, written))
        self._inputs.update(x, y)
        self._outputs.update(y)
        self._cross.update(x, y)


def _cells(rows: Tensor, cells: int) -> Tensor:
    """Average [n, positions, C] to [n, cells, C] in float64, on the CPU."""
    if rows.device.type not in ("cpu", "cuda"):
        rows = rows.cpu()
    return F.adaptive_avg_pool1d(rows.mT.double(), cells).mT.cpu()
