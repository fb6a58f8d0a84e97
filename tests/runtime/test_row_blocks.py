"""Blocks of rows are the whole matrix, each row once and in order."""

import pytest
import torch

from tp_twoaxis.runtime.row_blocks import row_blocks


@pytest.mark.parametrize(
    ("rows", "columns", "numbers"), [(7, 5, 10), (7, 5, 1), (7, 5, 35), (1, 1, 1), (0, 3, 4), (3, 0, 4)]
)
def test_the_blocks_are_the_matrix(rows, columns, numbers):
    matrix = torch.arange(rows * columns).reshape(rows, columns)
    blocks = list(row_blocks(matrix, numbers))
    assert all(torch.equal(block, matrix[start : start + len(block)]) for start, block in blocks)
    assert sum(len(block) for _, block in blocks) == rows
    assert all(len(block) == 1 or block.numel() <= numbers for _, block in blocks)


def test_blocks_are_views():
    matrix = torch.zeros(4, 3)
    for _, block in row_blocks(matrix, 6):
        block += 1.0
    assert torch.equal(matrix, torch.ones(4, 3))
