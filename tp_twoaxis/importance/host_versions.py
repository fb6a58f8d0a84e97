"""The host's own criteria, prepared as its documentation says, to compare with; see each for what they miss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from tp_twoaxis.batches import Batch, image_batches
from tp_twoaxis.borrow import evaluating, preserved_rng, unwrap
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance.groups import model_of
from tp_twoaxis.statistics.gradients import accumulate_gradients


def host_hessian(
    model: nn.Module, loader: Iterable[Any], *, max_images: int | None = 5000, progress: bool = True
) -> tp.importance.HessianImportance:
    """Prepare the host's ``HessianImportance`` by the loop of its documentation.

    Of a loop over images the host keeps the last one's squared gradient, so the last image alone is run backward.
    The host reads from the parameters' ``grad``, where its numbers stay.

    Raises:
        TwoAxisError: no labelled images came.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> loader = [(torch.randn(8, 3, 2, 2), torch.randint(4, (8,)))]
        >>> type(host_hessian(net, loader, progress=False)).__name__
        'GroupHessianImportance'
    """
    network = unwrap(model)
    last = _last_batch(loader, max_images=max_images, labels=True, description="host hessian", progress=progress)
    if last.labels is None:
        raise TwoAxisError(f"gradients of the loss need labels, batch {last.number} has none; yield (images, labels)")
    accumulate_gradients(network, [(last.images[-1:], last.labels[-1:])], max_images=None, progress=False)
    importance = tp.importance.GroupHessianImportance()
    importance.accumulate_grad(network)
    return importance


class HostActivationImportance(tp.importance.ActivationImportance):  # type: ignore[misc]
    """The host's ``ActivationImportance``, with its numbers held here instead of on the model's layers.

    The layers carry them (as ``_importance``) during a call alone. The host averages magnitudes over a
    convolution's inputs and sums them over a linear layer's, and keeps the last batch. Of a group whose first
    reader sits behind a flattening layer it scores features, not channels, so the host cannot prune by it.

    Args:
        values: layer name -> what the host computed for it.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def __call__(self, group: Any) -> Tensor | None:
        """Rank a group as the host does; None where it declines."""
        layers = [(m, self.values[name]) for name, m in model_of(group).named_modules() if name in self.values]
        try:
            for layer, value in layers:
                layer._importance = value
            scores: Tensor | None = super().__call__(group)
        finally:
            for layer, _ in layers:
                del layer._importance
        return scores


def host_activation(
    model: nn.Module, loader: Iterable[Any], *, max_images: int | None = 5000, progress: bool = True
) -> HostActivationImportance:
    """Prepare the host's ``ActivationImportance``; only the last batch counts there, so only it is run.

    Raises:
        TwoAxisError: no images came.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
        >>> list(host_activation(net, [torch.randn(8, 3, 2, 2)], progress=False).values)
        ['0', '1']
    """
    network = unwrap(model)
    batch = _last_batch(loader, max_images=max_images, labels=False, description="host activation", progress=progress)
    parameter = next(network.parameters())
    with (
        preserved_rng(),
        evaluating(network),
        tp.importance.ActivationImportance().compute_importance(network),
    ):
        network(batch.images.to(parameter.device, parameter.dtype))
    values = {}
    for name, layer in network.named_modules():
        if hasattr(layer, "_importance"):
            values[name] = layer._importance
            del layer._importance
    return HostActivationImportance(values)


def _last_batch(
    loader: Iterable[Any], *, max_images: int | None, labels: bool, description: str, progress: bool
) -> Batch:
    last: Batch | None = None
    with image_batches(
        loader, max_images=max_images, labels=labels, description=description, progress=progress
    ) as batches:
        for batch in batches:
            last = batch
    if last is None:
        raise TwoAxisError("loader: expected at least one batch of images, got none; check the data path")
    return last
