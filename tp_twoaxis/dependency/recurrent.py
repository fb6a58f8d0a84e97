"""Recurrent layers as one operation of Torch-Pruning's graph, which otherwise follows channels into their kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

RECURRENT_LAYERS = (nn.RNNBase, nn.RNNCellBase)


class RecurrentPruner(tp.BasePruningFunc):  # type: ignore[misc]
    """Removes inputs of a recurrent layer or cell of any kind; its hidden state is never removed."""

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Remove columns of the weights that read the layer's input, of both directions."""
        leaving = set(idxs)
        kept = [channel for channel in range(self.get_in_channels(layer)) if channel not in leaving]
        for name in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse"):
            if hasattr(layer, name):
                setattr(layer, name, self._prune_parameter_and_grad(getattr(layer, name), kept, 1))
        layer.input_size = len(kept)  # type: ignore[assignment]
        return layer

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Refuse: every hidden channel feeds itself back through weights of four kinds."""
        raise NotImplementedError(f"hidden channels of a {type(layer).__name__} cannot be removed")

    def get_in_channels(self, layer: nn.Module) -> int:
        """Channels that the layer reads."""
        width: int = layer.input_size  # type: ignore[assignment]
        return width

    def get_out_channels(self, layer: nn.Module) -> int:
        """Channels that the layer writes at every position."""
        hidden: int = getattr(layer, "proj_size", 0) or layer.hidden_size  # type: ignore[assignment]
        return hidden * (2 if getattr(layer, "bidirectional", False) else 1)


RECURRENT_PRUNER = RecurrentPruner()
"""One for all graphs: Torch-Pruning compares functions that remove channels by their object."""


class _Opaque(torch.autograd.Function):
    """One node of the autograd graph from what a layer reads to what it writes."""

    @staticmethod
    def forward(_: Any, read: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach().clone() for tensor in tensors[read:])

    @staticmethod
    def backward(_: Any, *__: Any) -> Any:
        raise NotImplementedError  # the graph is read, never run


@contextmanager
def opaque_recurrent_layers(model: nn.Module) -> Iterator[None]:
    """Let every recurrent layer be one operation for whoever follows autograd's graph inside the block."""
    with ExitStack() as stack:
        _replace_forwards(model, stack)
        yield


def _replace_forwards(model: nn.Module, stack: ExitStack) -> None:
    for layer in model.modules():
        if isinstance(layer, RECURRENT_LAYERS):
            stack.callback(_restore_forward, layer, vars(layer).get("forward"))
            layer.forward = functools.partial(_opaque_forward, layer, layer.forward)


def _restore_forward(layer: nn.Module, own: Callable[..., Any] | None) -> None:
    del layer.forward
    if own is not None:
        layer.forward = own


def _opaque_forward(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # the sequence comes first, packed or not; states have the hidden width, which stays
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    given = leaves[:1]
    given.append(next(layer.parameters()))  # with gradients, so that there is a node also where the layer reads images
    written, structure = tree_flatten(forward(*args, **kwargs))
    return tree_unflatten(_Opaque.apply(len(given), *given, *(t.detach() for t in written)), structure)
