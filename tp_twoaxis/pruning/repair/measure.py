"""How far repaired layers are from the dense ones, on images that no fit has seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.borrow import evaluating, preserved_rng
from tp_twoaxis.pruning.repair.losses import LayerLoss
from tp_twoaxis.pruning.repair.one_shot import keep_channels
from tp_twoaxis.pruning.repair.report import relative
from tp_twoaxis.statistics.layers import channels_last_view

# dense outputs of all layers are held for so many images at a time: 44 MB an image for a ResNet-50 at 224 pixels
CHUNK = 8


class _Spread:
    """Variances of a difference and of what it is compared with, summed over channels."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums: list[Tensor] = []

    def update(self, difference: Tensor, reference: Tensor) -> None:
        values = [t.double() for t in (difference, reference)]
        sums = [s for t in values for s in (t.sum(0), t.square().sum(0))]
        self.rows += len(difference)
        self.sums = sums if not self.sums else [a + b for a, b in zip(self.sums, sums, strict=True)]

    def ratio(self) -> float:
        first, first_square, second, second_square = (s / self.rows for s in self.sums)
        error, power = first_square - first.square(), second_square - second.square()
        return relative(error.clamp_min(0.0), power.clamp_min(0.0))


def layer_errors(
    network: nn.Module, dense: nn.Module, losses: dict[str, LayerLoss], names: list[str], images: Tensor
) -> dict[str, tuple[float, float]]:
    """Compare layers of a repaired network with the dense network's.

    Args:
        network: pruned and repaired.
        dense: its original.
        losses: from before removal.
        names: layers to compare, convolutions and linear layers.
        images: [n, ...] on the network's device.

    Returns:
        Name -> the error of the layer alone, given the dense network's kept channels, and the error inside the
        network; both relative, see :class:`~tp_twoaxis.pruning.repair.report.ConsumerRepair`.
    """
    alone, inside = ({name: _Spread() for name in names} for _ in range(2))
    for chunk in torch.split(images, CHUNK):
        targets: dict[str, list[Tensor]] = {name: [] for name in names}

        def on_dense(name: str, targets: dict[str, list[Tensor]] = targets) -> Any:
            loss, repaired = losses[name], network.get_submodule(name)

            def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
                x = (inputs or tuple(named.values()))[0]
                y = _rows(keep_channels(output, layer, ~loss.outputs), layer)
                # the layer's forward alone: its hooks, if a user has any, are for the network
                alone[name].update(_rows(repaired.forward(keep_channels(x, layer, ~loss.inputs)), layer) - y, y)
                targets[name].append(y)

            return hook

        def on_pruned(name: str, targets: dict[str, list[Tensor]] = targets) -> Any:
            def hook(layer: nn.Module, _: Any, output: Tensor) -> None:
                y = targets[name].pop(0)
                inside[name].update(_rows(output, layer) - y, y)

            return hook

        with preserved_rng():
            for model, kind, options in ((dense, on_dense, {"with_kwargs": True}), (network, on_pruned, {})):
                handles = [model.get_submodule(n).register_forward_hook(kind(n), **options) for n in names]
                try:
                    with evaluating(model):
                        model(chunk)
                finally:
                    for handle in handles:
                        handle.remove()
    return {name: (alone[name].ratio(), inside[name].ratio()) for name in names}


def _rows(output: Tensor, layer: nn.Module) -> Tensor:
    # a copy: an in-place activation behind the layer would change what is kept
    view = channels_last_view(output.detach(), layer, len(output), "")
    return view.reshape(-1, view.shape[-1]).clone(memory_format=torch.contiguous_format)
