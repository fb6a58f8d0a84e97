"""Moments of what layers read, and the model state that they hold for."""

import copy

import numpy as np
import pytest
import torch
from baseline_cases import residual
from cases import batches
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.statistics import reader_inputs
from tp_twoaxis.statistics.freshness import ModelState
from tp_twoaxis.statistics.reader_inputs import InputMoments, gather_reader_inputs


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("block", [1, 2**20])
def test_moments_in_any_parts(monkeypatch, offset, block):
    monkeypatch.setattr(reader_inputs, "BLOCK_NUMBERS", block)
    rows = offset + torch.randn(11, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = InputMoments(nn.Linear(3, 1))
    for part in rows.split(4):
        moments.update(part, part)
    flat = rows.reshape(-1, 3).numpy()
    assert moments.count == 55
    np.testing.assert_allclose(moments.mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, flat.var(0), rtol=1e-6)
    np.testing.assert_allclose(moments.root_mean_square, np.sqrt((flat**2).mean(0)), rtol=1e-10)


def test_layers_called_twice_see_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    x = torch.randn(6, 4)
    net = Twice()
    moments = gather_reader_inputs(net, [x], InputMoments, progress=False).records["layer"]
    torch.testing.assert_close(moments.mean, torch.cat([x, net.layer(x)]).mean(0).double(), rtol=1e-5, atol=1e-6)


def test_wrappers_and_limits():
    net = nn.DataParallel(residual())
    statistics = gather_reader_inputs(net, batches(images=20), InputMoments, max_images=9, progress=False)
    assert statistics.num_images == 9
    assert list(statistics.records) == ["first", "second", "fc"]
    with pytest.raises(TwoAxisError, match="no convolution or linear layer"):
        gather_reader_inputs(nn.ReLU(), batches(), InputMoments, progress=False)


def test_a_state_knows_its_model_and_copies_of_it():
    net = residual()
    state = ModelState(net)
    state.verify(net)
    state.verify(copy.deepcopy(net))
    state.verify(net, net.modules())
    net.bn_first.num_batches_tracked += 1  # no part of the function
    state.verify(net)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.fc.weight.data.mul_(2), "fc: its parameters"),
        (lambda net: net.bn_second.running_mean.add_(1), "bn_second: its parameters or running statistics"),
        (lambda net: setattr(net, "fc", nn.Linear(24, 4)), r"fc: .*weight \[5, 24\].*weight \[4, 24\].*pruned"),
        (lambda net: delattr(net, "fc"), "no such layer"),
        (lambda net: net.double(), "trained, repaired or cast"),
    ],
)
def test_changes_are_noticed(change, message):
    net = residual()
    state = ModelState(net)
    state.verify(net)
    with torch.no_grad():
        change(net)
    with pytest.raises(StaleStatisticsError, match=message):
        state.verify(net, net.modules())
