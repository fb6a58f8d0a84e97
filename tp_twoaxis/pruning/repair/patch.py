"""Least squares over a layer's whole patches: kept channels' patches in, the dense layer's output out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.damping import damped_factor
from tp_twoaxis.pruning.repair.fold import ridge_for
from tp_twoaxis.pruning.repair.weights import blocks_of, read_weight, write_weight
from tp_twoaxis.statistics.layers import channels_last_view
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.recorder import stratified

Aim = Callable[[Tensor, Tensor], Tensor]
# numbers in a patch (inputs x taps) up to which a layer is fitted: the normal equations then take 162 MiB, and
# their factor as much; of sequential repair up to three such layers are alive at a time
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


def positions_for(layer: nn.Module, available: int, images: int) -> Tensor:
    """Choose output positions of a layer, the same ones of so many images, for :class:`PatchFit`'s number of rows.

    Example:
        >>> positions_for(nn.Conv2d(4, 4, 3), 64, 512).shape, positions_for(nn.Conv2d(64, 4, 3), 64, 512).shape
        (torch.Size([32]), torch.Size([64]))
    """
    wanted = min(max(ROWS_PER_NUMBER * patch_size(layer), FEWEST_ROWS), MOST_ROWS)
    return stratified(available, min(available, max(1, -(-wanted // images))))


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
        self._factors: dict[int, Tensor | None] = {}

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
        positions = self._positions(y.shape[1]).to(y.device)
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
        for part, rows in self._rows(x, positions):
            now = torch.einsum("rgf,gof->rgo", rows, weight)
            now = now if bias is None else now + bias.reshape(blocks, -1)
            rest = y[part].reshape(len(rows), blocks, -1) - now
            for block, (inputs, cross) in enumerate(self._moments):
                inputs.update(rows[:, block])
                cross.update(rows[:, block], rest[:, block])

    def solve(self) -> Tensor:
        """Write the fitted weights into the layer.

        Returns:
            [C] float64, to be added to what the layer writes.
        """
        changes, shifts = [], []
        for inputs, cross in self._moments:
            change, shift = self._change(inputs.mirror(), cross)
            changes.append(change)
            shifts.append(shift)
        self._add(changes)
        return torch.cat(shifts)

    def refine(
        self, x: Tensor, now: Tensor, wanted: Tensor, scale: Tensor, aim: Aim, rounds: int
    ) -> tuple[Tensor, Tensor]:
        """Change the solved weights once more, by what became of the layer's outputs further on.

        Further on means ``now = scale * output + rest``, where the rest does not depend on this layer: a BatchNorm's
        shift, a shortcut. Each round fits ``(aim(now, wanted) - now) / scale`` with the covariance of :meth:`solve`.

        Args:
            x: the layer's input, all images that were taken in.
            now: [n, C, *spatial] or [n, *, C], laid out as the layer's output.
            wanted: likewise; what ``now`` was in the dense network.
            scale: [C]; channels of scale 0 are left alone.
            aim: ``(now, wanted) -> target``, elementwise. Where the target is a projection of ``wanted``'s kind that
                only moves ``now`` as far as it must (a rectifier's), the error falls with every round.
            rounds: at least 1.

        Returns:
            The change of the weight, shaped like it, and of the outputs' mean [C] float64 besides.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self._refine(x.to(self.layer.weight.dtype), now, wanted, scale, aim, rounds)  # type: ignore[arg-type]

    def _refine(
        self, x: Tensor, now: Tensor, wanted: Tensor, scale: Tensor, aim: Aim, rounds: int
    ) -> tuple[Tensor, Tensor]:
        blocks = len(self._moments)
        views = [channels_last_view(t, self.layer, len(x), "") for t in (now, wanted)]
        positions = self._positions(views[0].shape[1]).to(x.device)
        # one row each: [rows, blocks, outputs]; they are few beside the patches
        current, goal = (
            v.index_select(1, positions).to(x.dtype).reshape(-1, blocks, len(scale) // blocks) for v in views
        )
        factor = scale.to(x.device, x.dtype).reshape(blocks, -1)
        usable = factor.abs() > 1e-6 * factor.abs().max()
        inverse = torch.where(usable, 1.0 / torch.where(usable, factor, 1.0), 0.0)
        total = torch.zeros_like(read_weight(self.layer).flatten(2))  # [blocks, outputs, patch]
        offset = torch.zeros(len(scale), dtype=torch.float64, device=self._moments[0][0].mean.device)
        for _ in range(rounds):
            step, shift = self._fit_rest(x, (aim(current, goal) - current) * inverse, positions)
            total, offset = total + step, offset + shift
            moved = shift.to(current).reshape(blocks, -1)
            for part, rows in self._rows(x, positions):
                chosen = current[part.start * len(positions) :][: len(rows)]
                chosen += factor * (torch.einsum("rgf,gof->rgo", rows, step) + moved)
        self._add([change.T.double() for change in total])
        return total.reshape(self.layer.weight.shape), offset  # type: ignore[arg-type]

    def change_for(self, x: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Fit a change of the layer's outputs, with the covariance of what was taken in; nothing is written.

        Args:
            x: the layer's input, all images that were taken in.
            rest: what its outputs should change by, shaped like them.

        Returns:
            The change of the weight, shaped like it, and of the outputs' mean [C] float64 besides.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self._change_for(x.to(self.layer.weight.dtype), rest)  # type: ignore[arg-type]

    def _change_for(self, x: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        blocks = len(self._moments)
        view = channels_last_view(rest, self.layer, len(x), "")
        positions = self._positions(view.shape[1]).to(x.device)
        chosen = view.index_select(1, positions).reshape(-1, blocks, view.shape[2] // blocks)
        step, shift = self._fit_rest(x, chosen, positions)
        return step.reshape(self.layer.weight.shape), shift  # type: ignore[arg-type]

    def _fit_rest(self, x: Tensor, rest: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Fit [rows, blocks, outputs] to the patches at some positions: weights [blocks, outputs, patch], and means."""
        sums = [CoMoments(self.width, rest.shape[2], device=m.mean.device) for m, _ in self._moments]
        for part, rows in self._rows(x, positions):
            chosen = rest[part.start * len(positions) :][: len(rows)]
            for block, cross in enumerate(sums):
                cross.update(rows[:, block], chosen[:, block])
        fitted = [self._change(inputs, cross) for (inputs, _), cross in zip(self._moments, sums, strict=True)]
        step = torch.stack([change.T for change, _ in fitted]).to(read_weight(self.layer))
        return step, torch.cat([shift for _, shift in fitted])

    def _positions(self, available: int) -> Tensor:
        return positions_for(self.layer, available, self.images)

    def _rows(self, x: Tensor, positions: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Cut out patches, [rows, blocks, patch], so many images at a time that they stay within bounds."""
        chunk = max(1, CHUNK_NUMBERS // (len(positions) * self.width * blocks_of(self.layer)))
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            yield part, patch_rows(x[part], self.layer, positions).flatten(0, 1)

    def _change(self, inputs: CoMoments, cross: CoMoments) -> tuple[Tensor, Tensor]:
        """Solve for a change of one block's weights [patch, outputs] and of its outputs' means [outputs]."""
        key = id(inputs)
        if key not in self._factors:
            ridge = ridge_for(inputs.count, self.width) if self.ridge is None else self.ridge
            self._factors[key] = damped_factor(inputs.covariance, ridge)
        factor = self._factors[key]
        change = torch.zeros_like(cross.scatter) if factor is None else torch.cholesky_solve(cross.covariance, factor)
        return change, cross.other_mean - change.T @ inputs.mean

    def _add(self, changes: list[Tensor]) -> None:
        old = read_weight(self.layer)
        weights = [w.double() + c.T.reshape(w.shape).to(w.device) for w, c in zip(old, changes, strict=True)]
        write_weight(self.layer, torch.stack(weights))


def fits(layer: nn.Module, limit: int = LARGEST_PATCH) -> bool:
    """Whether a layer's patch is small enough for :class:`PatchFit`.

    Example:
        >>> fits(nn.Conv2d(512, 512, 3)), fits(nn.Conv2d(1024, 64, 3))
        (True, False)
    """
    return patch_size(layer) <= limit and blocks_of(layer) * patch_size(layer) ** 2 <= LARGEST_PATCH**2
