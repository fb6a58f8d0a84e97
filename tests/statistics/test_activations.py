"""Moments of what layers read."""

import numpy as np
import pytest
import torch
from baseline_cases import residual
from cases import batches
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.statistics import activations
from tp_twoaxis.statistics.activations import AdjacentMoments, InputMoments, gather_activations
from tp_twoaxis.statistics.nuclear_norms import ChannelIndependence


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("block", [1, 2**20])
def test_moments_in_any_parts(monkeypatch, offset, block):
    monkeypatch.setattr(activations, "BLOCK_NUMBERS", block)
    rows = offset + torch.randn(11, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = InputMoments(nn.Linear(3, 1))
    for part in rows.split(4):
        moments.update(part, part)
    flat = rows.reshape(-1, 3).numpy()
    assert moments.count == 55
    np.testing.assert_allclose(moments.mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, flat.var(0), rtol=1e-6)
    np.testing.assert_allclose(moments.root_mean_square, np.sqrt((flat**2).mean(0)), rtol=1e-10)


@pytest.mark.parametrize("accumulator", [InputMoments, AdjacentMoments, ChannelIndependence])
def test_constant_channels_are_known_up_to_rounding(accumulator):
    read = torch.randn(6, 20, 5, generator=torch.Generator().manual_seed(0))
    read[..., 1] = 0.1  # float32's 0.1, whose mean rounds
    read[..., 3] = 0.0
    read[..., 4] = 1e3 + 1e-2 * read[..., 4]  # varies, if little beside its mean
    record = accumulator(nn.Linear(5, 2))
    for part in read.split(2):
        record.update(part, part[..., :2])
    assert record.varying.tolist() == [True, False, True, False, True]


def test_layers_called_twice_see_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    x = torch.randn(6, 4)
    net = Twice()
    moments = gather_activations(net, [x], InputMoments, progress=False).records["layer"]
    torch.testing.assert_close(moments.mean, torch.cat([x, net.layer(x)]).mean(0).double(), rtol=1e-5, atol=1e-6)


def test_wrappers_and_limits():
    net = nn.DataParallel(residual())
    statistics = gather_activations(net, batches(images=20), InputMoments, max_images=9, progress=False)
    assert statistics.num_images == 9
    assert list(statistics.records) == ["first", "second", "fc"]
    with pytest.raises(TwoAxisError, match="no convolution or linear layer"):
        gather_activations(nn.ReLU(), batches(), InputMoments, progress=False)
