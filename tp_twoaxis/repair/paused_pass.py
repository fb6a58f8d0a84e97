"""Forward passes that pause at layers, BatchNorms, sums and rectifiers, each in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tp_twoaxis.repair.op_interceptor import OpInterceptor, unintercepted
from tp_twoaxis.runtime.inputs import Inputs
from tp_twoaxis.runtime.kernels import first_input

LAYER, NORM, SUM, RECTIFIER = "layer", "norm", "sum", "rectifier"


class Pause(NamedTuple):
    """Where a pass is paused.

    Attributes:
        kind: one of ``layer``, ``norm``, ``sum`` and ``rectifier``.
        name: of the layer or norm; of the others what they are.
        values: before a layer its arguments ``(args, kwargs)``, after it ``(input, output)``; a norm's input; a sum's
            operands and result; a rectifier's input and bounds.
    """

    kind: str
    name: str
    values: tuple[Any, ...]


class PassObserver(Protocol):
    """Is told of results between the pauses of a pass, in the thread of the pass."""

    def on_layer_output(self, layer: nn.Module, output: object) -> None:
        """A layer has run."""

    def on_norm(self, x: Tensor, out: Tensor, scale: Tensor) -> None:
        """A BatchNorm in eval mode has run."""

    def on_rectified(self, out: Tensor) -> None:
        """A rectifier has run."""


def _ignore(*_: Tensor) -> None:
    pass


class PausingNetwork:
    """A network whose passes can be started and pause; a context manager that holds its hooks.

    Args:
        model: in eval mode.
        layers: name -> layer, each called once in a pass.
        norms: name -> norm, likewise.
        after_layers: pause after layers, not before them.

    Attributes:
        on_result: called with each result of each operation of passes that start from now on, in their threads.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with PausingNetwork(net, {"0": net[0], "2": net[2]}, {}, after_layers=True) as network:
        ...     with network.start(Inputs((torch.zeros(4, 2),))) as run:
        ...         [(pause.kind, pause.name, tuple(pause.values[0].shape)) for pause in iter(run.resume, None)]
        [('layer', '0', (4, 2)), ('rectifier', 'a rectifier', (4, 3)), ('layer', '2', (4, 3))]
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], norms: Mapping[str, nn.Module], *, after_layers: bool
    ) -> None:
        self.model = model
        self.on_result: Callable[[Tensor], None] | None = None
        self._layers, self._norms, self._after = layers, norms, after_layers
        self._local = threading.local()
        self._hooks = ExitStack()

    def __enter__(self) -> PausingNetwork:
        for name, layer in self._layers.items():
            if not self._after:
                before = unintercepted(self._before_layer(name))
                self._hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._hooks.callback(layer.register_forward_hook(self._after_layer(name), with_kwargs=True).remove)
        for name, norm in self._norms.items():
            before = unintercepted(self._before_norm(name))
            self._hooks.callback(norm.register_forward_pre_hook(before, with_kwargs=True).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def start(self, inputs: Inputs, observer: PassObserver | None = None) -> PausedPass:
        """Prepare a pass; it runs to its first pause when it is first resumed.

        Args:
            inputs: on the model's device.
            observer: see :class:`PassObserver`.
        """
        return PausedPass(self, inputs, observer)

    def run(self, paused: PausedPass, inputs: Inputs) -> object:
        """Run the model in the calling thread, which ``paused`` belongs to."""
        self._local.paused = paused
        return self.model(*inputs.args, **inputs.kwargs)

    def _before_layer(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if (paused := self._paused()) is not None:
                paused.pause(Pause(LAYER, name, (inputs, named)))

        return hook

    def _after_layer(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            paused = self._paused()
            if paused is not None and self._after:
                written = output[0] if isinstance(output, tuple) else output
                paused.pause(Pause(LAYER, name, (first_input(inputs, named), written)))
            if paused is not None and paused.observer is not None:
                paused.observer.on_layer_output(layer, output)

        return hook

    def _before_norm(self, name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if (paused := self._paused()) is not None:
                paused.pause(Pause(NORM, name, (first_input(inputs, named),)))

        return hook

    def _paused(self) -> PausedPass | None:
        return getattr(self._local, "paused", None)


class _Stopped(BaseException):
    """Unwinds a forward pass whose results nobody awaits any more."""


class PausedPass:
    """One forward pass of a :class:`PausingNetwork`; a context manager that ends it.

    It runs in a thread, but never at the same time as the caller: one waits while the other works. While it is paused
    its tensors may be changed in place, and it goes on with what they are then.

    Attributes:
        observer: is told of results between the pauses.
    """

    def __init__(self, network: PausingNetwork, inputs: Inputs, observer: PassObserver | None) -> None:
        self.observer = observer
        self._network, self._inputs = network, inputs
        self._pauses: queue.SimpleQueue[Pause | BaseException | None] = queue.SimpleQueue()
        self._resume = threading.Semaphore(0)
        self._stopped = self._ended = False
        device = inputs.tensors[0].device
        self._autocast = (device.type, torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type))
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PausedPass:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._resume.release()
        self._thread.join()

    def resume(self) -> Pause | None:
        """Run to the next pause; None at the end. Whatever the model raises is raised here."""
        if self._ended:
            return None
        self._resume.release()
        pause = self._pauses.get()
        self._ended = not isinstance(pause, Pause)
        if isinstance(pause, BaseException):
            raise pause
        return pause

    def pause(self, pause: Pause) -> None:
        """Wait until the pass is resumed, or end it; to be called in its thread."""
        self._pauses.put(pause)
        del pause  # the caller of resume() alone decides how long its tensors live
        self._wait()

    def _wait(self) -> None:
        self._resume.acquire()
        if self._stopped:
            raise _Stopped

    def _interceptor(self) -> OpInterceptor:
        observer = self.observer
        return OpInterceptor(
            on_add=lambda a, b, out: self.pause(Pause(SUM, "a sum", (a, b, out))),
            on_rectifier=lambda x, low, high: self.pause(Pause(RECTIFIER, "a rectifier", (x, low, high))),
            on_norm=_ignore if observer is None else observer.on_norm,
            on_rectified=_ignore if observer is None else observer.on_rectified,
            on_result=self._network.on_result,
        )

    def _run(self) -> None:
        # grad mode, autocast and the current device belong to a thread
        try:
            self._wait()
            inputs = self._inputs
            device = inputs.tensors[0].device
            if device.type == "cuda":
                torch.cuda.set_device(device)
            kind, dtype, enabled = self._autocast
            with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled), self._interceptor():
                self._network.run(self, inputs)
            self._pauses.put(None)
        except _Stopped:
            pass
        except BaseException as error:  # whoever waits for the next pause must hear of any
            self._pauses.put(error)
