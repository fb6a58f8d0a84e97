"""Least squares over a layer's whole patches: kept channels' patches in, the dense layer's output out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.reconstruction.patch_moments import PatchMoments
from tp_twoaxis.reconstruction.patches import patch_rows, patch_size, positions_of, select_positions
from tp_twoaxis.reconstruction.ridge import RidgeFit, choose_ridge, default_ridge_fit, ridge_fit
from tp_twoaxis.runtime.layers import blocks_of, flatten_positions, select_along, weight_blocks
from tp_twoaxis.runtime.weights import write_weight
from tp_twoaxis.statistics.moments import float64_device

TargetFunction = Callable[[Tensor, Tensor], Tensor]
"""``(current, reference) -> target``, elementwise."""
RowsFunction = Callable[[slice, Tensor], Tensor]
"""``(images, positions) -> rows [images, positions, C]`` of a batch."""
BatchRows = Callable[[int], RowsFunction]
"""``batch -> (images, positions) -> rows [images, positions, C]``."""
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
        images: how many images are fitted in all, to draw so many output positions of each that about ``64 x patch``
            rows come together, within the bounds of :func:`~tp_twoaxis.reconstruction.patches.positions_of`.
        ridge: relative to the mean variance; default by the held-out images, or by the number of rows if there are
            none (:func:`~tp_twoaxis.reconstruction.affine.ridge_for`).

    Attributes:
        held_out: of each batch so far, whether its images judge instead of being fitted.

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
        self.held_out: list[bool] = []
        self._fitted: PatchMoments | None = None
        self._judging: PatchMoments | None = None
        self._seen = {False: 0, True: 0}
        self._positions = 0  # of an image's outputs
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
            elif self._judging is not None:
                self._solved = choose_ridge(self._fitted, self._judging)
            else:
                self._solved = default_ridge_fit(self._fitted)
            self._judging = None
        return self._solved

    def update(self, x: Tensor, target: Tensor, *, held_out: bool = False, kept: Tensor | None = None) -> None:
        """Accumulate a batch.

        Args:
            x: the layer's input.
            target: the output that the layer should have, shaped like its output.
            held_out: judge on these images instead of fitting them.
            kept: [channels of target] bool, those that the layer writes, where it does not write all.
        """
        weight = weight_blocks(self.layer).flatten(2)  # [blocks, outputs, patch]
        bias = self.layer.bias.detach() if isinstance(self.layer.bias, Tensor) else None
        chosen = self.select_rows(target, kept)

        def residual(part: slice, positions: Tensor, rows: Tensor) -> Tensor:
            current = torch.einsum("rgf,gof->rgo", rows, weight)
            current = current if bias is None else current + bias.reshape(len(weight), -1)
            return chosen(part, positions).reshape(current.shape) - current

        self._accumulate(x, target, residual, held_out)

    def update_downstream(
        self,
        x: Tensor,
        current: Tensor,
        reference: Tensor,
        scale: Tensor,
        target_fn: TargetFunction,
        *,
        held_out: bool = False,
        kept: Tensor | None = None,
    ) -> None:
        """Accumulate a batch whose target is that of a tensor downstream; see :meth:`refine` for the arguments."""
        rows = self._downstream_residual(current, reference, scale, target_fn, kept)
        self._accumulate(x, current, lambda part, positions, _: rows(part, positions), held_out)

    def _accumulate(
        self, x: Tensor, output: Tensor, residual: Callable[[slice, Tensor, Tensor], Tensor], held_out: bool
    ) -> None:
        """Accumulate the residual's rows, which a function makes from images, positions and patches."""
        self.held_out.append(held_out)
        self._positions = flatten_positions(output, self.layer, len(x), "").shape[1]
        blocks, outputs = weight_blocks(self.layer).shape[:2]
        moments = self._judging if held_out else self._fitted
        if moments is None:
            moments = PatchMoments(blocks, self.width, outputs, float64_device(x.device))
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.layer.weight.dtype)  # type: ignore[arg-type]
            for part, positions, rows in self._rows(x, self._positions, self._seen[held_out], self.images):
                moments.update(rows, residual(part, positions, rows).reshape(len(rows), blocks, outputs))
        self._seen[held_out] += len(x)
        if held_out:
            self._judging = moments
        else:
            self._fitted = moments

    def solve(self) -> Tensor:
        """Write the fitted weights into the layer.

        Returns:
            [C] float64, to be added to the layer's output.
        """
        self._add(self.solved.change)
        return self.solved.shift.flatten()

    def refine(
        self,
        x: Sequence[Tensor],
        current: Sequence[Tensor],
        reference: Sequence[Tensor],
        scale: Tensor,
        target_fn: TargetFunction,
        kept: Tensor | None = None,
        batches: Collection[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Change the solved weights once more, for a target of a tensor downstream of the layer's outputs.

        The downstream tensor is ``current = scale * output + c``, where c does not depend on this layer: a
        BatchNorm's shift, a shortcut. What is fitted is ``(target_fn(current, reference) - current) / scale``, with the
        covariance of :meth:`solve`, and the change goes as far as it lowers the error on the held-out images.

        Args:
            x: the layer's inputs, batch by batch as they were accumulated; any more are passed over.
            current: of each batch [n, C, *spatial] or [n, *, C], laid out as the layer's output.
            reference: the same tensors of the dense network, in the same layout.
            scale: [C]; channels of scale 0 are not changed.
            target_fn: ``(current, reference) -> target``, elementwise. If the target is the projection of ``current``
                onto the values that have the same effect downstream as ``reference`` (for a rectifier: all values
                beyond its bound, where ``reference`` is beyond it), the error downstream falls each time.
            kept: [channels of reference] bool, those that the layer writes, where it does not write all.
            batches: numbers of those to fit to, see :meth:`fit_residual`.

        Returns:
            The change of the weight, shaped like it, and of the outputs' mean [C] float64 besides.
        """
        factor = scale.to(current[0])

        def residual(i: int) -> RowsFunction:
            return self._downstream_residual(current[i], reference[i], scale, target_fn, kept)

        def judged(change: Tensor, shift: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for i, part, positions, rows in self._batches(x, held_out=True):
                output = torch.einsum("rgf,gof->rgo", rows, change).reshape(-1, positions.shape[-1], len(factor))
                now, then = self.select_rows(current[i]), self.select_rows(reference[i], kept)
                yield now(part, positions), then(part, positions), factor * (output + shift.to(output))

        with torch.autocast(current[0].device.type, enabled=False):
            change, shift = self._fit_rows(x, residual, batches)
            size = largest_useful_step(judged(change, shift), target_fn)
        self._add(size * change.mT.double())
        return size * change.reshape(self.layer.weight.shape), size * shift  # type: ignore[arg-type]

    def fit_residual(
        self, x: Sequence[Tensor], residual: BatchRows, batches: Collection[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fit a change of the layer's outputs, with the covariance that was accumulated; nothing is written.

        Args:
            x: the layer's inputs, batch by batch as they were accumulated.
            residual: what its outputs should change by; of batches held out it is not asked for.
            batches: numbers of those to fit to; default all. From fewer, more positions of each image are drawn.

        Returns:
            The change of the weight, shaped like it, and of the outputs' mean [C] float64 besides.
        """
        with torch.autocast(x[0].device.type, enabled=False):
            change, shift = self._fit_rows(x, residual, batches)
            return change.reshape(self.layer.weight.shape), shift  # type: ignore[arg-type]

    def select_rows(self, tensor: Tensor, kept: Tensor | None = None) -> RowsFunction:
        """Read rows of a tensor that is laid out as the outputs, of some of its channels."""
        view = flatten_positions(tensor, self.layer, len(tensor), "")

        def rows(part: slice, positions: Tensor) -> Tensor:
            chosen = select_positions(view[part], positions)  # positions first, so that no whole map is copied
            return chosen if kept is None else select_along(chosen, -1, kept)

        return rows

    def _downstream_residual(
        self, current: Tensor, reference: Tensor, scale: Tensor, target_fn: TargetFunction, kept: Tensor | None
    ) -> RowsFunction:
        now, then = self.select_rows(current), self.select_rows(reference, kept)
        inverse = safe_inverse(scale).to(current)

        def rows(part: slice, positions: Tensor) -> Tensor:
            chosen = now(part, positions)
            return (target_fn(chosen, then(part, positions)) - chosen) * inverse

        return rows

    def _fit_rows(
        self, x: Sequence[Tensor], residual: BatchRows, batches: Collection[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fit a residual of the fitted images' outputs: weights [blocks, outputs, patch], and means [C] float64."""
        assert self._fitted is not None
        blocks = len(self._fitted.mean)
        cross = torch.zeros_like(self._fitted.cross)
        total = torch.zeros_like(self._fitted.target_mean)
        count, batch = 0, -1
        for i, part, positions, rows in self._batches(x, held_out=False, batches=batches):
            if i != batch:
                batch, residual_rows = i, residual(i)
            chosen = residual_rows(part, positions).reshape(len(rows), blocks, -1)
            self._fitted.add_other_targets(cross, total, rows, chosen)
            count += len(rows)
        change = torch.cholesky_solve(cross * (self._fitted.count / count), self.solved.factor)
        shift = total / count - torch.einsum("bpo,bp->bo", change, self._fitted.mean)
        return change.mT.to(weight_blocks(self.layer)), shift.flatten()

    def _batches(
        self, x: Sequence[Tensor], *, held_out: bool, batches: Collection[int] | None = None
    ) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """Cut out the patches of batches that are fitted, or of those held out, as when they were accumulated.

        Of a part of the batches, more positions of each image: as many rows as all would give.
        """
        chosen = [i for i, judges in enumerate(self.held_out) if judges == held_out]
        images = self.images
        if batches is not None:
            chosen = [i for i in chosen if i in batches]
            images = sum(len(x[i]) for i in chosen)
        first = 0
        for i in chosen:
            own = x[i].to(self.layer.weight.dtype)  # type: ignore[arg-type]
            for part, positions, rows in self._rows(own, self._positions, first, images):
                yield i, part, positions, rows
            first += len(own)

    def _rows(self, x: Tensor, available: int, first: int, images: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Cut out patches [rows, blocks, patch] with their positions, so many images at a time that they stay small."""
        chosen = positions_of(self.layer, available, images, range(1)).shape[-1]
        step = max(1, CHUNK_NUMBERS // (chosen * self.width * blocks_of(self.layer)))
        for start in range(0, len(x), step):
            part = slice(start, min(start + step, len(x)))
            drawn = range(first + part.start, first + part.stop)
            positions = positions_of(self.layer, available, images, drawn).to(x.device)
            yield part, positions, patch_rows(x[part], self.layer, positions).flatten(0, 1)

    def _add(self, change: Tensor) -> None:
        old = weight_blocks(self.layer)
        write_weight(self.layer, old.double() + change.mT.reshape(old.shape).to(old.device))


def largest_useful_step(batches: Iterable[tuple[Tensor, Tensor, Tensor]], target_fn: TargetFunction) -> float:
    """Choose the part of a change of a tensor that leaves it nearest to its target: all, a half, a quarter, or none.

    Args:
        batches: of images that no fit saw: the tensor [n, ...] as it is, the dense network's, and the change; without
            any the whole change is taken.
        target_fn: ``(current, reference) -> target``.

    Example:
        >>> x, y = torch.zeros(1, 2), torch.ones(1, 2)
        >>> sizes = (1.0, 3.0, -1.0)
        >>> [largest_useful_step([(x, y, size * y)], lambda current, reference: reference) for size in sizes]
        [1.0, 0.25, 0.0]
    """
    steps = (0.0, *STEPS)
    errors, judged = dict.fromkeys(steps, 0.0), False
    for current, reference, delta in batches:
        judged = True
        for size in steps:
            after = current + size * delta if size else current
            errors[size] += float((target_fn(after, reference) - after).square().sum(dtype=torch.float64))
    return min(steps, key=errors.__getitem__) if judged else 1.0


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
