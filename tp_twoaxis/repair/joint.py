"""Joint reconstruction: two layers with a rectifier between them, fitted together to a tensor after the second one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.reconstruction.patch_fit import PatchFit, RowsFunction, TargetFunction, apply_weight
from tp_twoaxis.reconstruction.patches import rows_wanted
from tp_twoaxis.runtime.layers import (
    broadcast_channels,
    channel_axis,
    flatten_positions,
    select_channels,
    weight_blocks,
)
from tp_twoaxis.runtime.weights import add_bias, write_weight

# times that a step is halved before the first layer keeps its weights
HALVINGS = 3
# ridge of the curvature, relative to its mean diagonal, so that channels that hardly affect the second layer stay put
RIDGE = 1e-3
# images that the rounds work on at least; the others follow when they are over
FEWEST_IMAGES = 512


@dataclass(frozen=True)
class ProducerOutput:
    """The outputs of a refitted layer, traced to a tensor downstream of it.

    Attributes:
        layer: its weights are final but for corrections at sums and rectifiers.
        fit: the fit whose :meth:`PatchFit.solve` gave them; None in a rehearsal.
        inputs: the layer's input, of each chunk of images; the first of them are those of the fit.
        norm: the BatchNorm that takes its shift, if any.
        kept: [dense C_out] bool, output channels of the dense layer that it still has.
        scale: [C_out] factor from its outputs to the downstream tensor.
        rectified: its input, if that is the rectified output of another refitted layer.
    """

    layer: nn.Module
    fit: PatchFit | None
    inputs: list[Tensor]
    norm: nn.Module | None
    kept: Tensor
    scale: Tensor
    rectified: RectifiedInput | None = None

    @property
    def solved_fit(self) -> PatchFit:
        """The fit, outside rehearsals."""
        assert self.fit is not None
        return self.fit

    def downstream_change(self, x: Tensor, weight_change: Tensor, shift: Tensor) -> Tensor:
        """What a change of its weights and of its outputs' mean [C] changes downstream, for inputs ``x``."""
        delta = apply_weight(self.layer, x, weight_change)
        delta += broadcast_channels(shift, delta, self.layer)
        return delta.mul_(broadcast_channels(self.scale, delta, self.layer))


@dataclass(frozen=True)
class RectifiedInput:
    """A layer's input that is the rectified output of the layer before it.

    Attributes:
        producer: that layer, with its scale up to the rectifier.
        preactivation: the rectifier's input of each chunk, copies.
        low: the rectifier's lower bound.
        high: its upper bound.
    """

    producer: ProducerOutput
    preactivation: list[Tensor]
    low: float
    high: float

    def active(self, x: Tensor) -> Tensor:
        """Where the rectifier passes changes of its input ``x`` on, bool."""
        return (x > self.low) & (x < self.high)


def backpropagate(layer: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """Backpropagate a residual of a layer's outputs to its inputs ``x``: the transpose of the layer.

    Example:
        >>> conv, x, y = nn.Conv2d(2, 3, 3, stride=2, bias=False), torch.randn(1, 2, 7, 7), torch.randn(1, 3, 3, 3)
        >>> with torch.no_grad():
        ...     torch.allclose((backpropagate(conv, x, y) * x).sum(), (y * conv(x)).sum(), atol=1e-4)
        True
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not isinstance(layer, _ConvNd):
        return residual @ weight
    output_padding, mask = [0] * len(layer.kernel_size), (True, False, False)
    options = layer.stride, layer.padding, layer.dilation, False, output_padding, layer.groups, mask
    gradient: Tensor = torch.ops.aten.convolution_backward(residual, x, weight, None, *options)[0]
    return gradient


def has_transpose(layer: nn.Module) -> bool:
    """Whether :func:`backpropagate` can be used: linear layers, and convolutions padded with a number of zeros."""
    return not isinstance(layer, _ConvNd) or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str))


def joint_reconstruction(
    second: ProducerOutput, current: list[Tensor], dense: list[Tensor], target_fn: TargetFunction, rounds: int
) -> ProducerOutput:
    """Change a layer and the one before it in turn to bring a tensor downstream of the second closer to a target.

    A layer that lost output channels need not reproduce the dense network's remaining ones when the next layer is their
    only consumer: it may compute the features from which that layer reconstructs its target best. Each round
    backpropagates the residual through the second layer, its scale and the rectifier. A Gauss-Newton step of the first
    layer is then a least-squares fit of its patches to the backpropagated residual, divided by the curvature with
    respect to its outputs (Kronecker-factored: Martens and Grosse 2015; Grosse and Martens 2016 for convolutions). The
    step size is an exact line search as long as no rectifier switches, and halved until the error falls on the images
    that the fits hold out (on all, if they hold out none). Then the second layer is corrected for its new inputs, with
    the covariance of its old ones. A round that would not lower that error changes nothing. It takes images, no labels,
    and touches nothing but the two layers.

    The rounds work on so many of the images as have the rows that a fit wants, 512 at least. After them the other
    images follow, and the second layer is refitted to all.

    Args:
        second: with a rectified input; its weights, and those of that input's producer, are replaced.
        current: the downstream tensor of each chunk of images, laid out like the second layer's outputs; changed in
            place, as are its inputs.
        dense: the same tensors of the dense network, with the channels that the second layer lost.
        target_fn: ``(current, reference) -> target``, elementwise.
        rounds: how many.

    Returns:
        The second layer's outputs with its last fit.
    """
    pair = _JointPair(second, current, dense, target_fn)
    changed = False
    for _ in range(rounds):
        if not pair.change_first():
            break
        pair.correct_second()
        changed = True
    if not changed:
        return second
    pair.follow()
    return pair.refit_second()


class _JointPair:
    """Two layers that are fitted together.

    Attributes:
        few: numbers of the chunks that the rounds are fitted to.
        rest: of the other chunks that are fitted.
    """

    def __init__(
        self, second: ProducerOutput, current: list[Tensor], dense: list[Tensor], target_fn: TargetFunction
    ) -> None:
        assert second.rectified is not None
        self._rectified = second.rectified
        self._first, self._second = self._rectified.producer, second
        self._current, self._dense, self._target_fn = current, dense, target_fn
        held_out = second.solved_fit.held_out
        self._judges = [chunk for chunk, judges in enumerate(held_out) if judges]
        self.few, self.rest = self._divide([chunk for chunk, judges in enumerate(held_out) if not judges])
        self._weights = [_weight(producer.layer) for producer in (self._first, self._second)]
        self._both_active = self._count_active()
        self._shifts = [torch.zeros(()), torch.zeros(())]  # of each layer's outputs, since then

    def _divide(self, fitted: list[int]) -> tuple[list[int], list[int]]:
        """Divide the chunks that are fitted into those for the rounds and the rest."""
        wanted: float = FEWEST_IMAGES
        for producer, tensors in ((self._first, self._rectified.preactivation), (self._second, self._current)):
            positions = flatten_positions(tensors[0], producer.layer, len(tensors[0]), "").shape[1]
            wanted = max(wanted, rows_wanted(producer.layer) / positions)
        images = 0
        for i, chunk in enumerate(fitted):
            images += len(self._second.inputs[chunk])
            if images >= wanted:
                return fitted[: i + 1], fitted[i + 1 :]
        return fitted, []

    def change_first(self) -> bool:
        """Change the first layer; return whether a step was found that lowers the error."""
        first = self._first
        inverse = torch.linalg.inv(self._curvature()).to(self._rectified.preactivation[0])
        weight_change, shift = first.solved_fit.fit_residual(
            first.inputs, lambda chunk: self._direction(chunk, inverse), self.few
        )
        step = {
            chunk: first.downstream_change(first.inputs[chunk], weight_change, shift)
            for chunk in (*self.few, *self._judges)
        }
        size = self._line_search(step)
        if size is None:
            return False
        for chunk, delta in step.items():
            delta *= size
            self._current[chunk].copy_(self._downstream(chunk, delta))
            self._move(chunk, delta)
        old = weight_blocks(first.layer)
        write_weight(first.layer, old + size * weight_change.reshape(old.shape))
        add_bias(first.layer, size * shift, first.norm)
        self._shifts[0] = self._shifts[0] + size * shift
        return True

    def correct_second(self) -> None:
        """Change the second layer as its new inputs want it, in the chunks of the rounds."""
        second = self._second
        weight_change, shift = second.solved_fit.refine(
            second.inputs, self._current, self._dense, second.scale, self._target_fn, second.kept, self.few
        )
        self._change_second(weight_change, shift, [*self.few, *self._judges])

    def refit_second(self) -> ProducerOutput:
        """Refit the second layer to its new inputs in all chunks."""
        second, inputs = self._second, self._second.inputs
        fitted = [*self.few, *self.rest]
        fit = PatchFit(second.layer, images=sum(len(inputs[chunk]) for chunk in fitted))
        chunks = sorted((*fitted, *self._judges))
        for chunk in chunks:
            fit.update_downstream(
                inputs[chunk], self._current[chunk], self._dense[chunk], second.scale, self._target_fn,
                held_out=chunk in self._judges, kept=second.kept,
            )  # fmt: skip
        before = _weight(second.layer)
        shift = fit.solve()
        self._change_second(_weight(second.layer) - before, shift, chunks)
        return replace(second, fit=fit)

    def _change_second(self, weight_change: Tensor, shift: Tensor, chunks: Sequence[int]) -> None:
        """Write the shift that goes with the second layer's new weights, and let some chunks follow."""
        second = self._second
        add_bias(second.layer, shift, second.norm)
        self._shifts[1] = self._shifts[1] + shift
        for chunk in chunks:
            self._current[chunk] += second.downstream_change(second.inputs[chunk], weight_change, shift)

    def follow(self) -> None:
        """Bring the chunks that the rounds did not work on to what the layers compute now."""
        first, second = self._first, self._second
        change = _weight(first.layer) - self._weights[0]
        for chunk in self.rest:
            x = second.inputs[chunk]  # moved in place
            before = second.downstream_change(x, self._weights[1], torch.zeros(()))
            self._move(chunk, first.downstream_change(first.inputs[chunk], change, self._shifts[0]))
            after = second.downstream_change(x, _weight(second.layer), self._shifts[1])
            self._current[chunk] += after.sub_(before)

    def _downstream(self, chunk: int, delta: Tensor) -> Tensor:
        """The downstream tensor after a change before the rectifier."""
        layer, rectified = self._second.layer, self._rectified
        after = (rectified.preactivation[chunk] + delta).clamp_(rectified.low, rectified.high)
        change = apply_weight(layer, after.sub_(self._second.inputs[chunk]), _weight(layer))
        return change.mul_(broadcast_channels(self._second.scale, change, layer)).add_(self._current[chunk])

    def _move(self, chunk: int, delta: Tensor) -> None:
        """Change what is before and after the rectifier."""
        rectified = self._rectified
        before = rectified.preactivation[chunk].add_(delta)
        self._second.inputs[chunk].copy_(before.clamp(rectified.low, rectified.high))

    def _reference(self, chunk: int) -> Tensor:
        """The dense network's downstream tensor, of the channels that are left."""
        return select_channels(self._dense[chunk], self._second.layer, self._second.kept)

    def _line_search(self, step: dict[int, Tensor]) -> float | None:
        """Find a step size that lowers the squared error of the images held out, or of all if there are none: exact
        where no rectifier switches, then halved; None if none.
        """
        judged = {chunk: self._reference(chunk) for chunk in self._judges or self.few}
        before = numerator = denominator = 0.0
        for chunk, reference in judged.items():
            current = self._current[chunk]
            gap = self._target_fn(current, reference) - current
            change = self._downstream(chunk, step[chunk]).sub_(current)
            before += _squared_norm(gap)
            denominator += _squared_norm(change)
            numerator += float(gap.mul_(change).sum(dtype=torch.float64))
        size = numerator / denominator if denominator > 0 else 0.0
        for _ in range(HALVINGS + 1):
            if not size > 0:
                return None
            after = 0.0
            for chunk, reference in judged.items():
                moved = self._downstream(chunk, size * step[chunk])
                after += _squared_norm(self._target_fn(moved, reference) - moved)
            if after < before:
                return size
            size /= 2
        return None

    def _direction(self, chunk: int, inverse: Tensor) -> RowsFunction:
        """Find the Gauss-Newton direction of the first layer's outputs, whose curvature's inverse is given."""
        first, second, current = self._first, self._second, self._current[chunk]
        residual = self._target_fn(current, self._reference(chunk)) - current
        residual *= broadcast_channels(second.scale, residual, second.layer)
        fit, factor = first.solved_fit, first.scale.to(inverse)
        passed = fit.select_rows(backpropagate(second.layer, second.inputs[chunk], residual))
        before = fit.select_rows(self._rectified.preactivation[chunk])

        def rows(part: slice, positions: Tensor) -> Tensor:
            active = self._rectified.active(before(part, positions))
            return torch.where(active, passed(part, positions) * factor, 0.0) @ inverse

        return rows

    def _count_active(self) -> Tensor:
        """How often two channels before the rectifier are active together, a share of the positions, [C, C] float64."""
        both: Tensor | None = None
        rows = 0
        for chunk in self.few:
            x = self._rectified.preactivation[chunk]
            active = self._rectified.active(x).to(x.dtype).movedim(channel_axis(self._second.layer), -1).flatten(0, -2)
            product = (active.T @ active).double()
            both = product if both is None else both + product
            rows += len(active)
        assert both is not None
        return both / rows

    def _curvature(self) -> Tensor:
        """Kronecker-factored curvature of the squared error in the first layer's outputs, [C, C] float64.

        The taps of the second layer are taken to be uncorrelated.
        """
        taps = weight_blocks(self._second.layer).double()  # [blocks, outputs, inputs, taps]
        outer = self._second.scale.double().to(taps.device).reshape(len(taps), -1)
        blocks = torch.einsum("go,goit,gojt->gij", outer.square(), taps, taps)
        curvature: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        factor = self._first.scale.double().to(taps.device)
        curvature *= self._both_active * factor[:, None] * factor
        mean = float(curvature.diagonal().mean())
        curvature.diagonal().add_(RIDGE * mean if mean > 0 else 1.0)
        return curvature


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _squared_norm(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
