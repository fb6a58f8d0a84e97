"""Sum numbers that have the shape of a layer's weight by the channels that the layer writes or reads."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from tp_twoaxis.runtime.layers import blocks_of


def sum_by_output(values: Tensor, layer: nn.Module) -> Tensor:
    """Sum by output channel.

    Args:
        values: in the shape of the layer's weight.
        layer: a convolution, transposed or not, or a linear layer.

    Returns:
        [output channels].

    Example:
        >>> layer = nn.Conv2d(4, 6, 3, groups=2)
        >>> sum_by_output(layer.weight, layer).shape
        torch.Size([6])
    """
    if isinstance(layer, _ConvTransposeNd):  # stored as [in, out / groups, ...]
        return values.reshape(layer.groups, -1, values.shape[1], values[0, 0].numel()).sum((1, 3)).reshape(-1)
    return values.flatten(1).sum(1)


def sum_by_input(values: Tensor, layer: nn.Module) -> Tensor:
    """Sum by input channel; see :func:`sum_by_output`.

    Example:
        >>> layer = nn.Conv2d(4, 6, 3, groups=2)
        >>> sum_by_input(layer.weight, layer).shape
        torch.Size([4])
    """
    if isinstance(layer, _ConvTransposeNd):
        return values.flatten(1).sum(1)
    return values.reshape(blocks_of(layer), -1, values.shape[1], values[0, 0].numel()).sum((1, 3)).reshape(-1)
