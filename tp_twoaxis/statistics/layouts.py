"""Where the images of a batch are in what a layer writes, found out by running batches of two sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.batches import Batch
from tp_twoaxis.runtime.forward import ForwardPass
from tp_twoaxis.runtime.inputs import Inputs
from tp_twoaxis.statistics.sampling import image_keys

# an image's values may differ this much between batches, of their spread: kernels for other sizes add in another order
TOLERANCE = 0.05
# of their variance: what differs by no more in the mean square differs by float32's rounding alone
ROUNDING = 1e-10


@dataclass(frozen=True)
class BatchLayout:
    """One dimension of a layer's output holds the images, and maybe several rows of each.

    With channels last the dimension is ``[outer, images, inner]``, flattened: ``inner`` neighbouring rows belong to an
    image (its windows, or its tokens when they are flattened), and that repeats ``outer`` times (views stacked one
    behind the other; tokens, when a sequence-first map is flattened).

    Attributes:
        axis: the dimension; 1 in sequence-first models.
        outer: repetitions, or None for as many as there are.
        inner: neighbours, or None for as many as there are; never both None.

    Example:
        >>> windows, views = BatchLayout(0, 1, None), BatchLayout(0, None, 1)
        >>> y = torch.arange(6.0).view(6, 1)
        >>> [layout.rows(y, nn.Linear(1, 1), 2, "")[..., 0].tolist() for layout in (windows, views)]
        [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]]
    """

    axis: int = 0
    outer: int | None = 1
    inner: int | None = None

    def rows(self, values: Tensor, layer: nn.Module, images: int, name: str) -> Tensor:
        """View what a layer reads or writes as [images, positions, C], without a copy where strides allow.

        Args:
            values: with channels where the layer has them.
            layer: the layer.
            images: in the batch.
            name: the layer's, for the message.

        Raises:
            TwoAxisError: the batch is not there.
        """
        y = _channels_last(values, layer)
        outer, inner = self._runs(y, images, name)
        if outer == 1 and self.axis == 0:
            return y.reshape(images, -1, y.shape[-1])
        y = _unflatten(y, self.axis, outer, images, inner).movedim(self.axis + 1, 0)
        return y.reshape(images, -1, y.shape[-1])

    def per_image(self, values: Tensor, output: Tensor, layer: nn.Module, name: str) -> Tensor:
        """View one number an image and channel, [images, C], so that it broadcasts against a layer's output."""
        y = _channels_last(output, layer)
        outer, inner = self._runs(y, len(values), name)
        shape = [1] * (y.ndim - 1) + [values.shape[1]]
        shape[self.axis] = y.shape[self.axis]
        spread = values[None, :, None].expand(outer, -1, inner, -1).reshape(shape)
        return _channels_back(spread, output, layer)

    def _runs(self, y: Tensor, images: int, name: str) -> tuple[int, int]:
        size = y.shape[self.axis] if self.axis < y.ndim - 1 else 0
        rows = size // images
        outer = rows // (self.inner or 1) if self.outer is None else self.outer
        inner = rows // (outer or 1) if self.inner is None else self.inner
        if size == 0 or outer * images * inner != size:
            raise TwoAxisError(
                f"{name}: expected an output whose {'leading' if self.axis == 0 else 'second'} dimension is the batch "
                f"({images} images), got {list(y.shape)} with channels last; leave the layer out with layers=[...]"
            )
        return outer, inner


def usual_layout(layer: nn.Module) -> BatchLayout:
    """Layout of a layer by itself: the batch comes first, in sequence-first attention second."""
    return BatchLayout(1 if isinstance(layer, nn.MultiheadAttention) and not layer.batch_first else 0)


def find_layouts(run: ForwardPass, layers: Mapping[str, nn.Module], batch: Batch) -> dict[str, BatchLayout]:
    """Find where each layer has its images, from one run on three images and one on the last two of them.

    What grows with the batch holds it; a length that is a multiple of the batch by chance does not grow. Where it holds
    several rows an image, the two images' rows of both runs must be equal in the order that is found.

    Args:
        run: a pass over images.
        layers: name -> layer.
        batch: with real images, of which the first ones are run.

    Returns:
        Name -> layout, of the layers that ran.

    Raises:
        TwoAxisError: a layer has its images in no such way; or what running the model raises.
    """
    three = _three_images(batch.inputs)
    with torch.no_grad():
        try:
            first, second = (_outputs(run, layers, Batch(batch.number, part, None)) for part in (three, three[1:]))
        except TwoAxisError as error:
            run(batch)  # which says so if the batch itself does not fit
            raise TwoAxisError(
                f"{type(run.network).__name__}: expected a model that runs on batches of any size, it runs on "
                f"{len(batch.inputs)} images but not on 3 and 2 ({error})"
            ) from error
    found = {}
    for name, calls in first.items():
        others = second.get(name, [])
        layouts = {_layout(*pair) for pair in zip(calls, others, strict=False)}
        if len(calls) != len(others) or len(layouts) != 1 or None in layouts:
            shapes = " and ".join(str([list(y.shape) for y in ys])[1:-1] for ys in (calls, others))
            raise TwoAxisError(
                f"{name}: expected outputs of which one dimension grows with the batch, in the same way in every call, "
                f"got {shapes} (channels last) of 3 and 2 images; leave the layer out with layers=[...]"
            )
        found[name] = next(layout for layout in layouts if layout is not None)
    return found


def _three_images(inputs: Inputs) -> Inputs:
    """The first images, made different where they are not, or not as many."""
    three = inputs[torch.arange(3) % len(inputs)]
    if len(set(image_keys(*three.tensors).tolist())) == 3:
        return three
    generator = torch.Generator().manual_seed(0)

    def noisy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        spread = tensor.std(correction=0)
        return tensor + noise * torch.where(spread > 0, spread, torch.ones_like(spread))

    return three.replaced(noisy(tensor) for tensor in three.tensors)


def _outputs(run: ForwardPass, layers: Mapping[str, nn.Module], batch: Batch) -> dict[str, list[Tensor]]:
    """Outputs of every call of every layer, channels last."""
    outputs: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(layer: nn.Module, _: Any, output: Any) -> None:
            y = _channels_last((output[0] if isinstance(output, tuple) else output).detach(), layer)
            # of an output with one row an image only the shape is looked at; others could be changed in place behind it
            outputs.setdefault(name, []).append(y if len(y) == len(batch.inputs) else y.clone())

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _layout(three: Tensor, two: Tensor) -> BatchLayout | None:
    if three.ndim != two.ndim:
        return None
    grown = [axis for axis in range(three.ndim - 1) if three.shape[axis] != two.shape[axis]]
    if len(grown) != 1:
        return None
    axis = grown[0]
    rows = three.shape[axis] // 3
    if three.shape[axis] != 3 * rows or two.shape[axis] != 2 * rows:
        return None
    if rows == 1:
        return BatchLayout(axis)
    three, two = (y.cpu().double() for y in (three, two))  # not every accelerator has float64
    best, least, variance = None, float("inf"), float(two.var(correction=0))
    for outer in (n for n in range(1, rows + 1) if rows % n == 0):
        of_three, of_two = (_unflatten(y, axis, outer, images, rows // outer) for y, images in ((three, 3), (two, 2)))
        error = float((of_three.narrow(axis + 1, 1, 2) - of_two).square().mean())
        if error < least:
            best, least = outer, error
        if least <= ROUNDING * variance:  # maps have many divisors, and the first one is nearly always it
            break
    if best is None or least > TOLERANCE**2 * variance:
        return None
    if best == 1:
        return BatchLayout(axis)
    return BatchLayout(axis, None, 1) if best == rows else BatchLayout(axis, best, None)


def _unflatten(y: Tensor, axis: int, *sizes: int) -> Tensor:
    return y.reshape(*y.shape[:axis], *sizes, *y.shape[axis + 1 :])


def _channels_last(values: Tensor, layer: nn.Module) -> Tensor:
    if not isinstance(layer, _ConvNd):
        return values
    if values.ndim == len(layer.kernel_size) + 1:  # one unbatched image
        values = values[None]
    return values.movedim(1, -1)


def _channels_back(values: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
    if not isinstance(layer, _ConvNd):
        return values
    values = values.movedim(-1, 1)
    return values[0] if output.ndim == len(layer.kernel_size) + 1 else values
