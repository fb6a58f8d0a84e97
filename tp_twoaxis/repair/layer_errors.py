"""How far repaired layers are from the dense ones, on images that no fit has used."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.repair.channel_moments import ChannelMoments
from tp_twoaxis.repair.repair_report import relative
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.inputs import Inputs
from tp_twoaxis.runtime.kernels import first_input
from tp_twoaxis.runtime.layers import flatten_positions, select_channels

# dense outputs of all layers are held for so many images at a time: 44 MB an image for a ResNet-50 at 224 pixels
CHUNK = 8


class _RelativeVariance:
    """Variance of a difference over that of what it is compared with, each summed over channels."""

    def __init__(self) -> None:
        self._difference, self._reference = ChannelMoments(), ChannelMoments()

    def update(self, difference: Tensor, reference: Tensor) -> None:
        self._difference.update(difference)
        self._reference.update(reference)

    def ratio(self) -> float:
        return relative(self._difference.scatter, self._reference.scatter)


def layer_errors(
    network: nn.Module, dense: nn.Module, masks: dict[str, PrunedChannels], names: list[str], images: Inputs
) -> dict[str, tuple[float, float]]:
    """Compare layers of a repaired network with the dense network's.

    Args:
        network: pruned and repaired.
        dense: its original.
        masks: layer name -> channels that it lost.
        names: layers to compare, convolutions and linear layers.
        images: to compare on.

    Returns:
        Name -> the error of the layer alone, given the dense network's kept channels, and the error inside the
        network; both relative, see :class:`~tp_twoaxis.repair.repair_report.ConsumerRepair`.
    """
    alone, inside = ({name: _RelativeVariance() for name in names} for _ in range(2))
    references: dict[str, list[Tensor]] = defaultdict(list)  # of the present chunk, in the order of the layer's calls

    def on_dense(name: str) -> Any:
        pruned, repaired = masks[name], network.get_submodule(name)

        def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            x = select_channels(first_input(inputs, named), layer, ~pruned.inputs)
            y = _rows(select_channels(output, layer, ~pruned.outputs), layer)
            # the layer's forward alone: its hooks, if a user has any, are for the network
            alone[name].update(_rows(repaired.forward(x), layer) - y, y)
            references[name].append(y)

        return hook

    def on_pruned(name: str) -> Any:
        def hook(layer: nn.Module, _: Any, output: Tensor) -> None:
            y = references[name].pop(0)
            inside[name].update(_rows(output, layer) - y, y)

        return hook

    chunks = images.split(CHUNK)
    with (
        forward_pass(dense, chunks, what="measure repair") as dense_run,
        forward_pass(network, (), what="measure repair") as pruned_run,
    ):
        for name in names:
            dense_run.hook(dense.get_submodule(name), on_dense(name), with_kwargs=True)
            pruned_run.hook(network.get_submodule(name), on_pruned(name))
        for batch, _ in dense_run:
            pruned_run(batch)
            references.clear()
    return {name: (alone[name].ratio(), inside[name].ratio()) for name in names}


def _rows(output: Tensor, layer: nn.Module) -> Tensor:
    # a copy: an in-place activation behind the layer would change what is kept
    view = flatten_positions(output.detach(), layer, len(output), "")
    return view.reshape(-1, view.shape[-1]).clone(memory_format=torch.contiguous_format)
