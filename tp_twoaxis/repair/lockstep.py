"""Passes of the pruned and the dense network over chunks of images, all of them paused at the same place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.repair.chunk_memory import ChunkMemory
from tp_twoaxis.repair.images import ImageChunk
from tp_twoaxis.repair.paused_pass import LAYER, PassObserver, PausedPass, PausingNetwork


@dataclass(frozen=True)
class _Passes:
    """The two passes of a chunk of images."""

    pruned: PausedPass
    dense: PausedPass


class Place(NamedTuple):
    """A place at which all passes are paused.

    Attributes:
        number: how many places came before.
        kind: of the pause, see :class:`~tp_twoaxis.repair.paused_pass.Pause`.
        name: of the layer or norm.
        pruned: for each chunk the values of the pruned network's pause.
        dense: the same of the dense network's.
        held_out: for each chunk whether it judges.
    """

    number: int
    kind: str
    name: str
    pruned: list[tuple[Any, ...]]
    dense: list[tuple[Any, ...]]
    held_out: list[bool]


Replay = Callable[[int, str, str, tuple[Any, ...]], None]
"""``(index, kind, name, values of the pruned network's pause)``, of a chunk that catches up."""


class ChunkTensors(list[Tensor]):
    """A tensor for each chunk, in order; unlike other lists it can be referenced weakly."""


class Lockstep:
    """Runs both networks over chunks of images, side by side, from place to place.

    Neither network's tensors need be kept for all layers, nor computed again for each. As many chunks run as memory
    allows; where later places need less of it, more chunks join: before a layer they catch up with the others. So the
    first layers, whose maps are large, meet fewer images than the last ones, and no image runs twice.

    Args:
        pruned: pauses before its layers.
        dense: pauses after its layers.
        chunks: read as far as there is room.
        memory: what there is room for; None takes one chunk.

    Attributes:
        joined: how many images there were at each place so far, without those held out.
    """

    def __init__(
        self, pruned: PausingNetwork, dense: PausingNetwork, chunks: Iterator[ImageChunk], memory: ChunkMemory | None
    ) -> None:
        self.joined: list[int] = []
        self._pruned, self._dense, self._memory = pruned, dense, memory
        self._chunks, self._next = chunks, next(chunks, None)
        self._passes: list[_Passes] = []
        self._held_out: list[bool] = []
        self._images = self._fitted = 0
        self._history: list[tuple[str, str]] = []

    def run(self, handle: Callable[[Place], None], replay: Replay, observer: PassObserver | None = None) -> None:
        """Run to the end.

        Args:
            handle: called at each place; may change tensors of the pruned network's passes in place, and its weights.
            replay: called at each earlier place of a chunk that joins.
            observer: of the pruned network's first pass.

        Raises:
            TwoAxisError: the networks' places differ.
        """
        with ExitStack() as stack:
            index = 0
            while True:
                pauses = [self._resume(passes, index) for passes in self._passes]
                if not pauses or self._history[index][0] == LAYER:
                    pauses += self._join(index, replay, observer, stack)
                if self._history[index][0] == "":
                    return
                self.joined.append(self._fitted)
                pruned, dense = ([pair[side] for pair in pauses] for side in (0, 1))
                del pauses
                handle(Place(index, *self._history[index], pruned, dense, list(self._held_out)))
                del pruned, dense
                index += 1

    def _join(
        self, index: int, replay: Replay, observer: PassObserver | None, stack: ExitStack
    ) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
        """Start chunks for which there is room, and take them to a place."""
        pauses = []
        while self._next is not None and self._has_room(index, len(self._next.inputs)):
            chunk, first = self._next, not self._passes
            passes = _Passes(
                stack.enter_context(self._pruned.start(chunk.inputs, observer if first else None)),
                stack.enter_context(self._dense.start(chunk.inputs)),
            )
            for earlier in range(index):
                values, _ = self._resume(passes, earlier)
                replay(earlier, *self._history[earlier], values)
                del values
            pauses.append(self._resume(passes, index))
            self._passes.append(passes)
            self._held_out.append(chunk.held_out)
            self._images += len(chunk.inputs)
            self._fitted += 0 if chunk.held_out else len(chunk.inputs)
            del chunk
            self._next = next(self._chunks, None)
        return pauses

    def _has_room(self, index: int, images: int) -> bool:
        if self._memory is None:
            return not self._passes
        return self._memory.has_room(index, self._images, images)

    def _resume(self, passes: _Passes, index: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Take a chunk to its next place, which must be the others' too."""
        dense, pruned = passes.dense.resume(), passes.pruned.resume()
        places = [("", "") if pause is None else (pause.kind, pause.name) for pause in (pruned, dense)]
        if len(self._history) == index:
            self._history.append(places[0])
        for found in places:
            if found != self._history[index]:
                expected, got = (name or "its end" for _, name in (self._history[index], found))
                raise TwoAxisError(
                    f"repair 'sequential': expected {expected} to run next, got {got} - the order of the network's "
                    "layers depends on the data; choose 'patch' or 'ridge'"
                )
        return () if pruned is None else pruned.values, () if dense is None else dense.values
