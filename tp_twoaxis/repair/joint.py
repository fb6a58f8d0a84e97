"""Joint reconstruction: two layers with a rectifier between them, fitted together to a tensor after the second one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.reconstruction.patch_fit import PatchFit, TargetFunction, apply_weight, safe_inverse
from tp_twoaxis.runtime.layers import broadcast_channels, channel_axis, weight_blocks
from tp_twoaxis.runtime.weights import add_bias, write_weight

# times that a step is halved before the first layer keeps its weights
HALVINGS = 3
# ridge of the curvature, relative to its mean diagonal, so that channels that hardly affect the second layer stay put
RIDGE = 1e-3


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

    def active(self, chunk: int) -> Tensor:
        """Where the rectifier passes changes on, bool."""
        x = self.preactivation[chunk]
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
    second: ProducerOutput,
    current: list[Tensor],
    reference: Sequence[Tensor],
    target_fn: TargetFunction,
    rounds: int,
) -> ProducerOutput:
    """Change a layer and the one before it in turn to bring a tensor downstream of the second closer to a target.

    A layer that lost output channels need not reproduce the dense network's remaining ones when the next layer is their
    only consumer: it may compute the features from which that layer reconstructs its target best. Each round
    backpropagates the residual through the second layer, its scale and the rectifier. A Gauss-Newton step of the first
    layer is then a least-squares fit of its patches to the backpropagated residual, divided by the curvature with
    respect to its outputs (Kronecker-factored: Martens and Grosse 2015; Grosse and Martens 2016 for convolutions). The
    step size is an exact line search as long as no rectifier switches, and halved until the error falls on the images
    that the fits hold out (on all, if they hold out none). Then the second layer is refitted to its new inputs. A round
    that would not lower that error changes nothing. It takes images, no labels, and touches nothing but the two layers.

    Args:
        second: with a rectified input; its weights, and those of that input's producer, are replaced.
        current: the downstream tensor of each chunk of images, laid out like the second layer's outputs; changed in
            place, as are its inputs.
        reference: the same tensors of the dense network.
        target_fn: ``(current, reference) -> target``, elementwise.
        rounds: how many.

    Returns:
        The second layer's outputs with its last fit.
    """
    rectified = second.rectified
    assert rectified is not None
    reference = list(reference)
    for _ in range(rounds):
        if not _gauss_newton_step(second, rectified, current, reference, target_fn):
            break
        second = _refit_second(second, current, reference, target_fn)
    return second


@dataclass(frozen=True)
class _Step:
    """A step of the first layer's outputs by ``delta``, with its effect downstream."""

    second: ProducerOutput
    rectified: RectifiedInput
    current: list[Tensor]
    delta: list[Tensor]

    def inputs(self, chunk: int, size: float) -> Tensor:
        """The second layer's inputs after so much of the step."""
        after = self.rectified.preactivation[chunk] + size * self.delta[chunk]
        return after.clamp(self.rectified.low, self.rectified.high)

    def downstream(self, chunk: int, size: float) -> Tensor:
        """The downstream tensor after so much of the step."""
        layer, current = self.second.layer, self.current[chunk]
        input_delta = self.inputs(chunk, size) - self.second.inputs[chunk]
        scale = broadcast_channels(self.second.scale, current, layer)
        return current + scale * apply_weight(layer, input_delta, _weight(layer))


def _gauss_newton_step(
    second: ProducerOutput,
    rectified: RectifiedInput,
    current: list[Tensor],
    reference: list[Tensor],
    target_fn: TargetFunction,
) -> bool:
    """Change the first layer; return whether a step was found that lowers the error."""
    first, preactivation = rectified.producer, rectified.preactivation
    direction = _direction(second, rectified, current, reference, target_fn)
    weight_change, shift = first.solved_fit.fit_residual(first.inputs, direction)
    delta = direction  # emptied on the way: the part of the direction that the first layer can take replaces it
    factor = broadcast_channels(first.scale, preactivation[0], first.layer)
    for chunk, x in enumerate(first.inputs):
        output = apply_weight(first.layer, x, weight_change)
        delta[chunk] = factor * (output + broadcast_channels(shift, output, first.layer))
    step = _Step(second, rectified, current, delta)
    size = _line_search(step, reference, target_fn)
    if size is None:
        return False
    for chunk, tensor in enumerate(current):
        tensor.copy_(step.downstream(chunk, size))
        second.inputs[chunk].copy_(step.inputs(chunk, size))
        preactivation[chunk].add_(delta[chunk], alpha=size)
    old = weight_blocks(first.layer)
    write_weight(first.layer, old + size * weight_change.reshape(old.shape))
    add_bias(first.layer, size * shift, first.norm)
    return True


def _fitted(producer: ProducerOutput) -> list[int]:
    """The chunks that a layer's fit was made from."""
    return [chunk for chunk, held_out in enumerate(producer.solved_fit.held_out) if not held_out]


def _line_search(step: _Step, reference: list[Tensor], target_fn: TargetFunction) -> float | None:
    """Find a step size that lowers the squared error of images held out: exact for those fitted where no rectifier
    switches, then halved; None if none.
    """
    fitted = _fitted(step.rectified.producer)
    numerator = denominator = 0.0
    for chunk in fitted:
        current = step.current[chunk]
        change = step.downstream(chunk, 1.0) - current
        denominator += _squared_norm(change)
        numerator += float(((target_fn(current, reference[chunk]) - current) * change).sum(dtype=torch.float64))
    size = numerator / denominator if denominator > 0 else 0.0
    judged = [chunk for chunk, held_out in enumerate(step.second.solved_fit.held_out) if held_out] or fitted

    def error(size: float) -> float:
        pairs = ((step.downstream(chunk, size) if size else step.current[chunk], reference[chunk]) for chunk in judged)
        return sum(_squared_norm(target_fn(after, dense) - after) for after, dense in pairs)

    before = error(0.0)
    for _ in range(HALVINGS + 1):
        if not size > 0:
            return None
        if error(size) < before:
            return size
        size /= 2
    return None


def _direction(
    second: ProducerOutput,
    rectified: RectifiedInput,
    current: list[Tensor],
    reference: list[Tensor],
    target_fn: TargetFunction,
) -> list[Tensor]:
    """Find the Gauss-Newton direction of the first layer's outputs, for the images that are fitted; else nothing."""
    layer, first, preactivation = second.layer, rectified.producer, rectified.preactivation
    scale = broadcast_channels(second.scale, current[0], layer)
    factor = broadcast_channels(first.scale, preactivation[0], first.layer)
    axis = channel_axis(layer)
    inverse = torch.linalg.inv(_curvature(second, rectified)).to(preactivation[0])
    direction = [preactivation[0].new_empty(0) for _ in preactivation]
    for chunk in _fitted(first):
        residual = target_fn(current[chunk], reference[chunk]) - current[chunk]
        backpropagated = factor * backpropagate(layer, second.inputs[chunk], residual * scale)
        backpropagated = torch.where(rectified.active(chunk), backpropagated, 0.0)
        direction[chunk] = (backpropagated.movedim(axis, -1) @ inverse).movedim(-1, axis)
    return direction


def _curvature(second: ProducerOutput, rectified: RectifiedInput) -> Tensor:
    """Kronecker-factored curvature of the squared error in the first layer's outputs, [C, C] float64.

    The taps of the second layer are taken to be uncorrelated.
    """
    taps = weight_blocks(second.layer).double()  # [blocks, outputs, inputs, taps]
    outer = second.scale.double().to(taps.device).reshape(len(taps), -1)
    blocks = torch.einsum("go,goit,gojt->gij", outer.square(), taps, taps)
    curvature: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    both_active, rows = torch.zeros_like(curvature), 0
    for chunk in _fitted(rectified.producer):
        active = rectified.active(chunk).movedim(channel_axis(second.layer), -1).flatten(0, -2)
        active = active.to(rectified.preactivation[chunk].dtype)
        both_active += active.T @ active
        rows += len(active)
    factor = rectified.producer.scale.double().to(taps.device)
    curvature *= both_active / max(rows, 1) * factor[:, None] * factor
    mean = float(curvature.diagonal().mean())
    curvature.diagonal().add_(RIDGE * mean if mean > 0 else 1.0)
    return curvature


def _refit_second(
    second: ProducerOutput, current: list[Tensor], reference: list[Tensor], target_fn: TargetFunction
) -> ProducerOutput:
    """Refit the second layer to its new inputs."""
    layer, scale = second.layer, broadcast_channels(second.scale, current[0], second.layer)
    inverse = safe_inverse(scale)
    weight, bias = _weight(layer), layer.bias
    fit = PatchFit(layer, images=second.solved_fit.images)
    for chunk, held_out in enumerate(second.solved_fit.held_out):
        target = apply_weight(layer, second.inputs[chunk], weight)
        if isinstance(bias, Tensor):
            target += broadcast_channels(bias.detach(), target, layer)
        target += (target_fn(current[chunk], reference[chunk]) - current[chunk]) * inverse
        fit.update(second.inputs[chunk], target, held_out=held_out)
    shift = fit.solve()
    add_bias(layer, shift, second.norm)
    weight_change = _weight(layer) - weight
    for x, tensor in zip(second.inputs, current, strict=True):
        delta = apply_weight(layer, x, weight_change)
        tensor += scale * (delta + broadcast_channels(shift, delta, layer))
    return replace(second, fit=fit)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _squared_norm(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
