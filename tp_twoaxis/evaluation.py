"""How good a classifier is, before and after."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tp_twoaxis.batches import image_batches
from tp_twoaxis.borrow import evaluating, unwrap
from tp_twoaxis.errors import TwoAxisError


def accuracy(model: nn.Module, loader: Iterable[Any], *, progress: bool = True) -> tuple[float, int]:
    """Share of images whose largest logit is that of their label.

    Args:
        model: a classifier that returns logits [n, K]; it runs in eval mode and comes back as it was.
        loader: yields ``(images, labels)``, read to its end.
        progress: show a progress bar on stderr.

    Returns:
        Top-1 accuracy in [0, 1], and the number of images.

    Raises:
        TwoAxisError: no labelled images came.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
        >>> net = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(net.weight)
        >>> accuracy(net, [(logits, torch.tensor([1, 1]))], progress=False)
        (0.5, 2)
    """
    network = unwrap(model)
    parameter = next(network.parameters())
    right = images_seen = 0
    with (
        evaluating(network),
        image_batches(loader, max_images=None, labels=True, description="accuracy", progress=progress) as batches,
    ):
        for index, images, labels in batches:
            if labels is None:
                raise TwoAxisError(f"accuracy needs labels, batch {index} has none; name a data set with labels")
            logits = network(images.to(parameter.device, parameter.dtype, non_blocking=True))
            right += int((logits.argmax(1) == labels.to(logits.device)).sum())
            images_seen += len(images)
    if images_seen == 0:
        raise TwoAxisError("accuracy: expected at least one batch of images, got none; check the data path and split")
    return right / images_seen, images_seen
