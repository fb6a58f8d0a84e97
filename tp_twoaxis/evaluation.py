"""How good a classifier is, before and after."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from tp_twoaxis.borrow import evaluating, unwrap
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.calibration import check_images, split_batch


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
        tqdm(desc="accuracy", unit="image", disable=not progress, leave=False) as bar,
    ):
        for index, batch in enumerate(loader):
            images, labels = split_batch(batch, index)
            if labels is None:
                raise TwoAxisError(f"accuracy needs labels, batch {index} has none; name a data set with labels")
            check_images(images, index)
            logits = network(images.to(parameter.device, parameter.dtype, non_blocking=True))
            right += int((logits.argmax(1) == labels.to(logits.device)).sum())
            images_seen += len(images)
            bar.update(len(images))
    if images_seen == 0:
        raise TwoAxisError("accuracy: expected at least one batch of images, got none; check the data path and split")
    return right / images_seen, images_seen
