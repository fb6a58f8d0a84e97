"""Two layers with a rectifier between them, fitted together to what becomes of the second one's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.pruning.repair.patch import PatchFit
from tp_twoaxis.pruning.repair.weights import add_bias, read_weight, write_weight

Aim = Callable[[Tensor, Tensor], Tensor]
# tries of a shorter step before the first layer is left as it is
HALVINGS = 3
# of the curvature's mean diagonal, so that channels that the second layer hardly reads do not move far
DAMPING = 1e-3
# numbers of the second layer's outputs that are worked on at a time
CHUNK_NUMBERS = 2**22


@dataclass(frozen=True)
class Writer:
    """A refitted layer and how its outputs got where they are.

    Attributes:
        layer: its weights are final but for what a junction corrects.
        fit: what :meth:`PatchFit.solve` was called on.
        inputs: what the layer read.
        norm: the BatchNorm that takes its shift, if any.
        kept: [dense C_out] bool, channels of the dense layer that it still writes.
        scale: [C_out] factor from its outputs to here.
        source: the layer whose rectified outputs it reads, if there is one.
    """

    layer: nn.Module
    fit: PatchFit
    inputs: Tensor
    norm: nn.Module | None
    kept: Tensor
    scale: Tensor
    source: Source | None = None


@dataclass(frozen=True)
class Source:
    """A refitted layer as the next one sees it: through a rectifier.

    Attributes:
        writer: the layer, its scale up to the rectifier.
        before: the rectifier's input, a copy.
        low: its lower bound.
        high: its upper bound.
    """

    writer: Writer
    before: Tensor
    low: float
    high: float


def axis_of(layer: nn.Module) -> int:
    """Give the dimension of a layer's channels."""
    return 1 if isinstance(layer, _ConvNd) else -1


def along(vector: Tensor, like: Tensor, layer: nn.Module) -> Tensor:
    """View [C] so that it multiplies a layer's inputs or outputs channel by channel."""
    shape = [1] * like.ndim
    shape[axis_of(layer)] = -1
    return vector.to(like).reshape(shape)


def written(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Run a layer with other weights and no bias."""
    return F.linear(x, weight) if axis_of(layer) == -1 else layer._conv_forward(x, weight, None)  # type: ignore[operator]


def pulled_back(layer: nn.Module, x: Tensor, rest: Tensor) -> Tensor:
    """Pull a change of a layer's outputs back to its inputs: the transpose of the layer.

    Example:
        >>> conv, x, y = nn.Conv2d(2, 3, 3, stride=2, bias=False), torch.randn(1, 2, 7, 7), torch.randn(1, 3, 3, 3)
        >>> with torch.no_grad():
        ...     torch.allclose((pulled_back(conv, x, y) * x).sum(), (y * conv(x)).sum(), atol=1e-4)
        True
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not isinstance(layer, _ConvNd):
        return rest @ weight
    n = len(layer.kernel_size)
    back: Tensor
    back, _, _ = torch.ops.aten.convolution_backward(
        rest,
        x,
        weight,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        [0] * n,
        layer.groups,
        (True, False, False),
    )
    return back


def can_pair(layer: nn.Module) -> bool:
    """Whether a layer's transpose is known: linear layers, and convolutions padded with a number of zeros."""
    return not isinstance(layer, _ConvNd) or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str))


def refine_pair(second: Writer, now: Tensor, wanted: Tensor, aim: Aim, rounds: int) -> Writer:
    """Change a layer and the one before it in turn: what becomes of the second's outputs shall come closer to a target.

    A layer that lost outputs need not go on writing what those that stay wrote in the dense network: nobody reads them
    but the next layer. So let it write what that one can use best. Each round pulls the error back through the second
    layer, its scale and the rectifier; a Gauss-Newton step of the first layer is then a least-squares fit of its
    patches to the pulled error, divided by the curvature that the second layer's weights give it (Kronecker-factored:
    Martens and Grosse 2015; Grosse and Martens 2016 for convolutions). The step's length is exact where no rectifier
    switches, and halved until the error falls. Then the second layer is fitted anew to what it reads now. The error
    falls in every round or the round changes nothing. It takes images, no labels, and nothing beyond the two layers.

    Args:
        second: has a source; its weights, and its source's, are replaced.
        now: what became of its outputs, laid out like them; changed in place, as are its inputs.
        wanted: what that was in the dense network.
        aim: ``(now, wanted) -> target``, elementwise.
        rounds: how many.

    Returns:
        The second layer as it is now.
    """
    source = second.source
    assert source is not None
    for _ in range(rounds):
        if not _step(second, source, now, wanted, aim):
            break
        second = _refit(second, now, wanted, aim)
    return second


def _step(second: Writer, source: Source, now: Tensor, wanted: Tensor, aim: Aim) -> bool:
    """Change the first layer; say whether a step was found that lowers the error."""
    layer, first, before = second.layer, source.writer, source.before
    scale, factor = along(second.scale, now, layer), along(first.scale, before, first.layer)
    parts = _parts(now)
    inverse = torch.linalg.inv(_curvature(second, source)).to(before)
    wish = torch.empty_like(before)
    error = 0.0
    for part in parts:
        rest = aim(now[part], wanted[part]) - now[part]
        error += _power(rest)
        pulled = factor * pulled_back(layer, second.inputs[part], rest * scale)
        pulled = torch.where(_inside(before[part], source), pulled, 0.0)
        wish[part] = (pulled.movedim(axis_of(layer), -1) @ inverse).movedim(-1, axis_of(layer))
    change, shift = first.fit.change_for(first.inputs, wish)
    moved = wish
    for part in parts:
        plain = written(first.layer, first.inputs[part], change)
        moved[part] = factor * (plain + along(shift, plain, first.layer))

    def read(part: slice, size: float) -> Tensor:
        return (before[part] + size * moved[part]).clamp(source.low, source.high)

    def after(part: slice, size: float) -> Tensor:
        difference = read(part, size) - second.inputs[part]
        return now[part] + scale * written(layer, difference, _weight(layer))

    along_it = length = 0.0
    for part in parts:
        delta = after(part, 1.0) - now[part]
        length += _power(delta)
        along_it += float(((aim(now[part], wanted[part]) - now[part]) * delta).sum(dtype=torch.float64))
    size = along_it / length if length > 0 else 0.0
    for _ in range(HALVINGS + 1):
        if not size > 0:
            return False
        if sum(_power(aim(later, wanted[part]) - later) for part in parts for later in [after(part, size)]) < error:
            break
        size /= 2
    else:
        return False
    for part in parts:
        now[part] = after(part, size)
        second.inputs[part] = read(part, size)
    before.add_(moved, alpha=size)
    old = read_weight(first.layer)
    write_weight(first.layer, old + size * change.reshape(old.shape))
    add_bias(first.layer, size * shift, first.norm)
    return True


def _refit(second: Writer, now: Tensor, wanted: Tensor, aim: Aim) -> Writer:
    """Fit the second layer anew to what it reads now."""
    layer, scale = second.layer, along(second.scale, now, second.layer)
    usable = scale.abs() > 1e-6 * scale.abs().max()
    inverse = torch.where(usable, 1.0 / torch.where(usable, scale, 1.0), 0.0)
    parts = _parts(now)
    weight, bias = _weight(layer), layer.bias
    target = torch.empty_like(now)
    for part in parts:
        present = written(layer, second.inputs[part], weight)
        present = present + along(bias.detach(), present, layer) if isinstance(bias, Tensor) else present
        target[part] = present + (aim(now[part], wanted[part]) - now[part]) * inverse
    fit = PatchFit(layer, images=len(now))
    fit.update(second.inputs, target)
    shift = fit.solve()
    add_bias(layer, shift, second.norm)
    change = _weight(layer) - weight
    for part in parts:
        moved = written(layer, second.inputs[part], change)
        now[part] += scale * (moved + along(shift, moved, layer))
    return replace(second, fit=fit)


def _parts(x: Tensor) -> list[slice]:
    """Cut images into parts whose temporary tensors stay small."""
    step = max(1, CHUNK_NUMBERS // max(1, x[:1].numel()))
    return [slice(start, start + step) for start in range(0, len(x), step)]


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _inside(before: Tensor, source: Source) -> Tensor:
    return (before > source.low) & (before < source.high)


def _curvature(second: Writer, source: Source) -> Tensor:
    """Say how the squared error curves with the first layer's outputs, [C, C] float64: taps as if uncorrelated."""
    taps = read_weight(second.layer).double()  # [blocks, outputs, inputs, taps]
    outer = second.scale.double().to(taps.device).reshape(len(taps), -1)
    blocks = torch.einsum("go,goit,gojt->gij", outer.square(), taps, taps)
    curvature: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    together, rows = torch.zeros_like(curvature), 0
    for part in _parts(source.before):
        active = _inside(source.before[part], source).movedim(axis_of(second.layer), -1).flatten(0, -2)
        active = active.to(source.before.dtype)
        together += active.T @ active
        rows += len(active)
    factor = source.writer.scale.double().to(taps.device)
    curvature *= together / max(rows, 1) * factor[:, None] * factor
    mean = float(curvature.diagonal().mean())
    curvature.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    return curvature


def _power(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
