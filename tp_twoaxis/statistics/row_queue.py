"""Rows that wait until one product of them is worth its overhead, and the stream beside the model that makes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tp_twoaxis.statistics.moments import BLOCK_ROWS, CoMoments

# rows wait until they are so many numbers, and of wide layers until they are BLOCK_ROWS
WAITING_NUMBERS = 2**18


def waiting_numbers(width: int) -> int:
    """How many numbers of rows of this width wait at most, before a batch's are added.

    Example:
        >>> waiting_numbers(16), waiting_numbers(1024)
        (262144, 524288)
    """
    return max(WAITING_NUMBERS, BLOCK_ROWS * width)


class SideStream:
    """Where products are made: on CUDA on a stream of their own, so that the model need not wait for them.

    Args:
        device: of the products.

    Example:
        >>> side = SideStream(torch.device("cpu"))
        >>> with side.after(torch.zeros(2)):
        ...     pass
        >>> side.join()
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def concurrent(self) -> bool:
        """Whether the model goes on meanwhile, and may change what it wrote."""
        return self._stream is not None

    @contextmanager
    def after(self, *tensors: Tensor) -> Iterator[None]:
        """Run a block behind what is queued on the current stream, and keep tensors of it alive until it is done."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for tensor in tensors:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for what was run."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class RowQueue:
    """Rows on their way into moments.

    Args:
        moments: of the rows with themselves.
        side: where products are made.

    Example:
        >>> moments = CoMoments(2)
        >>> queue = RowQueue(moments, SideStream(torch.device("cpu")))
        >>> queue.add(torch.zeros(3, 5, 2), owned=True)
        >>> moments.count
        0
        >>> queue.flush()
        >>> moments.count
        15
    """

    def __init__(self, moments: CoMoments, side: SideStream) -> None:
        self._moments = moments
        self._side = side
        self._parts: list[Tensor] = []
        self._weight = 1.0

    @property
    def numbers(self) -> int:
        """How many numbers wait."""
        return sum(part.numel() for part in self._parts)

    def add(self, rows: Tensor, weight: float = 1.0, *, owned: bool) -> None:
        """Take in rows.

        Args:
            rows: [n, P, C].
            weight: how many rows each of them stands for.
            owned: whether nobody else will change them; others are copied if they have to wait.
        """
        width = rows.shape[-1]
        if weight != self._weight:
            self.flush()
            self._weight = weight
        if not owned and not self._side.concurrent and rows.numel() >= waiting_numbers(width):
            self._moments.update(rows, weight=weight)
            return
        own = rows if owned else rows.clone(memory_format=torch.contiguous_format)
        self._parts.append(own.reshape(-1, width))
        if self.numbers >= waiting_numbers(width):
            self.flush()

    def flush(self) -> None:
        """Take what waits into the moments."""
        if self._parts:
            with self._side.after(*self._parts):
                self._moments.update(torch.cat(self._parts), weight=self._weight)
            self._parts = []
