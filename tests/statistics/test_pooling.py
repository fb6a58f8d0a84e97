"""Averages over positions against float64, in every layout, near zero and far from it."""

import pytest
import torch

from tp_twoaxis.scores.information import information_from_correlation
from tp_twoaxis.statistics.pooling import FAR, pooled_means


def maps(mean, spread, n=40, channels=5, size=12):
    generator = torch.Generator().manual_seed(0)
    each = spread * torch.randn(n, channels, 1, 1, generator=generator)
    return (
        mean * torch.linspace(1, 2, channels)[:, None, None]
        + each
        + torch.randn(n, channels, size, size, generator=generator)
    )


@pytest.mark.parametrize("layout", ["first", "last", "tokens"])
@pytest.mark.parametrize("mean", [0.0, 10.0, 1e4])
def test_equals_float64(layout, mean):
    y = maps(mean, 0.1)
    view = y.movedim(1, -1).reshape(40, -1, 5) if layout == "first" else y.flatten(2).mT.contiguous()
    view = y.flatten(2).mT if layout == "first" else view
    expected = view.double().mean(1)
    found = pooled_means(view).double()
    error = (found - expected).abs().max(0).values / expected.std(0)
    assert float(error.max()) < 8 * FAR * 2**-24


def test_far_channels_alone_are_summed_in_float64():
    y = maps(1.0, 0.5)
    y[:, 2] += 1e4
    view = y.flatten(2).mT
    found = pooled_means(view)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found[:, 2], view[:, :, 2].double().mean(1), rtol=1e-14, atol=0)
    assert pooled_means(view[:, :, [0, 1, 3, 4]]).dtype == torch.float32


def test_a_large_mean_loses_no_task_information():
    generator = torch.Generator().manual_seed(0)
    task = torch.randn(500, generator=generator, dtype=torch.float64)
    noise = torch.randn(500, generator=generator, dtype=torch.float64)
    pooled = 1e4 + 0.05 * (task + 2e-3 * noise)
    # positions differ by whole steps of float32 at this mean, so that each image's average is what it was meant to be
    view = (pooled[:, None] + torch.linspace(-1, 1, 4096, dtype=torch.float64)).float()[..., None]
    for values, least in ((pooled_means(view)[:, 0].double(), 5.5), (view.mean(1)[:, 0].double(), 0.0)):
        rho = torch.corrcoef(torch.stack([values, task]))[0, 1]
        information = float(information_from_correlation(rho))
        assert information > least
    assert information < 5.5


def test_values_that_are_not_finite_stay_so():
    view = torch.zeros(3, 4, 2)
    view[1, 2, 1] = torch.inf
    assert not torch.isfinite(pooled_means(view)[1, 1])
