"""The loss of training: cross-entropy, and divergence from a teacher's softened predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tp_twoaxis.errors import TwoAxisError

Penalty = Callable[[int], Tensor | None]
"""From a batch's number, after its forward pass, to a number that its loss grows by, or None."""


class Distillation(NamedTuple):
    """Distillation from a teacher: softmax temperature, and the weight of its part of the loss in [0, 1]."""

    temperature: float = 4.0
    weight: float = 0.5


DISTILLATION = Distillation()


def training_loss(
    logits: Tensor,
    labels: Tensor | None,
    teacher_logits: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    distillation: Distillation = DISTILLATION,
) -> Tensor:
    """Mean loss of a batch, in nats: cross-entropy, with a teacher mixed with its softened predictions.

    With temperature T and weight w of Hinton et al. 2015 (section 2):
    ``(1 - w) CE(logits, labels) + w T^2 KL(softmax(teacher / T) || softmax(logits / T))``.

    Args:
        logits: [n, K]; half precisions are raised to float32.
        labels: class indices [n]; None only when the teacher's weight is 1.
        teacher_logits: [n, K], or None.
        label_smoothing: of the cross-entropy.
        distillation: T and w.

    Raises:
        TwoAxisError: there are neither labels nor a teacher of weight 1.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> round(float(training_loss(logits, torch.tensor([0]))), 4)
        0.6931
        >>> float(training_loss(logits, None, logits + 1, distillation=Distillation(2.0, 1.0)))
        0.0
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    weight = 0.0 if teacher_logits is None else distillation.weight
    if labels is None and weight < 1:
        raise TwoAxisError("training needs labels, or a teacher with distillation weight 1; yield (images, labels)")
    loss = logits.new_zeros(())
    if weight < 1 and labels is not None:
        loss = (1 - weight) * F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    if teacher_logits is not None and weight > 0:
        temperature = distillation.temperature
        student = F.log_softmax(logits / temperature, dim=1)
        target = F.log_softmax(teacher_logits.to(logits.dtype) / temperature, dim=1)
        divergence = F.kl_div(student, target, reduction="batchmean", log_target=True)
        loss = loss + weight * temperature**2 * divergence
    return loss


def check_labels(labels: Tensor | None, logits: Any) -> None:
    """Refuse logits and labels that do not fit; on CUDA a wrong label would end the process instead of raising.

    Raises:
        TwoAxisError: the logits are not [n, K], or the labels not int64 [n] in [0, K).

    Example:
        >>> check_labels(torch.tensor([0, 1]), torch.zeros(2, 2))
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TwoAxisError(f"model: expected logits [n, K], got {got}; return the class scores alone")
    if labels is None:
        return
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
        raise TwoAxisError(
            f"labels: expected int64 [{len(logits)}], got {labels.dtype} {list(labels.shape)}; give class indices"
        )
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= logits.shape[1]:
        raise TwoAxisError(
            f"labels: expected 0..{logits.shape[1] - 1} for a model of {logits.shape[1]} outputs, got {low}..{high}; "
            f"build it with num_classes={high + 1}"
        )
