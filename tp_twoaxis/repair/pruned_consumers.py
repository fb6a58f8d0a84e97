"""Which layers lost inputs, and which of these can be refitted at once."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.layers import blocks_of, weight_blocks
from tp_twoaxis.runtime.weights import SHARED, cannot_refit, shared_weights

BEHIND_NORM = "a norm before it loses channels, so those that stay change too: sequential repair can reach it"


def pruned_consumers(network: nn.Module, dense: nn.Module, masks: dict[str, PrunedChannels]) -> dict[str, str]:
    """Find the consumers of removed channels.

    Depthwise convolutions are not among them: they pass channels on to the next layer, which is.

    Args:
        network: the pruned network.
        dense: its original.
        masks: layer name -> channels that it lost.

    Returns:
        Layer name -> why it cannot be refitted at once, or ``""``, in the model's order.

    Raises:
        TwoAxisError: a layer was changed since removal.
    """
    shared = shared_weights(network)
    consumers = {}
    for name, pruned in masks.items():
        if not bool(pruned.inputs.any()):
            continue
        layer, original = network.get_submodule(name), dense.get_submodule(name)
        if cannot_refit(original) is None:
            check_removed(name, layer, original, pruned)
            if not mixes(original, pruned):
                continue
        consumers[name] = _obstacle(layer, pruned, shared)
    return consumers


def pruned_blocks(dense: nn.Module, pruned: PrunedChannels) -> tuple[Tensor, Tensor, Tensor]:
    """Arrange a layer's lost channels by its blocks.

    Returns:
        Blocks [B'] that keep an output, and of those blocks the lost inputs [B', I] and outputs [B', O], bool.
    """
    blocks = blocks_of(dense)
    inputs, outputs = pruned.inputs.reshape(blocks, -1), pruned.outputs.reshape(blocks, -1)
    alive = (~outputs.all(1)).nonzero()[:, 0]
    return alive, inputs[alive], outputs[alive]


def mixes(dense: nn.Module, pruned: PrunedChannels) -> bool:
    """Whether a layer mixes a lost input into an output that stays; a depthwise convolution never does.

    Example:
        >>> lost = torch.tensor([True, False])
        >>> pruned = PrunedChannels(lost, lost)
        >>> mixes(nn.Conv2d(2, 2, 3, groups=2), pruned), mixes(nn.Conv2d(2, 2, 3), pruned)
        (False, True)
    """
    return bool(pruned_blocks(dense, pruned)[1].any())


def check_removed(name: str, layer: nn.Module, dense: nn.Module, pruned: PrunedChannels) -> None:
    """Check that a layer's weight is the dense one without the lost channels, and otherwise unchanged.

    Raises:
        TwoAxisError: it is not; for example because it was repaired before.
    """
    alive, inputs, outputs = pruned_blocks(dense, pruned)
    weight, old = weight_blocks(layer), weight_blocks(dense).cpu()
    expected = [old[b][~outputs[i]][:, ~inputs[i]] for i, b in enumerate(alive.tolist())]
    if len(expected) != len(weight) or any(
        part.shape != other.shape or not torch.equal(part, other)
        for part, other in zip(weight.cpu(), expected, strict=True)
    ):
        raise TwoAxisError(
            f"{name}: expected the dense layer's weights without the removed channels, got others - it was repaired or "
            "trained after removal; repair a network once, straight after removal"
        )


def _obstacle(layer: nn.Module, pruned: PrunedChannels, shared: Counter[int]) -> str:
    if reason := cannot_refit(layer):
        return reason
    if shared[id(layer.weight)] > 1:
        return SHARED
    if pruned.norms:
        return BEHIND_NORM
    return ""
