"""Least squares over a layer's whole patches: kept channels' patches in, the dense layer's output out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.reconstruction.patch_moments import PatchMoments
from tp_twoaxis.reconstruction.patches import patch_rows, patch_size, positions_of, select_positions
from tp_twoaxis.reconstruction.ridge import RidgeFit, choose_ridge, default_ridge_fit, ridge_fit
from tp_twoaxis.runtime.layers import blocks_of, broadcast_channels, flatten_positions, weight_blocks
from tp_twoaxis.runtime.weights import write_weight
from tp_twoaxis.statistics.moments import float64_device

TargetFunction = Callable[[Tensor, Tensor], Tensor]
"""``(current, reference) -> target``, elementwise."""
# numbers of patch rows that exist at a time
CHUNK_NUMBERS = 2**24
# a change is tried whole, by halves and by quarters before it is dropped
STEPS = (1.0, 0.5, 0.25)


class PatchFit:
    """Least squares for one layer's weights, accumulated batch by batch and judged on images that it does not fit.

    What is fitted is the residual, the target less what the layer computes with its present weights, shrunk towards
    no change by a ridge. The ridge is the one whose fit has the least error on held-out images
    (:func:`~tp_twoaxis.reconstruction.ridge.choose_ridge`). Moments are float64 [blocks, patch, patch] and [blocks,
    patch, outputs], twice; they do not grow with the number of images, and patches exist in chunks of 64 MiB.

    Args:
        layer: its weights are the starting point; only :meth:`solve` and :meth:`refine` change them.
        images: how many images are fitted, to draw so many output positions of each that about ``64 x patch`` rows come
            together, no fewer than 16,384 and no more than 131,072.
        ridge: relative to the mean variance; default by the held-out images, or by the number of rows if there are
            none (:func:`~tp_twoaxis.reconstruction.affine.ridge_for`).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> dense, layer, x = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1), torch.randn(64, 3, 8, 8)
        >>> with torch.no_grad():
        ...     fit = PatchFit(layer, images=48)
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
        self._fitted: PatchMoments | None = None
        self._held_out: PatchMoments | None = None
        self._seen = {False: 0, True: 0}
        self._solved: RidgeFit | None = None

    @property
    def rows(self) -> int:
        """Rows fitted so far."""
        return 0 if self._fitted is None else self._fitted.count

    @property
    def solved(self) -> RidgeFit:
        """The solution of what was accumulated so far, from when it was first asked for."""
        if self._solved is None:
            assert self._fitted is not None
            if self.ridge is not None:
                self._solved = ridge_fit(self._fitted.symmetrize(), self.ridge)
            elif self._held_out is not None:
                self._solved = choose_ridge(self._fitted, self._held_out)
            else:
                self._solved = default_ridge_fit(self._fitted)
            self._held_out = None
        return self._solved

    def update(self, x: Tensor, target: Tensor, *, held_out: bool = False) -> None:
        """Accumulate a batch.

        Args:
            x: the layer's input.
            target: the output that the layer should have, shaped like its output.
            held_out: judge on these images instead of fitting them.
        """
        if not len(x):
            return
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.layer.weight.dtype)  # type: ignore[arg-type]
            moments = self._accumulate(self._held_out if held_out else self._fitted, x, target, self._seen[held_out])
            self._seen[held_out] += len(x)
            if held_out:
                self._held_out = moments
            else:
                self._fitted = moments

    def update_all(self, x: Tensor, target: Tensor) -> None:
        """Accumulate all images at once: the first ``images`` are fitted, the others held out."""
        self.update(x[: self.images], target[: self.images])
        self.update(x[self.images :], target[self.images :], held_out=True)

    def _accumulate(self, moments: PatchMoments | None, x: Tensor, target: Tensor, first: int) -> PatchMoments:
        y = flatten_positions(target, self.layer, len(x), "")
        weight = weight_blocks(self.layer).flatten(2)  # [blocks, outputs, patch]
        bias = self.layer.bias.detach() if isinstance(self.layer.bias, Tensor) else None
        blocks, outputs = weight.shape[:2]
        if moments is None:
            device = float64_device(x.device)
            moments = PatchMoments(blocks, self.width, outputs, device)
        for part, positions, rows in self._rows(x, y.shape[1], first):
            current = torch.einsum("rgf,gof->rgo", rows, weight)
            current = current if bias is None else current + bias.reshape(blocks, -1)
            chosen = select_positions(y[part], positions).reshape(len(rows), blocks, -1)
            moments.update(rows, chosen - current)
        return moments

    def solve(self) -> Tensor:
        """Write the fitted weights into the layer.

        Returns:
            [C] float64, to be added to the layer's output.
        """
        self._add(self.solved.change)
        return self.solved.shift.flatten()

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
        covariance of :meth:`solve`, and goes as far as that lowers the error on the held-out images.

        Args:
            x: the layer's input: the images that were fitted, in their order, then those held out.
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
        x = x.to(self.layer.weight.dtype)  # type: ignore[arg-type]
        layer, fitted, held_out = self.layer, slice(0, self.images), slice(self.images, None)
        inverse = broadcast_channels(safe_inverse(scale), current, layer)
        factor = broadcast_channels(scale, current, layer)
        total = torch.zeros_like(weight_blocks(layer).flatten(2))  # [blocks, outputs, patch]
        offset = torch.zeros(len(scale), dtype=torch.float64, device=self.solved.shift.device)
        parts = {part.start: current[part] for part in (fitted, held_out)}

        def change_of(part: slice, change: Tensor, shift: Tensor) -> Tensor:
            output = apply_weight(layer, x[part], change.reshape(layer.weight.shape))  # type: ignore[arg-type]
            return factor * (output + broadcast_channels(shift, output, layer))

        with torch.autocast(x.device.type, enabled=False):
            for round_ in range(rounds):
                now, later = parts[fitted.start], parts[held_out.start]
                residual = (target_fn(now, reference[fitted]) - now) * inverse
                change, shift = self._fit_rows(x[fitted], residual)
                size, delta = 1.0, torch.zeros(0)
                if len(later):
                    delta = change_of(held_out, change, shift)
                    size = largest_useful_step(later, reference[held_out], delta, target_fn)
                if size == 0.0:
                    break
                total, offset = total + size * change, offset + size * shift
                if round_ + 1 < rounds:
                    parts[fitted.start] = now + size * change_of(fitted, change, shift)
                    parts[held_out.start] = later + size * delta if len(later) else later
        self._add(total.mT.double())
        return total.reshape(layer.weight.shape), offset  # type: ignore[arg-type]

    def fit_residual(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Fit a change of the layer's outputs, with the covariance that was accumulated; nothing is written.

        Args:
            x: the layer's input, at least all images that were fitted, in their order.
            residual: what its outputs should change by, shaped like them.

        Returns:
            The change of the weight, shaped like it, and of the outputs' mean [C] float64 besides.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x[: self.images].to(self.layer.weight.dtype)  # type: ignore[arg-type]
            change, shift = self._fit_rows(x, residual[: self.images])
            return change.reshape(self.layer.weight.shape), shift  # type: ignore[arg-type]

    def _fit_rows(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Fit a residual of the fitted images' outputs: weights [blocks, outputs, patch], and means [C] float64."""
        assert self._fitted is not None
        y = flatten_positions(residual, self.layer, len(x), "")
        blocks = len(self._fitted.mean)
        cross = torch.zeros_like(self._fitted.cross)
        total = torch.zeros_like(self._fitted.target_mean)
        for part, positions, rows in self._rows(x, y.shape[1], 0):
            chosen = select_positions(y[part], positions).reshape(len(rows), blocks, -1)
            self._fitted.add_other_targets(cross, total, rows, chosen)
        change = torch.cholesky_solve(cross, self.solved.factor)
        shift = total / self._fitted.count - torch.einsum("bpo,bp->bo", change, self._fitted.mean)
        return change.mT.to(weight_blocks(self.layer)), shift.flatten()

    def _rows(self, x: Tensor, available: int, first: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Cut out patches [rows, blocks, patch] with their positions, so many images at a time that they stay small."""
        chosen = positions_of(self.layer, available, self.images, range(1)).shape[-1]
        step = max(1, CHUNK_NUMBERS // (chosen * self.width * blocks_of(self.layer)))
        for start in range(0, len(x), step):
            part = slice(start, min(start + step, len(x)))
            drawn = range(first + part.start, first + part.stop)
            positions = positions_of(self.layer, available, self.images, drawn).to(x.device)
            yield part, positions, patch_rows(x[part], self.layer, positions).flatten(0, 1)

    def _add(self, change: Tensor) -> None:
        old = weight_blocks(self.layer)
        write_weight(self.layer, old.double() + change.mT.reshape(old.shape).to(old.device))


def largest_useful_step(current: Tensor, reference: Tensor, delta: Tensor, target_fn: TargetFunction) -> float:
    """Choose the part of a change of a tensor that leaves it nearest to its target: all, a half, a quarter, or none.

    Args:
        current: [n, ...], of images that no fit saw; without any the whole change is taken.
        reference: the dense network's.
        delta: the change.
        target_fn: ``(current, reference) -> target``.

    Example:
        >>> x, y = torch.zeros(1, 2), torch.ones(1, 2)
        >>> [largest_useful_step(x, y, step * y, lambda current, reference: reference) for step in (1.0, 3.0, -1.0)]
        [1.0, 0.25, 0.0]
    """
    if not len(current):
        return 1.0

    def error(size: float) -> float:
        after = current + size * delta if size else current
        return float((target_fn(after, reference) - after).square().sum(dtype=torch.float64))

    best, least = 0.0, error(0.0)
    for size in STEPS:
        if (now := error(size)) < least:
            best, least = size, now
    return best


def apply_weight(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Run a layer with another weight and no bias."""
    if not isinstance(layer, _ConvNd):
        return F.linear(x, weight)
    return layer._conv_forward(x, weight, None)


def safe_inverse(scale: Tensor) -> Tensor:
    """Invert elementwise; 0 for elements below a millionth of the largest, in absolute value.

    Example:
        >>> safe_inverse(torch.tensor([2.0, 0.0, -0.5])).tolist()
        [0.5, 0.0, -2.0]
    """
    usable = scale.abs() > 1e-6 * scale.abs().max()
    return torch.where(usable, 1.0 / torch.where(usable, scale, 1.0), 0.0)
