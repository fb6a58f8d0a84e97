"""Networks timed side by side, on a clock that the layers move on."""

import numpy as np
import pytest
import torch
from latency_cases import CHAIN_INPUT, chain, fake_time, true_seconds
from pruning_cases import assert_unchanged, everything
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.dependency.latency import compare_latency, layer_shares, relative_latencies


def test_a_ratio_is_that_of_the_times(monkeypatch):
    wide, narrow = chain(32, 32), chain(16, 24)
    with fake_time(monkeypatch) as clock:
        expected = true_seconds(clock, narrow) / true_seconds(clock, wide)
        found = compare_latency(narrow, wide, CHAIN_INPUT)
        assert found.ratio == pytest.approx(expected)
        assert found.standard_error == pytest.approx(0.0, abs=1e-9)
        assert found.milliseconds[0] == pytest.approx(1000 * true_seconds(clock, narrow))
        assert found.milliseconds[0] / found.milliseconds[1] == pytest.approx(expected)


def test_a_machine_that_slows_down_changes_no_ratio(monkeypatch):
    """Twice as slow after the tenth of what it runs, and slower with every layer: both networks are."""
    wide, narrow = chain(32, 32), chain(16, 24)
    run = iter(range(10**6))
    with fake_time(monkeypatch) as clock:
        expected = true_seconds(clock, narrow) / true_seconds(clock, wide)
        clock.speed = lambda: (2.0 if (k := next(run)) > 100 else 1.0) * 1.0005**k
        assert compare_latency(narrow, wide, CHAIN_INPUT).ratio == pytest.approx(expected, rel=0.02)
        (relative,) = relative_latencies((wide, CHAIN_INPUT), [(narrow, CHAIN_INPUT)], rounds=9)
        assert relative == pytest.approx(expected, rel=0.02)


def test_an_unsteady_machine_is_asked_more_often_and_the_error_is_honest(monkeypatch):
    wide, narrow = chain(16, 16), chain(8, 8)
    rng = np.random.default_rng(0)
    found = []
    with fake_time(monkeypatch) as clock:
        expected = true_seconds(clock, narrow) / true_seconds(clock, wide)
        clock.speed = lambda: float(rng.lognormal(0.0, 0.2))
        found = [compare_latency(narrow, wide, CHAIN_INPUT) for _ in range(12)]
    errors = np.array([ratio.ratio - expected for ratio in found])
    assert np.sqrt(np.mean(errors**2)) < 2 * np.mean([ratio.standard_error for ratio in found])
    assert np.sqrt(np.mean(errors**2)) < 0.05 * expected


def test_layers_share_the_time_of_a_pass(monkeypatch):
    net = chain(16, 24)
    convs = [module for module in net if isinstance(module, nn.Conv2d)]
    with fake_time(monkeypatch, overhead=1e-3) as clock:
        whole = true_seconds(clock, net)
        shares, milliseconds = layer_shares(net, CHAIN_INPUT, convs, rounds=3)
        assert milliseconds == pytest.approx(1000 * whole)
        for layer, share in shares.items():
            read = torch.zeros(2, layer.in_channels, 6, 6)
            assert share * whole == pytest.approx(true_seconds(clock, layer, read))
    assert sum(shares.values()) < 1.0


def test_the_network_stays_as_it_was():
    net, other = chain(8, 8).train(), chain(8)
    before = everything(net)
    compare_latency(net, other, CHAIN_INPUT)
    layer_shares(net, CHAIN_INPUT, [net[0]], rounds=1)
    assert_unchanged(net, before)


def test_what_cannot_compute_is_refused():
    net = chain(8)
    with pytest.raises(TwoAxisError, match="got meta tensors"):
        compare_latency(net, net.to("meta"), CHAIN_INPUT)
