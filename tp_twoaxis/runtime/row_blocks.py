"""Work on a large matrix a few rows at a time: what is computed of them stays in the cache, and needs little memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

BLOCK_NUMBERS = 2**16
"""Numbers of a block; with half a dozen temporaries of float64 they fit a processor's second-level cache."""


def row_blocks(matrix: Tensor, numbers: int = BLOCK_NUMBERS) -> Iterator[tuple[int, Tensor]]:
    """Cut a matrix into blocks of neighbouring rows.

    Args:
        matrix: [n, m].
        numbers: of the matrix in a block, at most, but at least one row.

    Yields:
        The number of the first row, and a view of the rows.

    Example:
        >>> import torch
        >>> [(start, rows.shape) for start, rows in row_blocks(torch.zeros(5, 10), numbers=25)]
        [(0, torch.Size([2, 10])), (2, torch.Size([2, 10])), (4, torch.Size([1, 10]))]
    """
    height = max(1, numbers // max(matrix.shape[1], 1))
    for start in range(0, len(matrix), height):
        yield start, matrix[start : start + height]
