"""Packed scatters come back to the last bit, in half the numbers where they are symmetric."""

import pytest
import torch

from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.packing import pack, packed, packed_length, unpack, unpacked


@pytest.mark.parametrize(("width", "other_width", "length"), [(5, None, 15), (5, 2, 10), (1, None, 1), (4, 0, 0)])
def test_moments_survive_packing(width, other_width, length):
    moments = CoMoments(width, other_width)
    rows = torch.randn(20, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments.update(rows, None if other_width is None else rows[:, :other_width], weight=3.0)
    numbers = packed(moments.scatter, paired=moments.paired)
    assert len(numbers) == packed_length(moments) == length
    assert torch.equal(unpacked(numbers, width, other_width), moments.scatter)
    again = unpack("conv1/rows", pack("conv1/rows", moments), {"conv1/rows": (20, 60.0)})
    assert (again.count, again.weight, again.paired) == (20, 60.0, moments.paired)
    assert torch.equal(again.scatter, moments.scatter)
    assert torch.equal(again.mean, moments.mean)
    assert torch.equal(again.other_mean, moments.other_mean)


def test_moments_that_a_file_does_not_have():
    assert unpack("conv1/cross", {}, {}) is None
