"""One row an image of what a layer writes: averages over positions, as exact as statistics need, or the class token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.errors import TwoAxisError, listing

Pooling = Literal["mean", "cls"]
POOLINGS = get_args(Pooling)

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
    """Pool what layers write to one row an image, batch by batch.

    Args:
        layers: names of those that are watched.
        pooling: ``"mean"`` over all positions; or ``"cls"``, of layers that write tokens the first one, which in vision
            transformers is the class token. Maps, of which no position is special, are averaged all the same.

    Example:
        >>> pooled = PooledOutputs(["0"])
        >>> pooled.begin()
        >>> pooled.add("0", torch.tensor([[[1.0], [3.0]]]))  # one image, two positions, one channel
        >>> pooled.add("0", torch.tensor([[[8.0]]]))  # the layer is called once more
        >>> pooled.finish()["0"].tolist()
        [[4.0]]
    """

    def __init__(self, layers: Iterable[str], pooling: Pooling = "mean") -> None:
        self._layers = list(layers)
        self._pooling = pooling
        self._ran: set[str] | None = None
        self._means: dict[str, tuple[Tensor, int]] = {}

    def begin(self) -> None:
        """Announce a batch; what an unfinished one gave is forgotten."""
        self._means = {}

    def add(self, name: str, view: Tensor, *, tokens: bool = False) -> None:
        """Take in what a layer wrote in a call; of several in a batch the average is over the positions of all.

        Args:
            name: the layer's.
            view: [n, P, C].
            tokens: whether positions are tokens; see :func:`writes_tokens`.
        """
        if tokens and self._pooling == "cls":
            view = view[:, :1]
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


def writes_tokens(layer: nn.Module, output: Tensor) -> bool:
    """Whether the positions of a layer's output are tokens, and not those of a map.

    Args:
        layer: that wrote it.
        output: as the layer wrote it: [n, tokens, C], sequence first, or flattened.

    Example:
        >>> layer = nn.Linear(4, 8)
        >>> writes_tokens(layer, torch.zeros(2, 197, 8)), writes_tokens(layer, torch.zeros(2, 7, 7, 8))
        (True, False)
    """
    return not isinstance(layer, _ConvNd) and output.ndim <= 3


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
