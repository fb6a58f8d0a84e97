"""Accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tp_twoaxis.runtime.forward import forward_pass


def accuracy(model: nn.Module, loader: Iterable[Any], *, progress: bool = True) -> tuple[float, int]:
    """Share of images whose largest logit is that of their label.

    Args:
        model: a classifier that returns logits [n, K]; it runs in eval mode and is restored afterwards.
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
    right = 0
    with forward_pass(model, loader, what="accuracy", labels="required", progress=progress) as run:
        for batch, logits in run:
            assert batch.labels is not None
            right += int((logits.argmax(1) == batch.labels.to(logits.device)).sum())
    return right / run.images, run.images
