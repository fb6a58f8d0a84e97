"""Averages of a layer's output over the positions of an image, exact to the precision that statistics need."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError, listing

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


class PooledOutputs:
    """Average what layers write over positions, one row an image, batch by batch.

    Args:
        layers: names of those that are watched.

    Example:
        >>> pooled = PooledOutputs(["0"])
        >>> pooled.begin()
        >>> pooled.add("0", torch.tensor([[[1.0], [3.0]]]))  # one image, two positions, one channel
        >>> pooled.add("0", torch.tensor([[[8.0]]]))  # the layer is called once more
        >>> pooled.finish()["0"].tolist()
        [[4.0]]
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self._layers = list(layers)
        self._ran: set[str] | None = None
        self._means: dict[str, tuple[Tensor, int]] = {}

    def begin(self) -> None:
        """Announce a batch; what an unfinished one gave is forgotten."""
        self._means = {}

    def add(self, name: str, view: Tensor) -> None:
        """Take in what a layer wrote, [n, P, C]; of several calls in a batch the average is over all positions."""
        pooled, count = pooled_means(view), view.shape[1]
        if name in self._means:
            before, seen = self._means[name]
            pooled = (before.double() * seen + pooled.double() * count) / (seen + count)
            count += seen
        self._means[name] = (pooled, count)

    def finish(self) -> dict[str, Tensor]:
        """Close the batch.

        Returns:
            Layer -> [n, C], of those that ran.

        Raises:
            TwoAxisError: a layer ran in this batch and not in the first one, or the other way round.
        """
        means, self._means = self._means, {}
        ran = set(means)
        if self._ran is None:
            self._ran = ran
        if changing := [name for name in self._layers if (name in ran) != (name in self._ran)]:
            raise TwoAxisError(runs_in_some(changing))
        return {name: pooled for name, (pooled, _) in means.items()}


def runs_in_some(names: list[str]) -> str:
    """Say of layers that run in some batches only what to do.

    Example:
        >>> runs_in_some(["head"]).partition(",")[0]
        'head: expected a layer to run in every batch or in none'
    """
    return (
        f"{listing(names)}: expected a layer to run in every batch or in none, got both, so its statistics "
        "would be of fewer images than the others'; leave it out with layers=[...]"
    )
