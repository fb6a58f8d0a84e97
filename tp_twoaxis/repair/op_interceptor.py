"""Callbacks at the additions, rectifiers and BatchNorms of a forward pass, by PyTorch's dispatcher."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
ADDITIONS = {_aten.add.Tensor, _aten.add_.Tensor}
RECTIFIERS = {_aten.relu.default, _aten.relu_.default, _aten.hardtanh.default, _aten.hardtanh_.default}
NORMS = {
    _aten.native_batch_norm.default,
    _aten.cudnn_batch_norm.default,
    _aten.miopen_batch_norm.default,
    _aten._native_batch_norm_legit_no_training.default,
}


def _ignore(*_: Any) -> None:
    pass


class OpInterceptor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls back at every addition of two equally shaped tensors, rectifier and BatchNorm of a forward pass.

    Modules, functions and in-place operators are all intercepted, because every operation passes PyTorch's dispatcher.
    Callbacks may change the tensors that they get in place; their own operations are not intercepted.

    Args:
        on_add: called after an addition with both operands and the result.
        on_rectifier: called before a rectifier with its input and its bounds: ``(x, 0, inf)`` of a ReLU, ``(x, 0, 6)``
            of a ReLU6.
        on_norm: called after a BatchNorm in eval mode with input, output and scale [C].
        on_rectified: called after a rectifier with its result.
        on_read: called before any operation with each of its tensors.
        on_result: called after any operation with each of its results.

    Example:
        >>> seen = []
        >>> with OpInterceptor(
        ...     on_add=lambda a, b, out: seen.append("add"), on_rectifier=lambda x, low, high: seen.append((low, high))
        ... ):
        ...     _ = torch.relu(torch.ones(2) + torch.ones(2)) + 1
        >>> seen
        ['add', (0.0, inf)]
    """

    def __init__(
        self,
        *,
        on_add: Callable[[Tensor, Tensor, Tensor], None] = _ignore,
        on_rectifier: Callable[[Tensor, float, float], None] = _ignore,
        on_norm: Callable[[Tensor, Tensor, Tensor], None] = _ignore,
        on_rectified: Callable[[Tensor], None] = _ignore,
        on_read: Callable[[Tensor], None] | None = None,
        on_result: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_add, self._on_rectifier, self._on_norm = on_add, on_rectifier, on_norm
        self._on_rectified, self._on_read, self._on_result = on_rectified, on_read, on_result

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._on_read is not None:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self._on_read(tensor)
        if func in RECTIFIERS:
            bounds = args[1:] or ((-1.0, 1.0) if "hardtanh" in func.name() else (0.0, math.inf))
            self._on_rectifier(args[0], float(bounds[0]), float(bounds[1]))
        out = func(*args, **kwargs)
        if self._on_result is not None:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._on_result(tensor)
        if func in RECTIFIERS:
            self._on_rectified(out)
        elif func in ADDITIONS and isinstance(args[1], Tensor) and args[0].shape == args[1].shape and not kwargs:
            self._on_add(args[0], args[1], out)
        elif func in NORMS:
            self._intercept_norm(func, args, out[0] if isinstance(out, (tuple, list)) else out)
        return out

    def _intercept_norm(self, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
        x, weight, _, _, variance, *rest = args
        without_flag = func is _aten._native_batch_norm_legit_no_training.default
        if variance is None or (not without_flag and rest[0]):  # by the batch's own statistics: no fixed scale
            return
        scale = (variance + rest[-1]).rsqrt()  # eps is the last argument of all of them
        self._on_norm(x, out, scale if weight is None else scale * weight)


def unintercepted(hook: Callable[..., None]) -> Callable[..., None]:
    """Wrap a module's hook so that :class:`OpInterceptor` does not intercept its operations."""

    @functools.wraps(hook)
    def wrapped(*args: Any) -> None:
        with _disable_current_modes():
            hook(*args)

    return wrapped
