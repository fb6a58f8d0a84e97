"""BatchNorm statistics of the pruned network's own activations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.forward import NoImagesError, forward_pass
from tp_twoaxis.runtime.model_state import unwrap


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """List the BatchNorm layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def reestimate_batch_norm(
    model: nn.Module, loader: Iterable[Any], *, max_images: int | None = 5000, progress: bool = True
) -> int:
    """Reset every BatchNorm's running statistics and estimate them anew on the pruned network's own inputs.

    Removal shifts what later layers receive; stale means and variances then cost most of the accuracy.
    Each layer ends with the plain average over batches of the batch means and variances (momentum None),
    all layers in the same pass. Nothing else is in training mode: dropout stays off. Buffers are replaced,
    not written into, so the caller may still undo everything.

    Args:
        model: the pruned model; modes, random state and momenta are restored.
        loader: yields ``(images, labels)`` or images; labels are not used. Batches of one image are skipped,
            because one image has no variance.
        max_images: stop after this many; None reads the loader to its end.
        progress: show a progress bar on stderr.

    Returns:
        The number of images used; 0 when the model has no such layer.

    Raises:
        TwoAxisError: the loader gave no batch of two images or more, or no float images.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        >>> reestimate_batch_norm(net, [torch.randn(8, 3, 4, 4)], progress=False)
        8
    """
    network = unwrap(model)
    norms = batch_norms(network)
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    used = 0
    try:
        with forward_pass(
            network, loader, what="re-estimate BatchNorm", max_images=max_images, progress=progress
        ) as run:
            for norm in norms:
                for name, buffer in list(norm.named_buffers(recurse=False)):
                    setattr(norm, name, buffer.clone())
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average: every batch counts the same
                norm.training = True
            for batch in run.batches:
                if len(batch.inputs) > 1:
                    run(batch)
                    used += len(batch.inputs)
    except NoImagesError:
        pass  # said below, as of batches that are too small
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if used == 0:
        raise TwoAxisError(
            "repair 'bn': expected batches of at least 2 images from the loader, got none; raise the batch size or "
            "pass repair=()"
        )
    return used
