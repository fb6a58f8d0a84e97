"""Run a network again from a layer on: what finished before it is recorded once and handed back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class PrefixReplay:
    """The outputs of all modules of a network that finish before a layer starts, for one batch.

    :meth:`advance` runs the network up to the first of some layers and remembers what each module returned on the
    way, in the order of their calls; of a module that finished as a whole, a residual block for example, the calls
    inside are forgotten. Under :meth:`replaying` the same calls return what is remembered, and everything from the
    layer on runs; they return copies where a pass changes tensors in place, and in the first pass, which tells. What a
    module does to tensors between its sub-modules is run again, so this serves whatever ``forward`` holds, as long as
    it does the same in every pass. Where the layer is further on than the one before, ``advance`` starts from what is
    remembered, and a walk through all layers costs one pass.

    In memory are the outputs of the finished outermost modules, and of those inside the module that the layer is in:
    a small multiple of the images where a network is made of blocks.

    Args:
        network: in evaluation mode; its modules' ``forward`` are replaced while a pass of this object runs.
        run: runs the network on the batch; always the same.

    Example:
        >>> net, x, calls = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval(), torch.ones(1, 2), []
        >>> _ = net[0].register_forward_hook(lambda *_: calls.append("the hooks of the first layer run"))
        >>> replay = PrefixReplay(net, lambda: net(x))
        >>> replay.advance([net[1]])
        True
        >>> before = net(x)
        >>> with torch.no_grad():
        ...     _ = net[0].weight.zero_()  # not seen by the replay, which has its output
        >>> with replay.replaying():
        ...     torch.equal(net(x), before)
        True
    """

    def __init__(self, network: nn.Module, run: Callable[[], Any]) -> None:
        self.network = network
        self._run = run
        self._record: list[_FinishedCall] = []

    @torch.no_grad()
    def advance(self, layers: Iterable[nn.Module], *, including: bool = False) -> bool:
        """Remember what finishes before the first call of any of these layers.

        Args:
            layers: modules of the network.
            including: remember what that first call returns too, for changes of what a layer writes, made by its
                forward hooks, which run in a replay as well; without, for changes of the layer itself.

        Returns:
            Whether one of them was reached. Not so where a layer's ``forward`` is never called, or is no longer called
            because a module around it is remembered; then nothing is remembered any more.
        """
        stops = set(layers)
        known = _CallCursor(self._record)
        record: list[_FinishedCall] = []  # of finished calls; those inside a call are dropped when it finishes

        def visit(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if module in stops and not including:
                raise _PrefixFinished
            if known.has(module):
                call = known.take()
                record.append(call)
                output = call.hand_out(watched=False)  # this pass ends early, so it tells nothing
            else:
                start = len(record)
                output = forward(*args, **kwargs)
                # hooks of a layer that it stops behind may change the output in one pass and not in another
                record[start:] = [_FinishedCall(module, output, always_copied=module in stops)]
            if module in stops:
                raise _PrefixFinished
            return output

        reached = False
        try:
            with _intercepted(self.network, visit):
                self._run()
        except _PrefixFinished:
            reached = known.is_used_up
        self._record = record if reached else []
        return reached

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Let one pass over the batch start where :meth:`advance` stopped."""
        known = _CallCursor(self._record)

        def visit(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return known.take().hand_out(watched=True) if known.has(module) else forward(*args, **kwargs)

        with _intercepted(self.network, visit, {id(call.module) for call in self._record}):
            yield
        for call in self._record:
            call.settle()


class _PrefixFinished(BaseException):
    """Ends a pass at a layer; not an Exception, so that no model's own code catches it."""


class _FinishedCall:
    """What a module returned, and whether a pass changes that in place."""

    def __init__(self, module: nn.Module, output: Any, *, always_copied: bool) -> None:
        self.module = module
        self._output = snapshot(output)
        self._always_copied = always_copied
        self._stays = False
        self._copy: Any = None

    def hand_out(self, *, watched: bool) -> Any:
        """Give it to a pass: a copy, unless an earlier pass from here to the end left the copy as it was.

        Args:
            watched: whether this pass goes on to the end and :meth:`settle` is called behind it.
        """
        if self._stays:
            return self._output
        copied = snapshot(self._output)
        self._copy = copied if watched else None
        return copied

    def settle(self) -> None:
        """See whether the pass that has ended changed its copy; views count with the tensor that they are of."""
        if isinstance(self._copy, Tensor) and not self._copy.is_inference() and not self._always_copied:
            self._stays = self._copy._version == 0
        self._copy = None


class _CallCursor:
    """Walks through recorded calls."""

    def __init__(self, record: list[_FinishedCall]) -> None:
        self._record = record
        self._next = 0

    @property
    def is_used_up(self) -> bool:
        return self._next == len(self._record)

    def has(self, module: nn.Module) -> bool:
        return not self.is_used_up and self._record[self._next].module is module

    def take(self) -> _FinishedCall:
        self._next += 1
        return self._record[self._next - 1]


def snapshot(value: Any) -> Any:
    """Copy what a module returned, so that later operations in place do not reach it.

    Example:
        >>> x = torch.zeros(2)
        >>> copied = snapshot((x, None))
        >>> _ = x.add_(1)
        >>> copied
        (tensor([0., 0.]), None)
    """
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


@contextmanager
def _intercepted(
    network: nn.Module, visit: Callable[[nn.Module, Callable[..., Any], Any, Any], Any], only: set[int] | None = None
) -> Iterator[None]:
    """Call ``visit(module, forward, args, kwargs)`` in place of every module's ``forward``, or of some modules'."""
    own: list[tuple[nn.Module, Any]] = []

    def intercept(module: nn.Module) -> None:
        own.append((module, module.__dict__.get("forward")))
        forward = module.forward
        module.__dict__["forward"] = lambda *args, **kwargs: visit(module, forward, args, kwargs)

    try:
        for module in network.modules():
            if only is None or id(module) in only:
                intercept(module)
        yield
    finally:
        for module, forward in own:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward
