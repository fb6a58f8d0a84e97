"""Whatever the network: what is left computes what the dense one computes without the channels that left."""

import copy
import time

import pytest
import torch
from removal_cases import CASES
from removal_oracle import difference, expected_outputs, run

from tp_twoaxis import TwoAxisError, prune_to_flops
from tp_twoaxis.errors import UnreachableTargetError

SECONDS = 30.0
"""A bound that catches a listing without end, not a slow machine; each network takes about a second or less."""


def random_scores(group):
    size = len(group[0].idxs)
    return torch.rand(size, generator=torch.Generator().manual_seed(size))


def prune(net, case):
    return prune_to_flops(
        net,
        case.inputs(),
        random_scores,
        flops=case.flops,
        tolerance=0.1,
        repair=(),
        progress=False,
    )


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_computes_what_it_computed_before(name):
    case, start = CASES[name], time.perf_counter()
    net = case.network()
    dense, inputs = case.network(), case.inputs()  # weight_norm's hook bars copies
    if case.outcome in ("whole", "refused"):
        with pytest.raises(UnreachableTargetError if case.outcome == "whole" else TwoAxisError) as refusal:
            prune(net, case)
        assert case.note in str(refusal.value)
        assert difference(run(net, inputs), run(dense, inputs)) == 0.0
        assert time.perf_counter() - start < SECONDS
        return
    report = prune(net, case)
    assert time.perf_counter() - start < SECONDS
    assert report.removed_channels
    assert report.achieved < 1.0
    assert any(case.note in note for note in report.notes) or not case.note
    assert not (case.clean and report.notes)
    found = run(net, inputs)
    if case.outcome == "runs":
        assert [t.shape for t in found] == [t.shape for t in run(dense, inputs)]
    else:
        assert difference(found, expected_outputs(dense, report.removed_channels, inputs)) < 1e-6


def test_the_oracle_sees_a_layer_that_lost_another_input():
    case = CASES["LSTM that reads channels"]
    net = case.network()
    dense, inputs = copy.deepcopy(net), case.inputs()
    report = prune(net, case)
    with torch.no_grad():
        net.rnn.weight_ih_l0.copy_(net.rnn.weight_ih_l0.roll(1, 1))
    assert difference(run(net, inputs), expected_outputs(dense, report.removed_channels, inputs)) > 1e-3
