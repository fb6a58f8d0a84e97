"""A model's state is recognised, and changes of it are noticed."""

import copy

import pytest
import torch
from baseline_cases import residual
from torch import nn

from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.statistics.freshness import ModelState


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
