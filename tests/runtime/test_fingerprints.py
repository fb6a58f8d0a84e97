"""A model's state is recognised, and changes of a layer or a model are noticed."""

import copy

import pytest
import torch
from baseline_cases import residual
from torch import nn

from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.runtime.fingerprints import ModelFingerprints, fingerprint


def test_a_state_is_that_of_its_model_and_of_copies():
    net = residual()
    state = ModelFingerprints.of_model(net)
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
    state = ModelFingerprints.of_model(net)
    state.verify(net)
    with torch.no_grad():
        change(net)
    with pytest.raises(StaleStatisticsError, match=message):
        state.verify(net, net.modules())


# one layer


def test_fingerprint_notices_a_change_of_any_parameter():
    layer = nn.Conv2d(4, 6, 3)
    before = fingerprint(layer)
    for parameter in (layer.weight, layer.bias):
        with torch.no_grad():
            parameter.view(-1)[-1].mul_(1 + 1e-6)
        assert fingerprint(layer) != before
        before = fingerprint(layer)
    assert fingerprint(layer.double()) != before
    attention = nn.MultiheadAttention(8, 2)
    before = fingerprint(attention)
    with torch.no_grad():
        attention.in_proj_weight[0, 0] += 1
    assert fingerprint(attention) != before


def test_fingerprint_covers_the_shape_and_tells_zeros_apart():
    same_bytes = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False), nn.Linear(12, 1, bias=False)
    for layer in same_bytes:
        nn.init.zeros_(layer.weight)
    assert len({fingerprint(layer) for layer in same_bytes}) == 3
    half, brain = nn.Linear(4, 4).half(), nn.Linear(4, 4).bfloat16()
    for layer in (half, brain):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    assert fingerprint(half) != fingerprint(brain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fingerprint_ignores_memory_format_gradient_and_mode(dtype):
    layer = nn.Conv2d(4, 6, 3).to(dtype)
    before = fingerprint(layer)
    assert len(before) == 32
    layer.to(memory_format=torch.channels_last).eval()
    layer.weight.grad = torch.ones_like(layer.weight)
    layer.requires_grad_(False)
    assert fingerprint(layer) == before
    again = nn.Conv2d(4, 6, 3).to(dtype)
    again.load_state_dict(layer.state_dict())
    assert fingerprint(again) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fingerprint_ignores_the_device():
    layer = nn.Conv2d(4, 6, 3)
    before = fingerprint(layer)
    assert fingerprint(layer.cuda()) == before
