"""The optional backward pass: gradients of the mean loss, for criteria that need them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tp_twoaxis.batches import image_batches
from tp_twoaxis.borrow import evaluating, preserved_rng, unwrap
from tp_twoaxis.errors import TwoAxisError


def accumulate_gradients(
    model: nn.Module, loader: Iterable[Any], *, max_images: int | None = 5000, progress: bool = True
) -> int:
    """Leave the gradient of the mean cross-entropy over all images in every parameter's ``grad``.

    The model runs in eval mode, so BatchNorm statistics stay and dropout is off; modes and random state come
    back. Gradients from before are discarded, and the new ones **stay on the model**, where Torch-Pruning's
    Taylor criteria look for them: call ``model.zero_grad()`` after pruning. When the pass fails there are none.

    Args:
        model: a classifier that returns logits [n, K]; wrappers are looked through.
        loader: yields ``(images, labels)``, labels class indices [n].
        max_images: stop after this many; None reads the loader to its end.
        progress: show a progress bar on stderr.

    Returns:
        The number of images used.

    Raises:
        TwoAxisError: no labelled images came, the model failed on them, or no parameter trains.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        >>> accumulate_gradients(net, [(torch.randn(8, 3, 2, 2), torch.randint(4, (8,)))], progress=False)
        8
        >>> net[1].weight.grad.shape
        torch.Size([4, 12])
    """
    network = unwrap(model)
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise TwoAxisError(f"{type(network).__name__}: no parameter requires a gradient; call requires_grad_(True)")
    device, dtype = trained[0].device, trained[0].dtype
    network.zero_grad(set_to_none=True)
    used = 0
    with (
        preserved_rng(),
        evaluating(network),
        torch.enable_grad(),
        image_batches(
            loader, max_images=max_images, labels=True, description="gradients", progress=progress
        ) as batches,
    ):
        try:
            for index, images, labels in batches:
                if labels is None:
                    raise TwoAxisError(
                        f"gradients of the loss need labels, batch {index} has none; yield (images, labels)"
                    )
                logits = network(images.to(device, dtype, non_blocking=True))
                # sums now and one division at the end: a small last batch then weighs no more than its images
                F.cross_entropy(logits, labels.to(device), reduction="sum").backward()  # type: ignore[no-untyped-call]
                used += len(images)
            if used == 0:
                raise TwoAxisError("loader: expected at least one batch of images, got none; check the data path")
        except Exception as error:
            network.zero_grad(set_to_none=True)
            if isinstance(error, TwoAxisError):
                raise
            raise TwoAxisError(
                f"{type(network).__name__} raised {type(error).__name__} while gradients were gathered: {error}; "
                "it must return logits [n, K], and labels must be class indices in [0, K)"
            ) from error
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad /= used
    return used
