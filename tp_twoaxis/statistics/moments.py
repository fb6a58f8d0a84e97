"""Mergeable first and second moments in float64 (Chan, Golub & LeVeque 1983)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError

F = TypeVar("F", bound=Callable[..., Any])

# rows are converted to float64 in blocks of about this many numbers: large enough for BLAS, small enough for the cache
BLOCK_NUMBERS = {"cpu": 2**18, "cuda": 2**25}


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
    covariance matrix. All arithmetic is float64, whatever the rows' dtype; the block size in which rows
    are taken in decides memory only. A row may stand for several: one of 4 positions that were sampled of an image's 64
    has weight 16, so that parts sampled at different rates merge as their images, not as their rows.

    Args:
        width: D, numbers in a row.
        other_width: E, numbers in the paired row, or None for the rows themselves; 0 keeps count and mean alone.
        device: where the accumulators live; needs float64.

    Attributes:
        count: rows seen.
        weight: rows that these stand for, the sum of their weights.
        mean: [D] float64.
        other_mean: [E] float64; ``mean`` itself when paired with itself.
        scatter: [D, E] float64, sum of ``weight (x - mean)(y - other_mean)'``.

    Example:
        >>> moments = CoMoments(2)
        >>> moments.update(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        >>> moments.count, moments.mean.tolist(), moments.covariance.tolist()
        (2, [1.0, 2.0], [[1.0, 2.0], [2.0, 4.0]])
    """

    @_plain
    def __init__(self, width: int, other_width: int | None = None, *, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.weight = 0.0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._other_mean = None if other_width is None else torch.zeros(other_width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(
            width, width if other_width is None else other_width, dtype=torch.float64, device=device
        )

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
        moments.count, moments.mean, moments.scatter = count, mean, scatter
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
        numbers = rows[:1].numel() + (0 if other is None else other[:1].numel())
        block = max(1, BLOCK_NUMBERS.get(rows.device.type, 2**18) // max(numbers, 1))
        for start in range(0, len(rows), block):
            x = self._float64(rows[start : start + block])
            y = x if other is None else self._float64(other[start : start + block])
            mean = x.mean(0)
            x -= mean
            other_mean = mean
            if other is not None:
                other_mean = y.mean(0)
                y -= other_mean
            # in place: for wide layers a second [D, E] costs more than the product
            self.scatter.addmm_(x.T, y, alpha=weight)
            self._shift(len(x), weight * len(x), mean, other_mean)

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
        if self.scatter.shape != other.scatter.shape or (self._other_mean is None) != (other._other_mean is None):
            raise TwoAxisError(
                f"expected moments of shape {list(self.scatter.shape)}, got {list(other.scatter.shape)}; "
                "only moments of the same layer merge"
            )
        device = self.mean.device
        self.scatter += other.scatter.to(device)
        self._shift(other.count, other.weight, other.mean.to(device), other.other_mean.to(device))
        return self

    @_plain
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> CoMoments:
        """Merge over the ranks of ``torch.distributed``; every rank ends with the same moments.

        Returns:
            self, unchanged when no process group is initialised.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        nccl = dist.get_backend(group) == "nccl"  # collectives then need CUDA tensors
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        means = [self.mean] if self._other_mean is None else [self.mean, self._other_mean]
        own = torch.cat(means).to(device)
        # first the weights and the means, then the scatters around the common means: no cancellation
        sums = torch.cat([own.new_tensor([float(self.count), self.weight]), own * self.weight])
        dist.all_reduce(sums, group=group)
        total, weight = int(sums[0]), float(sums[1])
        common = sums[2:] / (weight or 1.0)
        shift = own - common
        left = shift[: len(self.mean)]
        right = left if self._other_mean is None else shift[len(self.mean) :]
        scatter = self.scatter.to(device) + self.weight * torch.outer(left, right)
        dist.all_reduce(scatter, group=group)
        home = self.mean.device
        self.count, self.weight, self.scatter = total, weight, scatter.to(home)
        self.mean = common[: len(self.mean)].to(home)
        if self._other_mean is not None:
            self._other_mean = common[len(self.mean) :].to(home)
        return self

    @_plain
    def symmetrize(self) -> CoMoments:
        """Make a symmetric scatter so to the last bit (products round its halves apart); returns self."""
        if not self.paired:
            self.scatter = self.scatter.triu() + self.scatter.triu(1).T
        return self

    @_plain
    def to(self, device: torch.device | str) -> CoMoments:
        """Move the accumulators; returns self."""
        self.mean, self.scatter = self.mean.to(device), self.scatter.to(device)
        if self._other_mean is not None:
            self._other_mean = self._other_mean.to(device)
        return self

    def _float64(self, rows: Tensor) -> Tensor:
        """Give a fresh float64 copy [n, width] on the accumulators' device: the caller's rows stay as they are."""
        fresh = rows.to(self.mean.device, torch.float64, copy=True, memory_format=torch.contiguous_format)
        return fresh.flatten(0, -2)

    def _shift(self, count: int, weight: float, mean: Tensor, other_mean: Tensor) -> None:
        """Account for the distance between the means of two parts whose scatters were added."""
        self.count += count
        if weight == 0.0:
            return
        total = self.weight + weight
        delta = mean - self.mean
        other_delta = other_mean - self.other_mean
        self.scatter.addr_(delta, other_delta, alpha=self.weight * weight / total)
        self.mean += delta * (weight / total)
        if self._other_mean is not None:
            self._other_mean += other_delta * (weight / total)
        self.weight = total
