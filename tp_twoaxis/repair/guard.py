"""Judge a repaired network as a whole, on images that no fit saw."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.flops import all_tensors
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.forward import forward_pass


def output_distance(network: nn.Module, dense: nn.Module, batches: Iterable[Any]) -> float:
    """Measure how far a network's outputs are from the dense network's, relative to their variance over images.

    Args:
        network: pruned.
        dense: its original.
        batches: of images, as a loader yields them.

    Returns:
        Sum over outputs of the mean squared distance, over the sum of their variances: 0 where nothing changed, 1
        where the outputs hold no more than their mean. Tensors of floats count, whatever structure they come in.

    Raises:
        TwoAxisError: the model has no such outputs.

    Example:
        >>> net, x = nn.Linear(2, 1), torch.randn(8, 2)
        >>> output_distance(net, net, [x])
        0.0
    """
    batches = list(batches)
    error = square = 0.0
    count = 0
    mean: list[Tensor] = []
    with (
        forward_pass(dense, batches, what="judge repair") as reference,
        forward_pass(network, batches, what="judge repair") as repaired,
    ):
        for batch, output in reference:
            wanted, got = _tensors(output), _tensors(repaired(batch))
            if not wanted or [t.shape for t in wanted] != [t.shape for t in got]:
                raise TwoAxisError(
                    f"repair: expected float outputs of the same shapes from {type(network).__name__} before and after "
                    f"removal, got {[list(t.shape) for t in wanted]} and {[list(t.shape) for t in got]}"
                )
            error += sum(float((a - b).square().sum()) for a, b in zip(wanted, got, strict=True))
            if not mean:  # the shift from which squares are summed, so that large means cancel nothing
                mean = [t.mean(0, keepdim=True) for t in wanted]
                sums = [torch.zeros_like(m) for m in mean]
            for i, t in enumerate(wanted):
                sums[i] += (t - mean[i]).sum(0, keepdim=True)
                square += float((t - mean[i]).square().sum())
            count += len(batch.inputs)
    variance = square - sum(float(s.square().sum()) for s in sums) / count
    if not math.isfinite(error):
        return math.inf
    return error / variance if variance > 0 else float(error > 0)


def _tensors(output: Any) -> list[Tensor]:
    return [t.double() for t in all_tensors(output) if t.is_floating_point() and t.ndim]
