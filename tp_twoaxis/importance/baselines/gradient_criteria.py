"""Criteria of others that need gradients of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.dependency.groups import Member, members, model_of, root_name, root_size
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance.base import GatheredImportance, GroupImportance, Part
from tp_twoaxis.importance.normalize import Normalizer
from tp_twoaxis.runtime.weight_sums import sum_by_input, sum_by_output
from tp_twoaxis.statistics.gradients import (
    SUMMED_LAYERS,
    Loss,
    MinibatchProducts,
    SquaredGradients,
    gather_minibatch_products,
    gather_squared_gradients,
)

# (module, parameter's name in it) -> saliency of every element in the parameter's shape, or None where unknown
Saliency = Callable[[nn.Module, str], Tensor | None]


class TaylorBNImportance(GroupImportance):
    """First-order Taylor expansion of the loss, in absolute values, after Molchanov et al. (2019); with the norms.

    A layer's part is the sum of ``|w dL/dw|`` over all of its parameters that leave with the channel: weights that
    write it and their bias, weights that read it, scale and shift of BatchNorm, LayerNorm and GroupNorm.
    Torch-Pruning's class leaves biases and BatchNorm out (it tests for GroupNorm in BatchNorm's place). Squared sums,
    as they are published, are :class:`TaylorGroupImportance`.

    Gradients are read from the parameters at every call, as Torch-Pruning's class does: run ``loss.backward()`` before,
    or :func:`~tp_twoaxis.statistics.gradients.accumulate_gradients` for the mean over a loader.

    Args:
        group_reduction: over the layers: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: Torch-Pruning's names.

    Raises:
        TwoAxisError: on a call: no parameter of the group has a gradient.

    Example:
        >>> import torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> net(torch.randn(2, 3, 8, 8)).square().sum().backward()
        >>> TaylorBNImportance()(graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))).shape
        torch.Size([8])
    """

    repeats: ClassVar[str] = "sum"

    def _parts(self, group: Any) -> list[Part]:
        parts = layer_saliencies(group, _first_order)
        if not parts:
            raise TwoAxisError(
                f"group of {root_name(group)}: expected gradients on its parameters, got none; call "
                "loss.backward() before, or make_importance('taylor-bn', model=..., loader=...)"
            )
        return parts


class TaylorGroupImportance(GatheredImportance):
    """First-order Taylor expansion of the loss for whole groups (Molchanov et al. 2019), as it is written there.

    ``I = mean over minibatches of (sum over s of w_s dL/dw_s)^2``, s all parameters that leave with a channel: those of
    :class:`TaylorBNImportance`, of all layers of the group together. The square comes after the sum, so what the
    parameters of a channel do to the loss may cancel, and before the mean, so minibatches may not. Where minibatches
    have different numbers of images, the mean is weighted by them (ours): a smaller last one would count for more.

    Args:
        statistics: from :meth:`calibrate`, whose loader yields ``(images, labels)`` in minibatches.
        loss: ``(output of a minibatch, its labels) -> scalar``, to gather anew with.
        normalizer: Torch-Pruning's names.
        loader: gather anew from it when the statistics are stale, instead of raising.

    Example:
        >>> import torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
        >>> loader = [(torch.randn(6, 3, 8, 8), torch.randint(4, (6,)))] * 2
        >>> importance = TaylorGroupImportance.calibrate(net, loader, progress=False)
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> importance(graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))).shape
        torch.Size([8])
    """

    def __init__(
        self,
        statistics: MinibatchProducts,
        *,
        loss: Loss = F.cross_entropy,
        normalizer: Normalizer = "mean",
        loader: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(statistics, normalizer=normalizer, loader=loader)
        self.loss = loss

    def gather(
        self, model: nn.Module, loader: Iterable[Any], *, max_images: int | None, progress: bool
    ) -> MinibatchProducts:
        """Gather products of weights and gradients, one backward pass a minibatch; labels are needed."""
        return gather_minibatch_products(model, loader, loss=self.loss, max_images=max_images, progress=progress)

    def _parts(self, group: Any) -> list[Part]:
        products: MinibatchProducts = self.statistics
        names = {module: name for name, module in model_of(group).named_modules()}
        total = torch.zeros(len(products.sizes), root_size(group), dtype=torch.float64)
        known = False
        for member in members(group):
            for parameter, reads in _leaving(member):
                name = names[member.module]
                key = f"{name}.{parameter}" if name else parameter
                sums = (products.by_input if reads else products.by_output).get(key)
                if sums is not None:
                    total.index_add_(1, member.roots, sums[:, member.channels])
                    known = True
        if not known:
            raise TwoAxisError(
                f"group of {root_name(group)}: expected parameters that were trained when gradients were gathered, "
                "got none; call requires_grad_(True) and calibrate again"
            )
        weights = products.sizes.double() / products.num_images
        return [(weights @ total.square(), torch.arange(root_size(group)))]


class HessianImportance(GatheredImportance):
    """Optimal brain damage (LeCun et al. 1989) by channel: the sum of ``w^2 E[(dL/dw)^2] / 2``.

    The Hessian's diagonal is that of the empirical Fisher matrix: the mean over images of each image's squared
    gradient. A layer's part sums over all of its parameters that leave with the channel, as in
    :class:`TaylorBNImportance`. Torch-Pruning's class keeps only the last image's gradient.

    Args:
        statistics: from :meth:`calibrate`, whose loader yields ``(images, labels)``.
        loss: ``(output of one image [1, ...], its label [1]) -> scalar``, to gather anew with.
        group_reduction: over the layers: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: Torch-Pruning's names.
        loader: gather anew from it when the statistics are stale, instead of raising.

    Example:
        >>> import torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
        >>> loader = [(torch.randn(6, 3, 8, 8), torch.randint(4, (6,)))]
        >>> importance = HessianImportance.calibrate(net, loader, progress=False)
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> importance(graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))).shape
        torch.Size([8])
    """

    repeats: ClassVar[str] = "sum"

    def __init__(self, statistics: SquaredGradients, *, loss: Loss = F.cross_entropy, **options: Any) -> None:
        super().__init__(statistics, **options)
        self.loss = loss

    def gather(
        self, model: nn.Module, loader: Iterable[Any], *, max_images: int | None, progress: bool
    ) -> SquaredGradients:
        """Gather squared gradients, one backward pass an image; labels are needed."""
        return gather_squared_gradients(model, loader, loss=self.loss, max_images=max_images, progress=progress)

    def _parts(self, group: Any) -> list[Part]:
        names = {module: name for name, module in model_of(group).named_modules()}
        means: dict[str, Tensor] = self.statistics.means

        def second_order(module: nn.Module, parameter: str) -> Tensor | None:
            mean = means.get(f"{names[module]}.{parameter}" if names[module] else parameter)
            return None if mean is None else 0.5 * getattr(module, parameter).detach().cpu().double().square() * mean

        parts = layer_saliencies(group, second_order)
        if not parts:
            raise TwoAxisError(
                f"group of {root_name(group)}: expected parameters that were trained when squared gradients "
                "were gathered, got none; call requires_grad_(True) and calibrate again"
            )
        return parts


def layer_saliencies(group: Any, saliency: Saliency) -> list[Part]:
    """Sum element saliencies to one part a layer: everything of it that leaves with a channel.

    Depthwise convolutions, which read and write a channel, count their weights once; attention layers and bare
    parameters are left out.

    Args:
        group: a ``torch_pruning`` group.
        saliency: of a module's parameter.

    Returns:
        For each layer with a known parameter its sums [n] and their root positions [n].
    """
    parts = []
    for member in members(group):
        module = member.module
        total: Tensor | None = None
        for parameter, reads in _leaving(member):
            values = saliency(module, parameter)
            if values is None:
                continue
            if parameter == "weight" and isinstance(module, (_ConvNd, nn.Linear)):
                values = (sum_by_input if reads else sum_by_output)(values, module)
            total = values.double().cpu() if total is None else total + values.double().cpu()
        if total is not None:
            parts.append((total[member.channels], member.roots))
    return parts


def _leaving(member: Member) -> list[tuple[str, bool]]:
    """List a layer's parameters that leave with a channel, and whether they do as what the layer reads it with."""
    module = member.module
    if isinstance(module, (_ConvNd, nn.Linear)):
        bias = [("bias", False)] if member.is_producer and module.bias is not None else []
        return [("weight", not member.is_producer), *bias]
    if isinstance(module, SUMMED_LAYERS):
        return [(name, False) for name in ("weight", "bias") if getattr(module, name) is not None]
    return []


def _first_order(module: nn.Module, parameter: str) -> Tensor | None:
    value = getattr(module, parameter)
    return None if value.grad is None else (value.detach().double() * value.grad.double()).abs()
