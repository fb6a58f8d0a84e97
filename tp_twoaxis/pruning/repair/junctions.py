"""Sums and rectifiers of a forward pass, met where they happen, whoever's code they are in."""

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
SUMS = {_aten.add.Tensor, _aten.add_.Tensor}
RECTIFIERS = {_aten.relu.default, _aten.relu_.default, _aten.hardtanh.default, _aten.hardtanh_.default}
NORMS = {
    _aten.native_batch_norm.default,
    _aten.cudnn_batch_norm.default,
    _aten.miopen_batch_norm.default,
    _aten._native_batch_norm_legit_no_training.default,
}


class Junctions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls back at every sum of two equally shaped tensors and every rectifier of a forward pass.

    Modules, functions and in-place operators are all met, because it is PyTorch's dispatcher that tells. Callbacks
    may change the tensors that they get in place; what they compute is not told of.

    Args:
        summed: called behind a sum with both operands and the result.
        rectified: called before a rectifier with its input and its bounds: ``(x, 0, inf)`` of a ReLU, ``(x, 0, 6)``
            of a ReLU6.
        normed: called behind a BatchNorm in eval mode with input, output and scale [C].

    Example:
        >>> met = []
        >>> with Junctions(lambda a, b, out: met.append("sum"), lambda x, low, high: met.append((low, high))):
        ...     _ = torch.relu(torch.ones(2) + torch.ones(2)) + 1
        >>> met
        ['sum', (0.0, inf)]
    """

    def __init__(
        self,
        summed: Callable[[Tensor, Tensor, Tensor], None],
        rectified: Callable[[Tensor, float, float], None],
        normed: Callable[[Tensor, Tensor, Tensor], None] | None = None,
        passed: Callable[[Tensor], None] | None = None,
        read: Callable[[Tensor], None] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._summed, self._rectified, self._normed = summed, rectified, normed
        self._passed, self._read = passed, read

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._read is not None:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self._read(tensor)
        if func in RECTIFIERS:
            bounds = args[1:] or ((-1.0, 1.0) if "hardtanh" in func.name() else (0.0, math.inf))
            self._rectified(args[0], float(bounds[0]), float(bounds[1]))
        out = func(*args, **kwargs)
        if func in RECTIFIERS and self._passed is not None:
            self._passed(out)
        if func in SUMS and isinstance(args[1], Tensor) and args[0].shape == args[1].shape and not kwargs:
            self._summed(args[0], args[1], out)
        elif func in NORMS and self._normed is not None:
            self._meet_norm(func, args, out[0] if isinstance(out, (tuple, list)) else out)
        return out

    def _meet_norm(self, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
        assert self._normed is not None
        x, weight, _, _, variance, *rest = args
        without_flag = func is _aten._native_batch_norm_legit_no_training.default
        if variance is None or (not without_flag and rest[0]):  # by the batch's own statistics: no fixed scale
            return
        scale = (variance + rest[-1]).rsqrt()  # eps ends the arguments of all of them
        self._normed(x, out, scale if weight is None else scale * weight)


def untold(hook: Callable[..., None]) -> Callable[..., None]:
    """Wrap a module's hook so that :class:`Junctions` is not told of what it computes."""

    @functools.wraps(hook)
    def quiet(*args: Any) -> None:
        with _disable_current_modes():
            hook(*args)

    return quiet
