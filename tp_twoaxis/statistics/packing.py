"""Moments as tensors without what symmetry repeats: half the file, and half of what ranks send each other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tp_twoaxis.statistics.moments import CoMoments


def packed_length(moments: CoMoments) -> int:
    """Numbers that :func:`packed` keeps of a scatter.

    Example:
        >>> packed_length(CoMoments(3)), packed_length(CoMoments(3, 2))
        (6, 6)
    """
    rows, columns = moments.scatter.shape
    return rows * columns if moments.paired else rows * (rows + 1) // 2


def packed(scatter: Tensor, *, paired: bool) -> Tensor:
    """Flatten a scatter: its upper triangle, or all of it where two kinds of rows are paired.

    Example:
        >>> packed(torch.tensor([[1.0, 2.0], [2.0, 3.0]]), paired=False)
        tensor([1., 2., 3.])
    """
    if paired:
        return scatter.flatten()
    upper = torch.triu_indices(*scatter.shape, device=scatter.device)
    return scatter[upper[0], upper[1]]


def unpacked(numbers: Tensor, width: int, other_width: int | None = None) -> Tensor:
    """Rebuild a scatter [D, E] from what :func:`packed` made; without ``other_width`` it is symmetric.

    Example:
        >>> unpacked(torch.tensor([1.0, 2.0, 3.0]), 2)
        tensor([[1., 2.],
                [2., 3.]])
    """
    if other_width is not None:
        return numbers.reshape(width, other_width)
    scatter = numbers.new_zeros(width, width)
    upper = torch.triu_indices(width, width, device=numbers.device)
    scatter[upper[0], upper[1]] = numbers
    scatter.T[upper[0], upper[1]] = numbers
    return scatter


def pack(key: str, moments: CoMoments) -> dict[str, Tensor]:
    """Name the tensors of moments for a file.

    Example:
        >>> {name: list(tensor.shape) for name, tensor in pack("conv1/rows", CoMoments(3)).items()}
        {'conv1/rows.mean': [3], 'conv1/rows.upper': [6]}
    """
    if moments.paired:
        return {
            f"{key}.mean": moments.mean,
            f"{key}.other_mean": moments.other_mean,
            f"{key}.scatter": moments.scatter,
        }
    return {f"{key}.mean": moments.mean, f"{key}.upper": packed(moments.scatter, paired=False)}


def unpack(key: str, tensors: Mapping[str, Tensor], sizes: dict[str, tuple[int, float]]) -> CoMoments | None:
    """Rebuild moments from their tensors and their (count, weight); None where the file has none of this name."""
    if key not in sizes:
        return None
    count, weight = sizes[key]
    mean = tensors[f"{key}.mean"]
    if f"{key}.upper" in tensors:
        return CoMoments.from_parts(count, mean, unpacked(tensors[f"{key}.upper"], len(mean)), weight=weight)
    other = tensors[f"{key}.other_mean"]
    return CoMoments.from_parts(count, mean, tensors[f"{key}.scatter"], other, weight=weight)
