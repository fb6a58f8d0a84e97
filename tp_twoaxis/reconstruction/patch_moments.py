"""Second moments of a layer's patches with what it should write, all blocks of the layer at once, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tp_twoaxis.statistics.moments import BLOCK_NUMBERS, STRIP, mirror

# rows that are multiplied at a time, at most, where patches are wide
MOST_PIECE_ROWS = 2048


class PatchMoments:
    """Count, means and centred products of predictors and targets for each block of a layer.

    Args:
        blocks: B, blocks of channels that do not mix.
        width: P, predictors of a block.
        outputs: O, targets of a block.
        device: of the accumulators; needs float64.

    Attributes:
        count: rows.
        mean: [B, P] float64.
        target_mean: [B, O] float64.
        scatter: [B, P, P] float64, sum of ``(x - mean)(x - mean)'``; of wide blocks only what is not below the
            diagonal, until :meth:`symmetrize`.
        cross: [B, P, O] float64, sum of ``(x - mean)(y - target_mean)'``.
        power: float, sum of ``|y - target_mean|^2`` over all blocks and targets.

    Example:
        >>> moments = PatchMoments(1, 1, 1)
        >>> moments.update(torch.tensor([[[0.0]], [[2.0]]]), torch.tensor([[[1.0]], [[5.0]]]))
        >>> moments.count, moments.scatter.item(), moments.cross.item(), moments.power
        (2, 2.0, 4.0, 8.0)
    """

    def __init__(self, blocks: int, width: int, outputs: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0
        self.mean, self.target_mean = zeros(blocks, width), zeros(blocks, outputs)
        self.scatter, self.cross = zeros(blocks, width, width), zeros(blocks, width, outputs)
        self.power = 0.0

    def update(self, rows: Tensor, targets: Tensor) -> None:
        """Accumulate rows.

        Args:
            rows: [n, B, P], any float dtype.
            targets: [n, B, O].
        """
        for x, y in self._pieces(rows, targets, room=1):
            mean, target_mean = x[:, :-1].mean(1), y[:, :-1].mean(1)
            x -= mean[:, None]
            y -= target_mean[:, None]
            # the way from the means so far, as one row more: alone it would cost as much as the product
            x[:, -1], y[:, -1] = self._shift(x.shape[1] - 1, mean, target_mean)
            _add_square(self.scatter, x)
            _add_products(self.cross, x, y)
            self.power += float(y.square().sum())

    def add_other_targets(self, cross: Tensor, total: Tensor, rows: Tensor, targets: Tensor) -> None:
        """Sum products of the same predictors with other targets, in place.

        Args:
            cross: [B, P, O] float64, sum of ``(x - mean) y'`` with the mean of all rows of this object.
            total: [B, O] float64, sum of the targets.
            rows: [n, B, P], some of the rows that this object was made from.
            targets: [n, B, O].
        """
        for x, y in self._pieces(rows, targets):
            x -= self.mean[:, None]
            _add_products(cross, x, y)
            total += y.sum(1)

    def symmetrize(self) -> PatchMoments:
        """Make the scatter symmetric to the last bit, as a factorisation wants it; returns self."""
        if self.scatter.shape[1] > STRIP:
            for block in self.scatter:
                mirror(block)
        else:
            self.scatter = self.scatter.triu() + self.scatter.triu(1).mT
        return self

    def squared_error(self, change: Tensor, shift: Tensor) -> float:
        """Mean over rows of ``|y - change' x - shift|^2``, summed over blocks and targets.

        Args:
            change: [B, P, O] float64.
            shift: [B, O] float64.

        The scatter has to be symmetric.
        """
        offset = self.target_mean - shift - torch.einsum("bpo,bp->bo", change, self.mean)
        quadratic = (change * (torch.bmm(self.scatter, change) - 2 * self.cross)).sum()
        return (self.power + float(quadratic)) / max(self.count, 1) + float(offset.square().sum())

    def _pieces(self, rows: Tensor, targets: Tensor, *, room: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut rows into fresh float64 pieces [B, n + room, ...]: small, but long enough to be worth their products."""
        numbers = rows[:1].numel() + targets[:1].numel()
        small = BLOCK_NUMBERS.get(rows.device.type, 2**18) // max(numbers, 1)
        step = max(small, min(rows.shape[-1], MOST_PIECE_ROWS), 1)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            yield self._fresh(rows[part], room), self._fresh(targets[part], room)

    def _fresh(self, rows: Tensor, room: int) -> Tensor:
        count, blocks, width = rows.shape
        made = torch.empty(blocks, count + room, width, dtype=torch.float64, device=self.mean.device)
        made[:, :count] = rows.transpose(0, 1)
        return made

    def _shift(self, count: int, mean: Tensor, target_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Count another part and move the means; returns the rows whose products account for the way between them."""
        total = self.count + count
        delta, target_delta = mean - self.mean, target_mean - self.target_mean
        between = math.sqrt(self.count * count / total)
        self.mean += delta * (count / total)
        self.target_mean += target_delta * (count / total)
        self.count = total
        return between * delta, between * target_delta


def _add_square(sums: Tensor, x: Tensor) -> None:
    """Add ``x' x`` of each block, in place: of one wide block in strips, from the diagonal on."""
    if len(sums) > 1 or x.shape[2] <= STRIP:
        _add_products(sums, x, x)
        return
    for start in range(0, x.shape[2], STRIP):
        strip = slice(start, start + STRIP)
        sums[0, strip, start:].addmm_(x[0, :, strip].T, x[0, :, start:])


def _add_products(sums: Tensor, x: Tensor, y: Tensor) -> None:
    """Add ``x' y`` of each block, in place: [B, P, O] from [B, n, P] and [B, n, O]."""
    if len(sums) == 1:
        sums[0].addmm_(x[0].T, y[0])
    else:
        sums.baddbmm_(x.mT, y)
