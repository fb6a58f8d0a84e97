"""Mean and variance of each channel of tensors that come one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from tp_twoaxis.statistics.moments import float64_device


class ChannelMoments:
    """Rows, mean and variance of channels, in single precision within a tensor and in double precision over them.

    Attributes:
        rows: so far.
        mean: [C] float64, on the device of the tensors where that has float64; only from the first update on.
        scatter: [C] float64, sum of squared deviations.

    Example:
        >>> moments = ChannelMoments()
        >>> for x in (torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0]])):
        ...     moments.update(x)
        >>> moments.rows, moments.mean.item(), moments.scatter.item()
        (3, 2.0, 8.0)
    """

    mean: Tensor
    scatter: Tensor

    def __init__(self) -> None:
        self.rows = 0

    def update(self, x: Tensor) -> None:
        """Add a tensor [N, C, *], whose other dimensions than the channels' are rows."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        others = [d for d in range(x.ndim) if d != 1]
        shift = x[:1].movedim(1, 0).flatten(1)[:, 0]  # so that constants have a scatter of zero
        shift = shift.reshape(1, -1, *[1] * (x.ndim - 2))
        deviation = x - shift
        mean = deviation.mean(others, keepdim=True)
        deviation -= mean
        scatter = deviation.square_().sum(others)  # half the time of torch.var
        device, rows = float64_device(x.device), x.numel() // x.shape[1]
        scatter = scatter.to(device, torch.float64)
        mean = (shift.to(device, torch.float64) + mean.to(device, torch.float64)).flatten()
        if not self.rows:
            self.mean, self.scatter = torch.zeros_like(mean), torch.zeros_like(scatter)
        total, delta = self.rows + rows, mean - self.mean
        self.scatter += scatter + self.rows * rows / total * delta.square()
        self.mean += delta * (rows / total)
        self.rows = total

    @property
    def variance(self) -> Tensor:
        """[C] float64, unbiased, as a BatchNorm counts it."""
        return self.scatter / max(self.rows - 1, 1)
