"""Large means with small spreads, float64 models, inference mode: the statistics of what the model computes."""

import numpy as np
import pytest
import reference
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import CalibrationStatistics, calibrate
from tp_twoaxis.statistics.activations import AdjacentMoments


def shifted(bias, channels=6, dtype=torch.float32):
    """A convolution whose outputs lie far from zero, by a different amount each."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, channels, 3, dtype=dtype)
    with torch.no_grad():
        conv.bias += bias * torch.linspace(1, 2, channels)
    return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5, dtype=dtype))


@pytest.mark.parametrize("bias", [0.0, 1e2, 1e4, 1e5])
@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_a_float32_model_far_from_zero(bias, batch_size):
    net, loader = shifted(bias), batches(60, batch_size, size=18)
    rows = reference.emitted(net, [x for x, _ in loader], {"0": net[0]})["0"]
    flat, pooled = reference.flat(rows), rows.mean(1)
    found = calibrate(net, loader, positions="all", progress=False)["0"]
    spread, of_pooled = flat.var(0), pooled.var(0)
    assert reference.relative_error(found.covariance, reference.covariance(flat), spread, spread) < 1e-6
    expected = reference.covariance(pooled)
    assert reference.relative_error(found.pooled.covariance, expected, of_pooled, of_pooled) < 1e-5
    np.testing.assert_allclose(found.pooled_correlation, reference.correlation(pooled), atol=1e-5)
    assert (found.variance > 0).all()


@pytest.mark.parametrize("bias", [1e2, 1e6, 1e10])
def test_a_float64_model_far_from_zero_has_no_constant_channels(bias, tmp_path):
    net = shifted(bias, dtype=torch.float64)
    loader = [(x.double() * 1e-2, y) for x, y in batches(60, 7)]
    stats = calibrate(net, loader, positions="all", consumers=True, progress=False)
    rows = reference.flat(reference.emitted(net, [x for x, _ in loader], {"0": net[0]})["0"])
    assert stats["0"].dtype == torch.float64
    assert (stats["0"].variance > 0).all()
    np.testing.assert_allclose(stats["0"].variance, rows.var(0), rtol=1e-3)
    stats.save(tmp_path / "a")
    assert torch.equal(CalibrationStatistics.load(tmp_path / "a")["0"].variance, stats["0"].variance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_channel_far_from_zero_is_constant(dtype):
    net = shifted(1e4, dtype=dtype)
    with torch.no_grad():
        net[0].weight[2] = 0
    stats = calibrate(net, [(x.to(dtype), y) for x, y in batches(60, 7)], progress=False)["0"]
    assert stats.variance[2] == 0
    assert (stats.variance[[0, 1, 3, 4, 5]] > 0).all()
    assert not stats.pooled_correlation[2, [0, 1]].any()
    assert stats.target_correlation()[2] == 0


def test_a_float64_model_loses_nothing_to_float32():
    net, loader = conv_net().double(), [(x.double(), y) for x, y in batches()]
    stats = calibrate(net, loader, positions="all", gradients=True, consumers=True, progress=False)
    rows = reference.emitted(net, [x for x, _ in loader], {"conv2": net.conv2})["conv2"]
    flat, pooled = reference.flat(rows), rows.mean(1)
    np.testing.assert_allclose(stats["conv2"].covariance, reference.covariance(flat), rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(stats["conv2"].pooled.covariance, reference.covariance(pooled), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_adjacent_moments_keep_their_digits(shift):
    moments = AdjacentMoments(nn.Conv2d(3, 5, 1))
    generator = torch.Generator().manual_seed(0)
    read, written = (torch.randn(40, 32, c, generator=generator, dtype=torch.float64) + shift for c in (3, 5))
    moments.update(read, written)
    x, y = (side.view(40, 16, 2, -1).mean(2).flatten(0, 1) for side in (read, written))
    torch.testing.assert_close(moments.cross_covariance, torch.cov(torch.cat([x, y], 1).T, correction=0)[:3, 3:])
    torch.testing.assert_close(moments.output_covariance, torch.cov(y.T, correction=0))


def test_calibration_inside_inference_mode():
    net = conv_net()
    options = {"gradients": True, "consumers": True, "progress": False}
    expected = calibrate(net, batches(), **options)
    with torch.inference_mode():
        loader = batches()  # tensors of inference mode
        assert loader[0][0].is_inference()
        found, other = (calibrate(net, loader, **options) for _ in range(2))
        other.merge(found)
    for mine, theirs in zip(found._moments(), expected._moments(), strict=True):
        assert torch.equal(mine.scatter, theirs.scatter)
    found.merge(other)  # outside of it
    assert found.num_images == 3 * 48


def test_files_read_inside_inference_mode_can_be_merged_outside(tmp_path):
    calibrate(conv_net(), batches(), progress=False).save(tmp_path / "a")
    with torch.inference_mode():
        first, second = (CalibrationStatistics.load(tmp_path / "a") for _ in range(2))
    assert first.merge(second).num_images == 96
