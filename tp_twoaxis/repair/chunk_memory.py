"""The memory that images need while they wait for each other, place by place, and how many there is room for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from torch import Tensor
from torch.utils.weak import TensorWeakRef

# images run in chunks whose tensors take about so many bytes, and no more than so many images
CHUNK_BYTES, CHUNK_IMAGES = 2**28, 256
FEWEST_TOGETHER = 8


class LiveTensors:
    """Counts the bytes of the tensors that were added and still exist.

    Example:
        >>> import torch
        >>> live, x = LiveTensors(), torch.zeros(100)
        >>> live.add(x), live.add(x[:50]), live.add(torch.zeros(7))
        (None, None, None)
        >>> live.bytes()
        400
    """

    def __init__(self) -> None:
        self._references: list[TensorWeakRef] = []

    def add(self, tensor: Tensor) -> None:
        """Add a tensor; views of it are the same memory."""
        self._references.append(TensorWeakRef(tensor))

    def bytes(self, others: Iterable[Tensor] = ()) -> int:
        """Bytes of the storages of the tensors that exist, and of others."""
        alive = [(reference, tensor) for reference in self._references if (tensor := reference()) is not None]
        self._references = [reference for reference, _ in alive]
        storages = [tensor.untyped_storage() for tensor in (*(tensor for _, tensor in alive), *others)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class ChunkMemory:
    """Decides how many images may wait at a place.

    Args:
        needs: at each place in order, bytes of an image's tensors.
        limit: bytes that there are.

    Example:
        >>> memory = ChunkMemory([100, 400, 50, 10], 4000)
        >>> memory.has_room(0, 8, 2), memory.has_room(0, 8, 4), memory.has_room(2, 10, 8), memory.has_room(2, 10, 9)
        (True, False, True, False)
    """

    def __init__(self, needs: Sequence[int], limit: float) -> None:
        self.limit = limit
        self._at = list(needs)
        self._until = list(accumulate(needs, max))
        self._from = list(accumulate(reversed(needs), max))[::-1]

    @property
    def largest(self) -> int:
        """What an image needs where it needs most."""
        return self._from[0]

    @property
    def chunk_images(self) -> int:
        """How many images should run together: few enough that chunks can join, unless that would be very few."""
        room = int(self.limit // max(self.largest, 1))
        fewest = min(FEWEST_TOGETHER, room * 4 // 5)  # beside them a quarter as many are held out
        return max(min(CHUNK_BYTES // max(self.largest, 1), CHUNK_IMAGES, room // 5), fewest, 1)

    def has_room(self, index: int, running: int, more: int) -> bool:
        """Whether more images may catch up with those that wait at a place, and go on with them.

        Args:
            index: of the place.
            running: images that wait there.
            more: images that would join; on their way they need what the places before need.
        """
        catching_up = running * self._at[index] + more * self._until[index]
        return max(catching_up, (running + more) * self._from[index]) <= self.limit
