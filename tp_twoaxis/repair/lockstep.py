"""The dense network's forward pass in lockstep with the pruned one's: paused at each layer until its turn there."""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.repair.op_interceptor import OpInterceptor
from tp_twoaxis.runtime.inputs import Inputs
from tp_twoaxis.runtime.kernels import first_input

SUM, RECTIFIER = "a sum", "a rectifier"


class _Stopped(BaseException):
    """Unwinds a forward pass whose results nobody awaits any more."""


class LockstepReference:
    """A forward pass that pauses at norms, after layers, at sums and at rectifiers, and returns their tensors.

    It runs in a thread of its own, but never at the same time as the caller: one waits while the other works.
    So the dense network's outputs need not be kept for all layers, nor computed again for each.

    Args:
        model: in eval mode; layers must be called once.
        layers: name -> layer of it.
        inputs: a batch on the model's device.
        norms: name -> norm of it, called once.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with LockstepReference(net, {"0": net[0], "2": net[2]}, Inputs((torch.zeros(4, 2),))) as dense:
        ...     [tuple(dense.next(name)[-1].shape) for name in ("0", RECTIFIER, "2")]
        [(4, 3), (4, 3), (4, 1)]
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, nn.Module], inputs: Inputs, norms: dict[str, nn.Module] | None = None
    ) -> None:
        self._model, self._layers, self._inputs, self._norms = model, layers, inputs, norms or {}
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._resume = threading.Semaphore(0)
        self._stopped = False
        kind = inputs.tensors[0].device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> LockstepReference:
        self._handles = [
            layer.register_forward_hook(self._layer_hook(name), with_kwargs=True)
            for name, layer in self._layers.items()
        ]
        self._handles += [
            norm.register_forward_pre_hook(self._norm_hook(name), with_kwargs=True)
            for name, norm in self._norms.items()
        ]
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._resume.release()
        self._thread.join()
        for handle in self._handles:
            handle.remove()

    def next(self, name: str) -> tuple[Tensor, ...]:
        """Run to the next layer, norm, sum or rectifier.

        Args:
            name: what must come next: a layer's or norm's name, :data:`SUM` or :data:`RECTIFIER`.

        Returns:
            The input and output of a layer, the result of a sum, the input of a norm or rectifier; valid until the next
            call.

        Raises:
            TwoAxisError: something else came, or nothing.
        """
        self._resume.release()
        item = self._items.get()
        if isinstance(item, BaseException):
            raise item
        if item is None or item[0] != name:
            raise TwoAxisError(
                f"repair 'sequential': expected {name} to run next in the dense network, got "
                f"{'its end' if item is None else item[0]} - the order of its layers depends on the data; choose "
                "'patch' or 'ridge'"
            )
        return tuple(item[1:])

    def _layer_hook(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            self._pause(name, first_input(inputs, named), output[0] if isinstance(output, tuple) else output)

        return hook

    def _norm_hook(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._pause(name, first_input(inputs, named))

        return hook

    def _pause(self, name: str, *tensors: Tensor) -> None:
        self._items.put((name, *tensors))
        self._wait()

    def _wait(self) -> None:
        self._resume.acquire()
        if self._stopped:
            raise _Stopped

    def _run(self) -> None:
        # grad mode, autocast and the current device belong to a thread
        try:
            self._wait()
            device = self._inputs.tensors[0].device
            if device.type == "cuda":
                torch.cuda.set_device(device)
            kind, dtype, enabled = self._autocast
            interceptor = OpInterceptor(
                on_add=lambda a, b, result: self._pause(SUM, result),
                on_rectifier=lambda x, low, high: self._pause(RECTIFIER, x),
            )
            with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled), interceptor:
                self._model(*self._inputs.args, **self._inputs.kwargs)
            self._items.put(None)
        except _Stopped:
            pass
        except BaseException as error:  # whoever waits for the next item must hear of any
            self._items.put(error)
