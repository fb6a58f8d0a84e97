"""Task variables: what the network predicts for an image, as numbers that channels can correlate with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.errors import TwoAxisError, listing
from tp_twoaxis.runtime.batches import Batch
from tp_twoaxis.runtime.forward import find_logits

LABELLED = ("margin", "correct_logit", "negative_loss", "one_vs_rest")
LABEL_FREE = ("predicted_margin", "predicted_logit")
TARGETS = LABELLED + LABEL_FREE


def task_variables(logits: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Compute every task variable of a batch (paper, section 2.1 and table 4).

    Args:
        logits: [n, K] class scores, K >= 2.
        labels: [n] class indices in [0, K), or None: then only the label-free variables come back.

    Returns:
        Name -> float64 [n, 1], except ``one_vs_rest`` [n, K]:
        ``margin`` ``z_y - max_{j != y} z_j``; ``correct_logit`` ``z_y``; ``negative_loss`` log-probability
        of the label in nats; ``one_vs_rest`` the one-hot label; ``predicted_margin`` top-1 minus top-2
        logit; ``predicted_logit`` top-1 logit.

    Raises:
        TwoAxisError: logits are not [n, K >= 2], labels are not class indices of that length and range.

    Example:
        >>> v = task_variables(torch.tensor([[2.0, 5.0, 1.0]]), torch.tensor([0]))
        >>> v["margin"].item(), v["predicted_margin"].item(), v["one_vs_rest"].tolist()
        (-3.0, 3.0, [[1.0, 0.0, 0.0]])
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise TwoAxisError(
            f"expected class logits [n, K >= 2] from the model, got {list(logits.shape)}; "
            "pass target=None to calibrate the local axis alone"
        )
    z = logits.detach().double()
    top = z.topk(2, dim=1).values
    variables = {"predicted_margin": top[:, :1] - top[:, 1:], "predicted_logit": top[:, :1]}
    if labels is None:
        return variables
    y = class_indices(labels, z)[:, None]
    correct = z.gather(1, y)
    variables["margin"] = correct - z.scatter(1, y, -torch.inf).max(1, keepdim=True).values
    variables["correct_logit"] = correct
    variables["negative_loss"] = z.log_softmax(1).gather(1, y)
    variables["one_vs_rest"] = torch.zeros_like(z).scatter_(1, y, 1.0)
    return variables


def class_logits(output: Any, network: nn.Module) -> Tensor:
    """Find the logits, unless a tuple holds several things that could be them: features, coarse and fine classes.

    Args:
        output: what the model returned.
        network: the model, for the message.

    Raises:
        TwoAxisError: there are none, or it cannot be known which they are.

    Example:
        >>> class_logits((torch.zeros(3, 2), torch.zeros(3, 8, 4)), nn.Identity()).shape
        torch.Size([3, 2])
    """
    if isinstance(output, (tuple, list)) and not hasattr(output, "logits"):
        tables = [list(value.shape) for value in output if isinstance(value, Tensor) and value.ndim == 2]
        if len({width for _, width in tables}) > 1:
            raise TwoAxisError(
                f"expected logits from {type(network).__name__}, got a tuple with {listing(map(str, tables))}, of "
                "which any may be logits; wrap the model so that it returns them alone or as 'logits', or pass "
                "target=None to calibrate the local axis alone"
            )
    return find_logits(output, network)


def batch_variables(logits: Tensor, batch: Batch, target: str) -> dict[str, Tensor]:
    """Compute every task variable of a batch from a loader; see :func:`task_variables`.

    Args:
        logits: [n, K] of the batch.
        batch: with labels or without.
        target: the task variable that is needed; without labels ``margin`` is not insisted on.

    Raises:
        TwoAxisError: the target needs labels that the batch does not have; logits or labels do not fit.

    Example:
        >>> from tp_twoaxis.runtime.inputs import Inputs
        >>> batch = Batch(0, Inputs((torch.zeros(3, 4),)), None)
        >>> list(batch_variables(torch.zeros(3, 2), batch, "margin"))
        ['predicted_margin', 'predicted_logit']
    """
    if batch.labels is None and target not in (*LABEL_FREE, "margin"):
        raise TwoAxisError(
            f"target {target!r} needs labels and batch {batch.number} has none; yield (images, labels) or choose one "
            f"of {', '.join(LABEL_FREE)}"
        )
    images = len(batch.inputs)
    if logits.ndim == 2 and len(logits) != images:
        raise TwoAxisError(
            f"expected logits [{images}, K] of the {images} images of batch {batch.number}, got {list(logits.shape)}; "
            "pass target=None to calibrate the local axis alone"
        )
    try:
        return task_variables(logits if logits.device.type != "mps" else logits.cpu(), batch.labels)
    except TwoAxisError as error:
        raise TwoAxisError(f"batch {batch.number}: {error}") from error


def count_columns(classes: int, labelled: bool) -> int:
    """Numbers of all task variables of an image.

    Example:
        >>> count_columns(10, True), count_columns(10, False)
        (15, 2)
    """
    return len(TARGETS) - 1 + classes if labelled else len(LABEL_FREE)


def class_indices(labels: Tensor, logits: Tensor) -> Tensor:
    """Check labels against logits [n, K]; int64 [n] on the logits' device.

    Raises:
        TwoAxisError: they are not class indices of that length and range.

    Example:
        >>> class_indices(torch.tensor([1, 0], dtype=torch.uint8), torch.zeros(2, 3))
        tensor([1, 0])
    """
    n, classes = logits.shape
    if labels.shape != (n,) or labels.is_floating_point() or labels.is_complex():
        raise TwoAxisError(
            f"expected labels as class indices [{n}], got {labels.dtype} {list(labels.shape)}; "
            "yield images alone to calibrate without labels"
        )
    labels = labels.to(logits.device, torch.int64)
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise TwoAxisError(
            f"expected labels in [0, {classes}), got {int(labels.min())} to {int(labels.max())}; "
            "the data set's classes do not match the model's outputs"
        )
    return labels
