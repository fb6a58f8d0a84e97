"""What reaches the kernel of a convolution or linear layer whose class computes ``forward`` itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_OPTIONS = ("stride", "padding", "dilation", "groups")
_PLAIN = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def first_input(inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Give a layer's first argument, whether it was passed by position or by name."""
    return inputs[0] if inputs else next(iter(named.values()))


def kernel_input(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Give the tensor that a layer's kernel is applied to: its first argument, padded where its forward pads it.

    Args:
        layer: a convolution or linear layer for which :func:`own_forward_obstacle` finds none.
        inputs: what its forward gets by position.
        named: and by name.

    Example:
        >>> class Padded(nn.Conv2d):
        ...     def forward(self, x):
        ...         return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)
        >>> kernel_input(Padded(2, 3, 3), (torch.ones(1, 2, 4, 4),), {}).shape
        torch.Size([1, 2, 6, 6])
    """
    if not has_own_forward(layer):
        return first_input(inputs, named)
    with torch.no_grad(), _KernelCalls(stop=True) as calls, contextlib.suppress(_Reached):
        layer.forward(*inputs, **named)
    return calls.seen[0].input


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer's forward is not that of torch's convolutions and linear layers.

    Example:
        >>> has_own_forward(nn.Conv2d(1, 1, 1)), has_own_forward(nn.Bilinear(1, 1, 1))
        (False, True)
    """
    plain = next((kind for kind in _PLAIN if isinstance(layer, kind)), None)
    if plain is None or "forward" in vars(layer) or "_conv_forward" in vars(layer):
        return True
    # transposed convolutions and linear layers have no second function
    return any(
        getattr(type(layer), name, None) is not getattr(plain, name, None) for name in ("forward", "_conv_forward")
    )


def own_forward_obstacle(layer: nn.Module) -> str | None:
    """Explain why a layer's stored weight is not its kernel, or None where it is.

    A forward may pad its input or do anything else to it, so long as it ends with the convolution (or the product) of
    the result and the stored weight, with the layer's own options. It is run once on a small input of zeros and ones.

    Args:
        layer: a convolution (not transposed) or linear layer.

    Example:
        >>> class Halved(nn.Linear):
        ...     def forward(self, x):
        ...         return F.linear(x, self.weight / 2, self.bias)
        >>> own_forward_obstacle(Halved(2, 2)), own_forward_obstacle(nn.Linear(2, 2)) is None
        ('its forward computes with other weights than those it stores', True)
    """
    if not has_own_forward(layer):
        return None
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, _ConvNd):
        sizes = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        shape = [1, layer.in_channels, *sizes]
    else:
        shape = [1, int(layer.in_features)]  # type: ignore[arg-type]
    probe = torch.ones(shape, dtype=weight.dtype, device=weight.device)
    training = layer.training
    layer.training = False
    try:
        with torch.no_grad(), _KernelCalls() as calls:
            output = layer.forward(probe)
    except Exception as error:  # anybody's code
        return f"its own forward cannot be examined ({type(error).__name__})"
    finally:
        layer.training = training
    if len(calls.seen) != 1 or calls.seen[0].output is not output:
        return "its forward does not end with its one convolution or product"
    (call,) = calls.seen
    if call.weight is not weight or call.bias is not layer.bias:
        return "its forward computes with other weights than those it stores"
    if isinstance(layer, _ConvNd) and not call.has_options_of(layer):
        return "its forward convolves with other options than those it stores"
    return None


class _Reached(BaseException):
    """Ends a forward pass whose kernel was reached."""


class _KernelCall:
    """A call of a convolution or linear function."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = dict(zip(("input", "weight", "bias", *_OPTIONS), args, strict=False)) | kwargs
        self.dimensions = _CONVOLUTIONS.get(function, 0)
        self.input, self.weight, self.bias = values["input"], values["weight"], values.get("bias")
        self.options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | {
            name: values[name] for name in _OPTIONS if name in values
        }
        self.output: Any = None

    def has_options_of(self, layer: _ConvNd) -> bool:
        own = {name: self._each(getattr(layer, name)) for name in _OPTIONS}
        return layer.padding_mode == "zeros" and own == {k: self._each(v) for k, v in self.options.items()}

    def _each(self, value: Any) -> Any:
        return (
            value if isinstance(value, str) else (value,) * self.dimensions if isinstance(value, int) else tuple(value)
        )


class _KernelCalls(TorchFunctionMode):
    """Records calls of convolution and linear functions."""

    def __init__(self, *, stop: bool = False) -> None:
        super().__init__()
        self.seen: list[_KernelCall] = []
        self._stop = stop

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _CONVOLUTIONS and func is not F.linear:
            return func(*args, **kwargs)
        call = _KernelCall(func, args, kwargs)
        self.seen.append(call)
        if self._stop:
            raise _Reached
        call.output = func(*args, **kwargs)
        return call.output
