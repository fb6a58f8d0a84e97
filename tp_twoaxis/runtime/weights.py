"""Write fitted weights and biases into layers, as new parameters that can be taken back."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tp_twoaxis.runtime.kernels import own_forward_obstacle

SHARED = "its weight is shared with another layer"


def cannot_refit(layer: nn.Module) -> str | None:
    """Explain why nothing can be written into a layer's weights, or None when it can.

    Example:
        >>> cannot_refit(nn.Linear(2, 2)) is None, cannot_refit(nn.MultiheadAttention(2, 1))
        (True, 'its projections run inside the attention function')
    """
    if isinstance(layer, nn.MultiheadAttention):
        return "its projections run inside the attention function"
    if isinstance(layer, _ConvTransposeNd):
        return "a transposed convolution's taps do not cover its outputs evenly"
    if not isinstance(layer, (_ConvNd, nn.Linear)):
        return f"a {type(layer).__name__} does not mix channels"
    if "weight" not in layer._parameters:  # weight_norm, spectral_norm, pruning masks, any parametrization
        return "its weight is computed from other parameters"
    if not layer.weight.is_floating_point() or layer.weight.dtype.itemsize < 2:
        return f"its weight is quantised ({layer.weight.dtype})"
    return own_forward_obstacle(layer)


def shared_weights(network: nn.Module) -> Counter[int]:
    """Count how many layers hold each parameter, by its id."""
    return Counter(id(p) for module in network.modules() for p in module._parameters.values() if p is not None)


def write_weight(layer: nn.Module, weight: Tensor) -> None:
    """Replace a layer's weight, given as :func:`~tp_twoaxis.runtime.layers.weight_blocks` gives it, by a new parameter.

    A new one, not new values: whoever remembers the old parameter can go back to it.
    """
    old = layer.weight
    assert isinstance(old, Tensor)
    values = weight.reshape(old.shape).to(old.device, old.dtype)
    if old.ndim == 4 and old.is_contiguous(memory_format=torch.channels_last):
        values = values.contiguous(memory_format=torch.channels_last)
    layer.weight = nn.Parameter(values, requires_grad=old.requires_grad)


def add_bias(layer: nn.Module, shift: Tensor, batch_norm: nn.Module | None) -> None:
    """Add [C] to what a layer writes.

    Args:
        layer: a convolution or linear layer. One without bias gets a bias, unless
        batch_norm: a BatchNorm with running statistics alone reads it: then its running mean moves instead.
        shift: [C].
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer.bias, Tensor):
        value = (layer.bias.detach().double() + shift.to(layer.bias.device)).to(layer.bias.dtype)
        layer.bias = nn.Parameter(value, requires_grad=layer.bias.requires_grad)
    elif batch_norm is not None:
        mean = batch_norm.running_mean
        assert isinstance(mean, Tensor)
        batch_norm.running_mean = (mean.double() - shift.to(mean.device)).to(mean.dtype)
    else:
        layer.bias = nn.Parameter(shift.to(weight.device, weight.dtype), requires_grad=weight.requires_grad)
