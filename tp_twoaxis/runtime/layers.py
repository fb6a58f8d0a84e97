"""What a layer is: which layers have channels, how wide each side is, where the channels lie, and the weights.

Widths, channel dimensions and weights in a common layout are derived here and nowhere else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tp_twoaxis.errors import TwoAxisError, listing

CHANNEL_LAYERS = (_ConvNd, nn.Linear, nn.MultiheadAttention)
# norms that mix channels: each output depends on all of the layer's inputs, though removal treats each channel alone
MIXING_NORMS = tuple(
    getattr(nn, name) for name in ("LayerNorm", "GroupNorm", "LocalResponseNorm", "RMSNorm") if hasattr(nn, name)
)


def channel_layers(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Find the layers that write channels: convolutions of every kind, linear layers, multi-head attention.

    Args:
        model: any network, not wrapped.
        names: restrict to these, named as in ``model.named_modules()``.

    Returns:
        Name -> layer in the model's order. The output projection inside ``nn.MultiheadAttention`` is not
        listed: it is run as a function, and the attention layer's own output is its output.

    Raises:
        TwoAxisError: a name does not exist or is of a layer without channels; no name or a bare string was given.

    Example:
        >>> list(channel_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))))
        ['0', '2']
    """
    found: dict[str, nn.Module] = {}
    inside_attention: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.update(id(child) for child in module.modules() if child is not module)
        if isinstance(module, CHANNEL_LAYERS) and id(module) not in inside_attention:
            found[name] = module
    if names is None:
        return found
    if isinstance(names, str):
        raise TwoAxisError(f"layers: expected a list of layer names, got the string {names!r}; pass [{names!r}]")
    wanted = list(names)
    if not wanted:
        raise TwoAxisError("layers: expected at least one layer name, got none; leave it out to record every layer")
    modules = dict(model.named_modules())
    for name in wanted:
        if not isinstance(name, str):
            raise TwoAxisError(
                f"layers: expected names of layers, got {type(name).__name__}; see model.named_modules()"
            )
        if name in found:
            continue
        if name in modules:
            raise TwoAxisError(
                f"layers: {name!r} is a {type(modules[name]).__name__}, which writes no channels of its own; "
                f"choose convolution, linear or attention layers, such as {listing(found, 3)}"
            )
        near = difflib.get_close_matches(name, found, n=3) or list(found)[:3]
        raise TwoAxisError(f"layers: the model has no layer {name!r}; near it: {listing(near)}")
    return {name: layer for name, layer in found.items() if name in set(wanted)}


def spread_over_depth(names: Sequence[str], count: int) -> list[str]:
    """Choose names at equal distances from the first to the last, both included.

    Args:
        names: of layers, in the model's order.
        count: how many, at least 1; all where there are no more.

    Example:
        >>> spread_over_depth(["a", "b", "c", "d", "e"], 3), spread_over_depth(["a", "b"], 6)
        (['a', 'c', 'e'], ['a', 'b'])
    """
    if count >= len(names):
        return list(names)
    last = len(names) - 1
    return [names[round(i * last / max(count - 1, 1))] for i in range(count)]


def out_channels_of(layer: nn.Module) -> int:
    """Channels that a layer writes.

    Example:
        >>> out_channels_of(nn.Linear(3, 7))
        7
    """
    return _width(layer, "out_channels", "out_features")


def in_channels_of(layer: nn.Module) -> int:
    """Channels that a layer reads.

    Example:
        >>> in_channels_of(nn.Conv2d(6, 4, 1, groups=2))
        6
    """
    return _width(layer, "in_channels", "in_features")


def _width(layer: nn.Module, of_convolution: str, of_linear: str) -> int:
    if isinstance(layer, nn.MultiheadAttention):
        return int(layer.embed_dim)
    width: int = getattr(layer, of_convolution if isinstance(layer, _ConvNd) else of_linear)
    return width


def channel_axis(layer: nn.Module) -> int:
    """Dimension of the channels in what a layer reads and writes, counted from the end: an unbatched image has it too.

    Example:
        >>> channel_axis(nn.Conv2d(3, 8, 3)), channel_axis(nn.Linear(3, 8))
        (-3, -1)
    """
    return -len(layer.kernel_size) - 1 if isinstance(layer, _ConvNd) else -1


def select_channels(tensor: Tensor, layer: nn.Module, kept: Tensor) -> Tensor:
    """Select channels of what a layer reads or writes.

    Args:
        tensor: its input or output.
        layer: the layer.
        kept: [C] bool.

    Example:
        >>> import torch
        >>> select_channels(torch.ones(2, 3, 5, 5), nn.Conv2d(3, 3, 1), torch.tensor([True, False, True])).shape
        torch.Size([2, 2, 5, 5])
    """
    return select_along(tensor, channel_axis(layer), kept)


def select_along(tensor: Tensor, axis: int, kept: Tensor) -> Tensor:
    """Select elements along a dimension.

    Args:
        tensor: [...].
        axis: of it.
        kept: [size of the dimension] bool.

    Example:
        >>> import torch
        >>> select_along(torch.arange(6).view(2, 3), -1, torch.tensor([True, False, True])).tolist()
        [[0, 2], [3, 5]]
    """
    if bool(kept.all()):
        return tensor
    index = kept.nonzero()[:, 0].to(tensor.device)
    if tensor.stride(axis) != 1:
        return tensor.index_select(axis, index)
    last = tensor.movedim(axis, -1)  # along the dense dimension this is 10 times faster on a CPU than index_select
    return last.gather(-1, index.expand(*last.shape[:-1], -1)).movedim(-1, axis)


def broadcast_channels(vector: Tensor, like: Tensor, layer: nn.Module) -> Tensor:
    """View [C] so that it multiplies a layer's inputs or outputs channel by channel, in their dtype.

    Example:
        >>> import torch
        >>> broadcast_channels(torch.ones(8), torch.zeros(2, 8, 5, 5), nn.Conv2d(3, 8, 3)).shape
        torch.Size([1, 8, 1, 1])
    """
    shape = [1] * like.ndim
    shape[channel_axis(layer)] = -1
    return vector.to(like).reshape(shape)


def blocks_of(layer: nn.Module) -> int:
    """Blocks of channels that do not mix: the groups of a convolution, 1 for other layers."""
    return layer.groups if isinstance(layer, _ConvNd) else 1


def weight_blocks(layer: nn.Module) -> Tensor:
    """View a layer's weight as [blocks, outputs, inputs, taps], each of one block; of attention the output projection.

    Example:
        >>> weight_blocks(nn.Conv2d(4, 6, 3, groups=2)).shape
        torch.Size([2, 3, 2, 9])
        >>> weight_blocks(nn.ConvTranspose2d(4, 6, 3, groups=2)).shape
        torch.Size([2, 3, 2, 9])
    """
    weight = (layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer).weight
    assert isinstance(weight, Tensor)
    blocks = blocks_of(layer)
    stored = weight.detach().reshape(blocks, weight.shape[0] // blocks, weight.shape[1], -1)
    return stored.transpose(1, 2) if isinstance(layer, _ConvTransposeNd) else stored


def channel_weight(layer: nn.Module) -> Tensor:
    """View a layer's weights with one row an output channel, [C, inputs x kernel], without a copy where strides allow.

    Example:
        >>> channel_weight(nn.ConvTranspose2d(4, 6, 3, groups=2)).shape
        torch.Size([6, 18])
    """
    return weight_blocks(layer).reshape(out_channels_of(layer), -1)


def flatten_positions(output: Tensor, layer: nn.Module, batch_size: int, name: str) -> Tensor:
    """View a layer's output as [images, positions, C] without copying.

    Args:
        output: what the layer returned: [n, C, *spatial] of a convolution (either memory format),
            [n, *, C] of a linear layer, [n, tokens, C] or [tokens, n, C] of attention; n may be a
            multiple of the batch when an image is cut into windows.
        layer: the layer.
        batch_size: images in the batch.
        name: the layer's name, for the message.

    Raises:
        TwoAxisError: the leading dimension is not the batch.
    """
    if isinstance(layer, nn.MultiheadAttention) and not layer.batch_first and output.ndim == 3:
        output = output.transpose(0, 1)
    if isinstance(layer, _ConvNd):
        if output.ndim == len(layer.kernel_size) + 1:  # one unbatched image
            output = output[None]
        output = output.movedim(1, -1)
    if output.ndim < 2 or output.shape[0] % batch_size:
        raise TwoAxisError(
            f"{name}: expected an output whose leading dimension is the batch ({batch_size} images), got "
            f"{list(output.shape)}; leave the layer out with layers=[...]"
        )
    return output.reshape(batch_size, -1, output.shape[-1])
