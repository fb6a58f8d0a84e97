"""Least squares over a layer's whole patches: kept channels' patches in, the dense layer's output out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.pruning.repair.fold import ridge_for, ridge_regression
from tp_twoaxis.pruning.repair.weights import blocks_of, read_weight, write_weight
from tp_twoaxis.statistics.layers import channels_last_view
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.recorder import stratified

# numbers in a patch (inputs x taps) up to which a layer is fitted: the normal equations then take 162 MiB
LARGEST_PATCH = 4608
# rows of a fit: this many a number of the patch, within these bounds
ROWS_PER_NUMBER, FEWEST_ROWS, MOST_ROWS = 64, 2**14, 2**17
# numbers of patch rows that exist at a time
CHUNK_NUMBERS = 2**24


def patch_size(layer: nn.Module) -> int:
    """Numbers that one output of a layer is computed from: inputs of its block x taps.

    Example:
        >>> patch_size(nn.Conv2d(16, 8, 3, groups=2)), patch_size(nn.Linear(5, 2))
        (72, 5)
    """
    return int(read_weight(layer)[0, 0].numel())


def patch_rows(x: Tensor, layer: nn.Module, positions: Tensor) -> Tensor:
    """Gather the patches behind some outputs of a layer, padding included.

    Args:
        x: the layer's input, [n, C, *spatial] of a convolution, [n, *, C] of a linear layer.
        layer: a convolution of 1 to 3 dimensions, any stride, padding, dilation and groups, or a linear layer.
        positions: [p] int64, output positions in row-major order.

    Returns:
        [n, p, blocks, patch] with ``patch`` ordered as in the layer's weight.

    Example:
        >>> conv, x = nn.Conv2d(2, 1, 3, padding=1, bias=False), torch.randn(4, 2, 5, 5)
        >>> rows = patch_rows(x, conv, torch.tensor([0, 7]))
        >>> torch.allclose(rows[:, :, 0] @ conv.weight.reshape(-1), conv(x).reshape(4, 25)[:, [0, 7]], atol=1e-5)
        True
    """
    if not isinstance(layer, _ConvNd):
        return channels_last_view(x, layer, len(x), "").index_select(1, positions)[:, :, None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    view = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    dimensions = len(layer.kernel_size)
    for d, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        view = view.unfold(2 + d, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # now [n, C, *out, *taps] without a copy; the positions are copied out
    places = torch.unravel_index(positions, view.shape[2 : 2 + dimensions])
    everything: tuple[slice | Tensor, ...] = (slice(None), slice(None))
    rows = view[everything + places].movedim(2, 1)  # [n, p, C, *taps]
    return rows.reshape(len(x), len(positions), layer.groups, -1)


class PatchFit:
    """Least squares for one layer's weights, accumulated batch by batch.

    What is fitted is the difference between the target and what the layer gives now, shrunk towards no change by
    a ridge. Moments are float64 [patch, patch] and [patch, outputs] for each block of the layer; they do not
    grow with the number of images, and patches exist in chunks of 64 MiB.

    Args:
        layer: its weights are the starting point; they change in :meth:`solve` alone.
        images: how many will come, to sample so many output positions of each, the same ones, that about
            ``64 x patch`` rows come together, no fewer than 16,384 and no more than 131,072.
        ridge: relative to the mean variance; default :func:`~tp_twoaxis.pruning.repair.fold.ridge_for`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> dense, layer, x = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1), torch.randn(64, 3, 8, 8)
        >>> with torch.no_grad():
        ...     fit = PatchFit(layer, images=64)
        ...     fit.update(x, dense(x))
        ...     shift = fit.solve()
        >>> torch.allclose(layer.weight, dense.weight, atol=1e-4)
        True
    """

    def __init__(self, layer: nn.Module, *, images: int, ridge: float | None = None) -> None:
        self.layer = layer
        self.images = images
        self.ridge = ridge
        self.width = patch_size(layer)
        self._moments: list[tuple[CoMoments, CoMoments]] = []

    @property
    def rows(self) -> int:
        """Rows taken in so far."""
        return self._moments[0][0].count if self._moments else 0

    def update(self, x: Tensor, target: Tensor) -> None:
        """Take in a batch.

        Args:
            x: the layer's input.
            target: what the layer should write, shaped like its output.
        """
        with torch.autocast(x.device.type, enabled=False):
            self._update(x.to(self.layer.weight.dtype), target)  # type: ignore[arg-type]

    def _update(self, x: Tensor, target: Tensor) -> None:
        y = channels_last_view(target, self.layer, len(x), "")
        wanted = min(max(ROWS_PER_NUMBER * self.width, FEWEST_ROWS), MOST_ROWS)
        available = y.shape[1]
        positions = stratified(available, min(available, max(1, -(-wanted // self.images)))).to(y.device)
        y = y.index_select(1, positions)
        weight = read_weight(self.layer).flatten(2)  # [blocks, outputs, patch]
        bias = self.layer.bias.detach() if isinstance(self.layer.bias, Tensor) else None
        blocks = len(weight)
        if not self._moments:
            device = x.device if x.device.type in ("cpu", "cuda") else torch.device("cpu")
            self._moments = [
                (CoMoments(self.width, device=device), CoMoments(self.width, weight.shape[1], device=device))
                for _ in range(blocks)
            ]
        chunk = max(1, CHUNK_NUMBERS // (len(positions) * self.width * blocks))
        for start in range(0, len(x), chunk):
            rows = patch_rows(x[start : start + chunk], self.layer, positions).flatten(0, 1)  # [rows, blocks, patch]
            now = torch.einsum("rgf,gof->rgo", rows, weight)
            now = now if bias is None else now + bias.reshape(blocks, -1)
            rest = y[start : start + chunk].reshape(len(rows), blocks, -1) - now
            for block, (inputs, cross) in enumerate(self._moments):
                inputs.update(rows[:, block])
                cross.update(rows[:, block], rest[:, block])

    def solve(self) -> Tensor:
        """Write the fitted weights into the layer.

        Returns:
            [C] float64, to be added to what the layer writes.
        """
        weights, shifts = [], []
        old = read_weight(self.layer)
        for weight, (inputs, cross) in zip(old, self._moments, strict=True):
            inputs.mirror()
            ridge = ridge_for(inputs.count, self.width) if self.ridge is None else self.ridge
            change = ridge_regression(inputs.covariance, cross.covariance, ridge)  # [patch, outputs]
            weights.append(weight.double() + change.T.reshape(weight.shape).to(weight.device))
            shifts.append(cross.other_mean - change.T @ inputs.mean)
        write_weight(self.layer, torch.stack(weights))
        return torch.cat(shifts)


def fits(layer: nn.Module, limit: int = LARGEST_PATCH) -> bool:
    """Whether a layer's patch is small enough for :class:`PatchFit`.

    Example:
        >>> fits(nn.Conv2d(512, 512, 3)), fits(nn.Conv2d(1024, 64, 3))
        (True, False)
    """
    return patch_size(layer) <= limit and blocks_of(layer) * patch_size(layer) ** 2 <= LARGEST_PATCH**2
