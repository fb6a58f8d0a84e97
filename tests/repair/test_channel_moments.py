"""Mean and variance of channels, against double precision over everything at once."""

from __future__ import annotations

import pytest
import torch

from tp_twoaxis.repair.channel_moments import ChannelMoments


@pytest.mark.parametrize("shape", [(9, 5), (9, 5, 4), (9, 5, 4, 3)])
@pytest.mark.parametrize("parts", [(9,), (1, 8), (4, 4, 1)])
def test_parts_give_the_moments_of_the_whole(shape, parts):
    x = 1e4 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    moments = ChannelMoments()
    for part in x.split(parts):
        moments.update(part)
    rows = x.double().movedim(1, -1).flatten(0, -2)
    assert moments.rows == len(rows)
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(moments.variance, rows.var(0), rtol=1e-5, atol=0)


def test_constants_have_no_scatter_however_large():
    moments = ChannelMoments()
    for _ in range(3):
        moments.update(torch.full((7, 2, 5, 5), 1234.567))
    assert moments.scatter.tolist() == [0.0, 0.0]


def test_half_precision_is_summed_in_single():
    x = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    moments = ChannelMoments()
    moments.update(x)
    torch.testing.assert_close(moments.variance, x.double().var(0), rtol=1e-4, atol=0)
