"""Mergeable first and second moments in float64 (Chan, Golub & LeVeque 1983)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any, TypeVar

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError

F = TypeVar("F", bound=Callable[..., Any])

# rows are centred in blocks of about this many numbers: large enough for BLAS, small enough for the cache; of wide rows
# there are more in a block, as adding its product to the scatter must cost little beside the product
BLOCK_NUMBERS = {"cpu": 2**18, "cuda": 2**25}
BLOCK_ROWS = 512
# and multiplied so many at a time, or as many as they are wide: summed further in float32, products would lose digits
PRODUCT_ROWS = 256
# a symmetric product is made of strips so wide: of wider ones little more than the half above the diagonal is computed
STRIP = 256
# rows of up to so many numbers: all products of a block in one call, as each takes less than the start of a call
NARROW = 128


def _plain(function: F) -> F:
    """Run a method without autograd and outside of inference mode, whose tensors could not be updated later."""
    decorated: F = torch.inference_mode(mode=False)(torch.no_grad()(function))  # the former turns autograd on
    return decorated


def float64_device(device: torch.device) -> torch.device:
    """Give the device itself where it has float64, and the CPU for other accelerators.

    Example:
        >>> float64_device(torch.device("mps")), float64_device(torch.device("cuda", 1))
        (device(type='cpu'), device(type='cuda', index=1))
    """
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


class CoMoments:
    """Count, means and centred cross-products of paired rows; parts computed apart merge exactly.

    With ``other_width=None`` the rows are paired with themselves, and ``covariance`` is the usual
    covariance matrix. Rows are taken in by blocks: each is centred at its own mean and multiplied, and blocks merge in
    float64. The block size decides memory only. A row may stand for several: one of 4 positions that were sampled of
    an image's 64 has weight 16, so that parts sampled at different rates merge as their images, not as their rows.

    Args:
        width: D, numbers in a row.
        other_width: E, numbers in the paired row, or None for the rows themselves; 0 keeps count and mean alone.
        device: where the accumulators live; needs float64.
        product: dtype of the product of a block, float64 or, twice as fast, float32: it costs a covariance about
            1e-6 of the two spreads, however far from zero the means are, and spreads below 1e-19 count as none. Where
            torch is set to multiply float32 with less than its precision, the product is of float64 all the same.

    Attributes:
        count: rows seen.
        weight: rows that these stand for, the sum of their weights.
        mean: [D] float64.
        other_mean: [E] float64; ``mean`` itself when paired with itself.

    Example:
        >>> moments = CoMoments(2)
        >>> moments.update(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        >>> moments.count, moments.mean.tolist(), moments.covariance.tolist()
        (2, [1.0, 2.0], [[1.0, 2.0], [2.0, 4.0]])
    """

    @_plain
    def __init__(
        self,
        width: int,
        other_width: int | None = None,
        *,
        device: torch.device | str = "cpu",
        product: torch.dtype = torch.float64,
    ) -> None:
        self.count = 0
        self.weight = 0.0
        self.product = product
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._other_mean = None if other_width is None else torch.zeros(other_width, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(
            width, width if other_width is None else other_width, dtype=torch.float64, device=device
        )
        self._mirrored = True

    @classmethod
    @_plain
    def from_parts(
        cls,
        count: int,
        mean: Tensor,
        scatter: Tensor,
        other_mean: Tensor | None = None,
        *,
        weight: float | None = None,
    ) -> CoMoments:
        """Rebuild moments from their parts; ``weight`` is the count unless it is given.

        Raises:
            TwoAxisError: the parts' shapes do not fit each other.
        """
        moments = cls(len(mean), None if other_mean is None else len(other_mean), device=mean.device)
        if scatter.shape != moments.scatter.shape:
            raise TwoAxisError(f"expected a scatter {list(moments.scatter.shape)}, got {list(scatter.shape)}")
        moments.count, moments.mean, moments._scatter = count, mean, scatter
        moments.weight = float(count) if weight is None else weight
        moments._other_mean = other_mean
        return moments

    @property
    def paired(self) -> bool:
        """Whether two kinds of rows are paired, so that ``scatter`` is not symmetric."""
        return self._other_mean is not None

    @property
    def other_mean(self) -> Tensor:
        """Mean of the paired rows, [E]."""
        return self.mean if self._other_mean is None else self._other_mean

    @property
    def scatter(self) -> Tensor:
        """Sum of ``weight (x - mean)(y - other_mean)'``, [D, E] float64; symmetric to the last bit unless paired."""
        if not self._mirrored:
            mirror(self._scatter)
            self._mirrored = True
        return self._scatter

    @property
    def finite(self) -> bool:
        """Whether all rows so far were finite; waits for the device."""
        # no entry of a scatter of rows with themselves exceeds its diagonal
        numbers = self._scatter if self.paired else self._scatter.diagonal()
        return bool(torch.isfinite(numbers).all())

    @property
    def covariance(self) -> Tensor:
        """``scatter / weight``, [D, E]; zeros before the first row."""
        return self.scatter / (self.weight or 1.0)

    @property
    def variance(self) -> Tensor:
        """Diagonal of the covariance, [D], of rows that are paired with themselves."""
        return self.scatter.diagonal() / (self.weight or 1.0)

    @_plain
    def update(self, rows: Tensor, other: Tensor | None = None, *, weight: float = 1.0) -> None:
        """Take in rows.

        Args:
            rows: [n, D] or [images, positions, D], of any float dtype and any strides.
            other: [n, E] or [images, positions, E], required exactly when the moments pair two kinds of rows.
            weight: how many rows each of them stands for, more than 0.

        Raises:
            TwoAxisError: widths or lengths do not fit, or the weight is not positive.
        """
        if not weight > 0.0:
            raise TwoAxisError(f"weight: expected the number of rows that each row stands for, got {weight!r}")
        paired = self._other_mean is not None
        if rows.ndim not in (2, 3) or rows.shape[-1] != len(self.mean) or paired != (other is not None):
            raise TwoAxisError(
                f"expected rows [n, {len(self.mean)}]{' and their pairs' if paired else ''}, got "
                f"{list(rows.shape)}{'' if other is None else f' and {list(other.shape)}'}"
            )
        if other is not None and other.shape != (*rows.shape[:-1], len(self.other_mean)):
            raise TwoAxisError(
                f"expected paired rows {[*rows.shape[:-1], len(self.other_mean)]}, got {list(other.shape)}"
            )
        each = math.prod(rows.shape[1:-1])
        if not each * len(rows):
            return
        block = max(BLOCK_NUMBERS.get(rows.device.type, 2**18) // max(*self._scatter.shape, 1), BLOCK_ROWS)
        images = max(1, block // each)
        others: Iterable[Tensor | None] = repeat(None) if other is None else torch.split(other, images)
        with torch.autocast(rows.device.type, enabled=False):
            for x, y in zip(torch.split(rows, images), others, strict=False):
                self._take(x, y, weight)

    @_plain
    def merge(self, other: CoMoments) -> CoMoments:
        """Take in another part; the result does not depend on the order of merging beyond rounding.

        Args:
            other: moments of the same widths; left as they are.

        Returns:
            self.

        Raises:
            TwoAxisError: widths do not fit.
        """
        if self._scatter.shape != other._scatter.shape or (self._other_mean is None) != (other._other_mean is None):
            raise TwoAxisError(
                f"expected moments of shape {list(self._scatter.shape)}, got {list(other._scatter.shape)}; "
                "only moments of the same layer merge"
            )
        device = self.mean.device
        self._scatter += other._scatter.to(device)
        delta, other_delta, between = self._shift(
            other.count, other.weight, other.mean.to(device), other.other_mean.to(device)
        )
        self._scatter.addr_(delta, other_delta, alpha=between)
        self._mirrored = self.paired
        return self

    @_plain
    def to(self, device: torch.device | str) -> CoMoments:
        """Move the accumulators; returns self."""
        self.mean, self._scatter = self.mean.to(device), self._scatter.to(device)
        if self._other_mean is not None:
            self._other_mean = self._other_mean.to(device)
        return self

    def _take(self, rows: Tensor, other: Tensor | None, weight: float) -> None:
        """Add the product of a block around its own means, and that of the way from the means so far."""
        dtype = self.product if _float32_is_exact() else torch.float64
        x, mean = self._centred(rows, dtype)
        y, other_mean = (x, mean) if other is None else self._centred(other, dtype)
        count = len(x) - 1
        delta, other_delta, between = self._shift(count, weight * count, mean, other_mean)
        # as one row more: a sum over [D, E] of its own would cost as much as a small product
        x[-1] = delta * math.sqrt(between / weight)
        if other is not None:
            y[-1] = other_delta * math.sqrt(between / weight)
        size = max(PRODUCT_ROWS, x.shape[1])
        parts = len(x) // size if max(self._scatter.shape) <= NARROW else 0
        if parts > 1:
            left, right = (z[: parts * size].view(parts, size, -1) for z in (x, y))
            self._scatter.add_(torch.bmm(left.mT, right).sum(0, dtype=torch.float64), alpha=weight)
            self._mirrored = self.paired
            x, y = x[parts * size :], y[parts * size :]
        for left, right in zip(torch.split(x, size), torch.split(y, size), strict=True):
            self._add_product(left, right, weight)

    def _add_product(self, x: Tensor, y: Tensor, weight: float) -> None:
        if self.paired:
            self._scatter.add_(x.T @ y, alpha=weight)
            return
        for start in range(0, x.shape[1], STRIP):
            strip = x[:, start : start + STRIP]
            self._scatter[start : start + STRIP, start:].add_(strip.T @ x[:, start:], alpha=weight)
        self._mirrored = False

    def _centred(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Copy rows to the accumulators' device, centred and with room for one more, and give their mean in float64."""
        wide = rows.dtype if rows.dtype == torch.float64 else dtype
        x = torch.empty(math.prod(rows.shape[:-1]) + 1, rows.shape[-1], dtype=wide, device=self.mean.device)
        x[:-1].view(rows.shape).copy_(rows)
        mean = x[:-1].mean(0)
        x[:-1] -= mean
        x = x.to(dtype)
        # the first mean is rounded: far from zero that is a distance, beside the spread
        rest = x[:-1].mean(0)
        x[:-1] -= rest
        return x, mean.double() + rest.double()

    def _shift(self, count: int, weight: float, mean: Tensor, other_mean: Tensor) -> tuple[Tensor, Tensor, float]:
        """Count another part and move the means.

        Returns:
            The ways from the means so far to the part's, and what their product counts in the scatter.
        """
        delta, other_delta = mean - self.mean, other_mean - self.other_mean
        total = self.weight + weight
        between = self.weight * weight / (total or 1.0)
        self.count += count
        self.mean += delta * (weight / (total or 1.0))
        if self._other_mean is not None:
            self._other_mean += other_delta * (weight / (total or 1.0))
        self.weight = total
        return delta, other_delta, between


def _float32_is_exact() -> bool:
    """Whether float32 products are of float32, not of TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # precisions that differ by backend, which torch does not sum up
        return False


def mirror(square: Tensor, size: int = 128) -> None:
    """Copy what is above the diagonal below it; in place, in tiles that the cache holds.

    Example:
        >>> square = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> mirror(square)
        >>> square.tolist()
        [[1.0, 2.0], [2.0, 3.0]]
    """
    for row in range(0, len(square), size):
        tile = square[row : row + size, row : row + size]
        tile.copy_(tile.triu() + tile.triu(1).T)
        for column in range(row + size, len(square), size):
            square[column : column + size, row : row + size] = square[row : row + size, column : column + size].T
