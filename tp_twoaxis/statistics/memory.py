"""What calibration takes of memory, known before it runs, and the passes that it is split into where it is too much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.row_queue import waiting_numbers

GIB = 2**30


@dataclass(frozen=True)
class LayerSize:
    """What decides the memory of a layer's statistics.

    Attributes:
        width: C, channels that it writes.
        read: C_in where its inputs are recorded too, or 0.
        positions: sampled of an image; 0 where all are taken, which wait only where they are few.
        read_positions: the same of its inputs.
    """

    width: int
    read: int = 0
    positions: int = 0
    read_positions: int = 0

    def accumulators(self, columns: int) -> int:
        """Bytes of the moments, in float64: of rows, pooled values, both with the task variables, and of inputs.

        Example:
            >>> LayerSize(64).accumulators(columns=15) == 8 * (2 * 64 * 64 + 64 * 15)
            True
        """
        return 8 * (2 * self.width**2 + self.width * columns + self.read**2)

    def waiting(self, batch: int, pooled_images: int) -> int:
        """Most bytes of rows that wait for their product: one batch's behind what waited before it."""
        rows = self._rows(self.width, self.positions, batch) + self._rows(self.read, self.read_positions, batch)
        return 4 * rows + 8 * (pooled_images + batch) * self.width

    def product(self, batch: int) -> int:
        """Bytes that one product takes while it is made: its rows, joined and centred, and a strip of the result.

        What a layer reads is centred and multiplied in float64.
        """
        written, read = self._rows(self.width, self.positions, batch), self._rows(self.read, self.read_positions, batch)
        return max((4 + 2 * 4) * written, (4 + 2 * 8) * read)

    @staticmethod
    def _rows(width: int, positions: int, batch: int) -> int:
        wait = waiting_numbers(width)
        return wait + (batch * positions * width or wait) if width else 0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that calibration takes beside the model, by layer.

    Attributes:
        layers: name -> bytes of its accumulators and of rows that wait.
        work: bytes of the largest product, of which there is one at a time.

    Example:
        >>> plan = MemoryPlan.of({"a": LayerSize(64), "b": LayerSize(2048)}, batch=32, columns=15, pooled_images=512)
        >>> round(plan.total() / GIB, 2), len(plan.passes(plan.total())), len(plan.passes(plan.layers["b"] + plan.work))
        (0.1, 1, 2)
    """

    layers: Mapping[str, int]
    work: int

    @classmethod
    def of(
        cls, sizes: Mapping[str, LayerSize], *, batch: int, columns: int, pooled_images: int, shards: int = 1
    ) -> MemoryPlan:
        """Add up.

        Args:
            sizes: of each layer.
            batch: images of a batch.
            columns: task variables.
            pooled_images: whose pooled values wait.
            shards: parts that are gathered side by side.
        """
        layers = {
            name: shards * (size.accumulators(columns) + size.waiting(batch, pooled_images))
            for name, size in sizes.items()
        }
        return cls(layers, max((size.product(batch) for size in sizes.values()), default=0))

    def total(self, names: Iterable[str] | None = None) -> int:
        """Bytes of these layers gathered in one pass; default all."""
        return self.work + sum(self.layers[name] for name in (self.layers if names is None else names))

    def passes(self, limit: int) -> list[list[str]]:
        """Split the layers, in their order, into as few passes as stay within so many bytes each.

        Raises:
            TwoAxisError: one layer alone takes more; the message has the ``max_memory`` that would do.
        """
        for name in self.layers:
            if self.total([name]) > limit:
                largest = max(map(self.total, ([n] for n in self.layers)))
                raise TwoAxisError(
                    f"max_memory: {name} alone takes {self.total([name]) / GIB:.3f} GiB, got {limit / GIB:.3f}; pass "
                    f"max_memory={_up(largest)}, or leave wide layers out with layers=[...]"
                )
        passes: list[list[str]] = [[]]
        for name in self.layers:
            if passes[-1] and self.total([*passes[-1], name]) > limit:
                passes.append([])
            passes[-1].append(name)
        return passes

    def check_free(self, device: torch.device) -> None:
        """Refuse to begin what will not fit beside what is in memory already.

        Raises:
            TwoAxisError: so; the message says what would fit.
        """
        free = free_memory(device)
        if free is None or self.total() <= free:
            return
        way = f"pass max_memory={free / GIB:.3f} for several passes, or " if device.type == "cuda" else ""
        raise TwoAxisError(
            f"calibrate: the statistics of {len(self.layers)} layers take {self.total() / GIB:.3f} GiB, on {device} "
            f"{free / GIB:.3f} GiB are free; {way}calibrate some layers at a time with layers=[...] and save each part"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, or None where that cannot be found out."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _up(count: int) -> float:
    """GiB in thousandths, rounded up."""
    return -(-count * 1000 // GIB) / 1000
