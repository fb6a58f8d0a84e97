"""Averages of a layer's output over the positions of an image, exact to the precision that statistics need."""

from __future__ import annotations

import torch
from torch import Tensor

# a channel's mean over this many standard deviations of its pooled values: rounding a mean to float32 then adds less
# than 1e-10 of their variance, so that no task information below 11 nats is lost to it
FAR = 128
# positions of far channels are summed in float64 in parts of so many numbers, which stay in the cache
PART_NUMBERS = 2**17


def pooled_means(view: Tensor) -> Tensor:
    """Average over all positions.

    Sums are of float32, in pairs, and the channels whose spread over images a mean of float32 would blur are summed
    once more in float64: on a CPU that takes several times as long. On CUDA, where it does not, all are.

    Args:
        view: [n, P, C] of any float dtype and strides.

    Returns:
        [n, C] float32; or float64, where the values are, on CUDA, and where a channel needed it.

    Example:
        >>> view = torch.full((2, 3, 1), 1e4) + torch.tensor([0.0, 1e-2])[:, None, None]
        >>> pooled_means(view).dtype, pooled_means(view - 1e4).dtype
        (torch.float64, torch.float32)
    """
    if view.dtype == torch.float64 or view.device.type == "cuda":
        return view.mean(1, dtype=torch.float64)
    pooled = view.mean(1, dtype=torch.float32)
    if view.device.type != "cpu":
        return pooled
    spread, mean = torch.std_mean(pooled, 0, correction=0)
    far = (mean.abs() > FAR * spread).nonzero().ravel()
    if len(far):
        pooled = pooled.double()
        pooled[:, far] = _float64_means(view, far)
    return pooled


def _float64_means(view: Tensor, channels: Tensor) -> Tensor:
    """Means of some channels, [n, len(channels)]; each part is cut out along the layout in memory."""
    maps = view.mT if view.stride(1) == 1 else view
    axis = 1 if view.stride(1) == 1 else 2
    size = max(1, PART_NUMBERS // max(1, view.shape[1] * len(channels)))
    parts = (part.index_select(axis, channels).double().mean(3 - axis) for part in torch.split(maps, size))
    return torch.cat(list(parts))
