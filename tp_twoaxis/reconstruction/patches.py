"""Least squares over a layer's whole patches: kept channels' patches in, the dense layer's output out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.reconstruction.affine import ridge_factor, ridge_for
from tp_twoaxis.runtime.layers import blocks_of, flatten_positions, weight_blocks
from tp_twoaxis.runtime.weights import write_weight
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.sampling import stratified

TargetFunction = Callable[[Tensor, Tensor], Tensor]
"""``(current, reference) -> target``, elementwise."""
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
    return int(weight_blocks(layer)[0, 0].numel())


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
        return flatten_positions(x, layer, len(x), "").index_select(1, positions)[:, :, None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    view = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    dimensions = len(layer.kernel_size)
    for d, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        view = view.unfold(2 + d, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # the view is [n, C, *out, *taps] without a copy; only the chosen positions are copied
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
    needed = min(max(ROWS_PER_NUMBER * patch_size(layer), FEWEST_ROWS), MOST_ROWS)
    return stratified(available, min(available, max(1, -(-needed // images))))


class PatchFit:
    """Least squares for one layer's weights, accumulated batch by batch.

    What is fitted is the residual, the target less what the layer computes with its present weights, shrunk towards
    no change by a ridge. Moments are float64 [patch, patch] and [patch, outputs] for each block of the layer; they do
    not grow with the number of images, and patches exist in chunks of 64 MiB.

    Args:
        layer: its weights are the starting point; only :meth:`solve` and :meth:`refine` change them.
        images: how many will come, to sample so many output positions of each, the same ones, that about
            ``64 x patch`` rows come together, no fewer than 16,384 and no more than 131,072.
        ridge: relative to the mean variance; default :func:`~tp_twoaxis.reconstruction.affine.ridge_for`.

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
        """Rows accumulated so far."""
        return self._moments[0][0].count if self._moments else 0

    def update(self, x: Tensor, target: Tensor) -> None:
        """Accumulate a batch.

        Args:
            x: the layer's input.
            target: the output that the layer should have, shaped like its output.
        """
        with torch.autocast(x.device.type, enabled=False):
            self._update(x.to(self.layer.weight.dtype), target)  # type: ignore[arg-type]

    def _update(self, x: Tensor, target: Tensor) -> None:
        y = flatten_positions(target, self.layer, len(x), "")
        positions = self._positions(y.shape[1]).to(y.device)
        y = y.index_select(1, positions)
        weight = weight_blocks(self.layer).flatten(2)  # [blocks, outputs, patch]
        bias = self.layer.bias.detach() if isinstance(self.layer.bias, Tensor) else None
        blocks = len(weight)
        if not self._moments:
            device = x.device if x.device.type in ("cpu", "cuda") else torch.device("cpu")
            self._moments = [
                (CoMoments(self.width, device=device), CoMoments(self.width, weight.shape[1], device=device))
                for _ in range(blocks)
            ]
        for part, rows in self._rows(x, positions):
            current = torch.einsum("rgf,gof->rgo", rows, weight)
            current = current if bias is None else current + bias.reshape(blocks, -1)
            residual = y[part].reshape(len(rows), blocks, -1) - current
            for block, (inputs, cross) in enumerate(self._moments):
                inputs.update(rows[:, block])
                cross.update(rows[:, block], residual[:, block])

    def solve(self) -> Tensor:
        """Write the fitted weights into the layer.

        Returns:
            [C] float64, to be added to the layer's output.
        """
        changes, shifts = [], []
        for inputs, cross in self._moments:
            change, shift = self._solve_block(inputs.symmetrize(), cross)
            changes.append(change)
            shifts.append(shift)
        self._add(changes)
        return torch.cat(shifts)

    def refine(
        self,
        x: Tensor,
        current: Tensor,
        reference: Tensor,
        scale: Tensor,
        target_fn: TargetFunction,
        rounds: int,
    ) -> tuple[Tensor, Tensor]:
        """Change the solved weights once more, for a target of a tensor downstream of the layer's outputs.

        The downstream tensor is ``current = scale * output + c``, where c does not depend on this layer: a
        BatchNorm's shift, a shortcut. Each round fits ``(target_fn(current, reference) - current) / scale`` with the
        covariance of :meth:`solve`.

        Args:
            x: the layer's input, all images that were accumulated.
            current: [n, C, *spatial] or [n, *, C], laid out as the layer's output.
            reference: the same tensor of the dense network, in the same layout.
            scale: [C]; channels of scale 0 are not changed.
            target_fn: ``(current, reference) -> target``, elementwise. If the target is the projection of ``current``
                onto the values that have the same effect downstream as ``reference`` (for a rectifier: all values
                beyond its bound, where ``reference`` is beyond it), the error downstream falls with every round.
            rounds: at least 1.

        Returns:
            The change of the weight, shaped like it, and of the outputs' mean [C] float64 besides.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.layer.weight.dtype)  # type: ignore[arg-type]
            return self._refine(x, current, reference, scale, target_fn, rounds)

    def _refine(
        self,
        x: Tensor,
        current: Tensor,
        reference: Tensor,
        scale: Tensor,
        target_fn: TargetFunction,
        rounds: int,
    ) -> tuple[Tensor, Tensor]:
        blocks = len(self._moments)
        views = [flatten_positions(t, self.layer, len(x), "") for t in (current, reference)]
        positions = self._positions(views[0].shape[1]).to(x.device)
        # one row each: [rows, blocks, outputs]; they are few beside the patches
        current_rows, reference_rows = (
            v.index_select(1, positions).to(x.dtype).reshape(-1, blocks, len(scale) // blocks) for v in views
        )
        factor = scale.to(x.device, x.dtype).reshape(blocks, -1)
        inverse = safe_inverse(factor)
        total = torch.zeros_like(weight_blocks(self.layer).flatten(2))  # [blocks, outputs, patch]
        offset = torch.zeros(len(scale), dtype=torch.float64, device=self._moments[0][0].mean.device)
        for _ in range(rounds):
            residual = (target_fn(current_rows, reference_rows) - current_rows) * inverse
            change, shift = self._fit_rows(x, residual, positions)
            total, offset = total + change, offset + shift
            block_shift = shift.to(current_rows).reshape(blocks, -1)
            for part, rows in self._rows(x, positions):
                chosen = current_rows[part.start * len(positions) :][: len(rows)]
                chosen += factor * (torch.einsum("rgf,gof->rgo", rows, change) + block_shift)
        self._add([change.T.double() for change in total])
        return total.reshape(self.layer.weight.shape), offset  # type: ignore[arg-type]

    def fit_residual(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Fit a change of the layer's outputs, with the covariance that was accumulated; nothing is written.

        Args:
            x: the layer's input, all images that were accumulated.
            residual: what its outputs should change by, shaped like them.

        Returns:
            The change of the weight, shaped like it, and of the outputs' mean [C] float64 besides.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.layer.weight.dtype)  # type: ignore[arg-type]
            blocks = len(self._moments)
            view = flatten_positions(residual, self.layer, len(x), "")
            positions = self._positions(view.shape[1]).to(x.device)
            chosen = view.index_select(1, positions).reshape(-1, blocks, view.shape[2] // blocks)
            change, shift = self._fit_rows(x, chosen, positions)
            return change.reshape(self.layer.weight.shape), shift  # type: ignore[arg-type]

    def _fit_rows(self, x: Tensor, residual: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Fit [rows, blocks, outputs] to the patches at some positions: weights [blocks, outputs, patch], and means."""
        sums = [CoMoments(self.width, residual.shape[2], device=m.mean.device) for m, _ in self._moments]
        for part, rows in self._rows(x, positions):
            chosen = residual[part.start * len(positions) :][: len(rows)]
            for block, cross in enumerate(sums):
                cross.update(rows[:, block], chosen[:, block])
        fitted = [self._solve_block(inputs, cross) for (inputs, _), cross in zip(self._moments, sums, strict=True)]
        change = torch.stack([change.T for change, _ in fitted]).to(weight_blocks(self.layer))
        return change, torch.cat([shift for _, shift in fitted])

    def _positions(self, available: int) -> Tensor:
        return positions_for(self.layer, available, self.images)

    def _rows(self, x: Tensor, positions: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Cut out patches, [rows, blocks, patch], so many images at a time that they stay within bounds."""
        chunk = max(1, CHUNK_NUMBERS // (len(positions) * self.width * blocks_of(self.layer)))
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            yield part, patch_rows(x[part], self.layer, positions).flatten(0, 1)

    def _solve_block(self, inputs: CoMoments, cross: CoMoments) -> tuple[Tensor, Tensor]:
        """Solve for a change of one block's weights [patch, outputs] and of its outputs' means [outputs]."""
        key = id(inputs)
        if key not in self._factors:
            ridge = ridge_for(inputs.count, self.width) if self.ridge is None else self.ridge
            self._factors[key] = ridge_factor(inputs.covariance, ridge)
        factor = self._factors[key]
        change = torch.zeros_like(cross.scatter) if factor is None else torch.cholesky_solve(cross.covariance, factor)
        return change, cross.other_mean - change.T @ inputs.mean

    def _add(self, changes: list[Tensor]) -> None:
        old = weight_blocks(self.layer)
        weights = [w.double() + c.T.reshape(w.shape).to(w.device) for w, c in zip(old, changes, strict=True)]
        write_weight(self.layer, torch.stack(weights))


def safe_inverse(scale: Tensor) -> Tensor:
    """Invert elementwise; 0 for elements below a millionth of the largest, in absolute value.

    Example:
        >>> safe_inverse(torch.tensor([2.0, 0.0, -0.5])).tolist()
        [0.5, 0.0, -2.0]
    """
    usable = scale.abs() > 1e-6 * scale.abs().max()
    return torch.where(usable, 1.0 / torch.where(usable, scale, 1.0), 0.0)


def fits(layer: nn.Module, limit: int = LARGEST_PATCH) -> bool:
    """Whether a layer's patch is small enough for :class:`PatchFit`.

    Example:
        >>> fits(nn.Conv2d(512, 512, 3)), fits(nn.Conv2d(1024, 64, 3))
        (True, False)
    """
    return patch_size(layer) <= limit and blocks_of(layer) * patch_size(layer) ** 2 <= LARGEST_PATCH**2
