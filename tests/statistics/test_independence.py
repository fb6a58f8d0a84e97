"""Drops of the nuclear norm by one decomposition equal those by one a channel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_baselines import channel_independence
from torch import nn

from tp_twoaxis.statistics.nuclear_norms import ChannelIndependence, nuclear_norm_drops

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


CASES = {
    "wide": randn(3, 6, 50),
    "tall": randn(3, 40, 6),
    "square": randn(2, 20, 20),
    "one position": randn(3, 12, 1),
    "one channel": randn(3, 1, 9),
    "of rank one": randn(3, 8, 1) @ randn(3, 1, 9),
    "repeated rows": randn(2, 3, 30)[:, [0, 0, 1, 2, 2, 2]],
    "dead rows": randn(2, 4, 30) * torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None],
    "scales far apart": randn(2, 8, 20) * torch.logspace(-6, 3, 8, dtype=torch.float64)[:, None],
    "nothing": torch.zeros(2, 5, 4),
    "tiny": 1e-20 * randn(2, 4, 7),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_decomposition_a_channel(name):
    maps = CASES[name]
    largest = max(float(torch.linalg.matrix_norm(maps, ord=2).max()), 1e-300)
    got = nuclear_norm_drops(maps).mean(0).numpy()
    np.testing.assert_allclose(got / largest, channel_independence(maps.numpy()) / largest, atol=1e-7)
    assert (got >= 0).all()


@given(st.integers(1, 12), st.integers(1, 12), st.floats(1e-6, 1e6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_scaling_scales_and_permuting_permutes(channels, positions, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(channels, positions, generator=generator, dtype=torch.float64).relu()
    order = torch.randperm(channels, generator=generator)
    drops = nuclear_norm_drops(maps)
    room = 1e-7 * float(maps.norm())
    torch.testing.assert_close(nuclear_norm_drops(scale * maps), scale * drops, rtol=1e-6, atol=scale * room)
    torch.testing.assert_close(nuclear_norm_drops(maps[order]), drops[order], rtol=1e-6, atol=room)


def test_orthogonal_rows_lose_their_own_length():
    maps = torch.linalg.qr(randn(30, 5)).Q.T * torch.arange(1.0, 6.0)[:, None]
    torch.testing.assert_close(nuclear_norm_drops(maps), torch.arange(1.0, 6.0, dtype=torch.float64))


def test_blocks_are_memory_only(monkeypatch):
    maps = randn(7, 5, 9)
    wanted = nuclear_norm_drops(maps).mean(0)
    for block in (1, 100, 10**9):
        monkeypatch.setattr("tp_twoaxis.statistics.nuclear_norms._BLOCK_NUMBERS", block)
        independence = ChannelIndependence(nn.Conv2d(5, 1, 1))
        independence.update(maps.mT, maps)
        torch.testing.assert_close(independence.mean, wanted)
        assert (independence.images, independence.positions) == (7, 9)
