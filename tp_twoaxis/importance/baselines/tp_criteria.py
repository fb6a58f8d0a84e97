"""Torch-Pruning's own criteria, prepared as its documentation says, to compare with; see each for what they miss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from tp_twoaxis.dependency.groups import model_of
from tp_twoaxis.runtime.batches import Batch
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.statistics.gradients import accumulate_gradients


def tp_hessian(
    model: nn.Module, loader: Iterable[Any], *, max_images: int | None = 5000, progress: bool = True
) -> tp.importance.HessianImportance:
    """Prepare Torch-Pruning's ``HessianImportance`` by the loop of its documentation.

    Of a loop over images it keeps the last one's squared gradient, so the last image alone is run backward. It reads
    from the parameters' ``grad``, where its numbers stay.

    Raises:
        TwoAxisError: no labelled images came.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> loader = [(torch.randn(8, 3, 2, 2), torch.randint(4, (8,)))]
        >>> type(tp_hessian(net, loader, progress=False)).__name__
        'GroupHessianImportance'
    """
    network = unwrap(model)
    with forward_pass(
        network, loader, what="Hessian", max_images=max_images, labels="required", progress=progress
    ) as run:
        last = _last(run.batches)
    assert last.labels is not None
    accumulate_gradients(network, [(last.inputs[-1:], last.labels[-1:])], max_images=None, progress=False)
    importance = tp.importance.GroupHessianImportance()
    importance.accumulate_grad(network)
    return importance


class TPActivationImportance(tp.importance.ActivationImportance):  # type: ignore[misc]
    """Torch-Pruning's ``ActivationImportance``, with its numbers held here instead of on the model's layers.

    The layers carry them (as ``_importance``) during a call alone. It averages magnitudes over a
    convolution's inputs and sums them over a linear layer's, and keeps the last batch. Of a group whose first
    consumer sits behind a flattening layer it scores features, not channels, and cannot be pruned by it.

    Args:
        values: layer name -> what Torch-Pruning computed for it.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def __call__(self, group: Any) -> Tensor | None:
        """Rank a group as Torch-Pruning does; None where it declines."""
        layers = [(m, self.values[name]) for name, m in model_of(group).named_modules() if name in self.values]
        try:
            for layer, value in layers:
                layer._importance = value
            scores: Tensor | None = super().__call__(group)
        finally:
            for layer, _ in layers:
                del layer._importance
        return scores


def tp_activation(
    model: nn.Module, loader: Iterable[Any], *, max_images: int | None = 5000, progress: bool = True
) -> TPActivationImportance:
    """Prepare Torch-Pruning's ``ActivationImportance``; only the last batch counts there, so only it is run.

    Raises:
        TwoAxisError: no images came.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
        >>> list(tp_activation(net, [torch.randn(8, 3, 2, 2)], progress=False).values)
        ['0', '1']
    """
    network = unwrap(model)
    with forward_pass(network, loader, what="activations", max_images=max_images, progress=progress) as run:
        last = _last(run.batches)
        with tp.importance.ActivationImportance().compute_importance(network):
            run(last)
    values = {}
    for name, layer in network.named_modules():
        if hasattr(layer, "_importance"):
            values[name] = layer._importance
            del layer._importance
    return TPActivationImportance(values)


def _last(batches: Iterator[Batch]) -> Batch:
    for batch in batches:
        last = batch
    return last
