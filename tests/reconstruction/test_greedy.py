"""Greedy reconstruction errors against trying every channel from scratch."""

import numpy as np
import pytest
import reference_scores
import torch

from tp_twoaxis import TwoAxisError
from tp_twoaxis.reconstruction import greedy
from tp_twoaxis.reconstruction.greedy import Reading, greedy_reconstruction

RIDGE = 1e-6


def reading(seed, inputs, channels, roots, outputs=5):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 3, generator=g).double() @ torch.randn(3, inputs, generator=g).double()
    x = x + 0.3 * torch.randn(200, inputs, generator=g).double()
    return Reading(
        torch.cov(x.T),
        torch.randn(outputs, inputs, generator=g).double(),
        torch.tensor(channels),
        torch.tensor(roots),
        1.0 + seed,
    )


def regularised(r):
    s = r.covariance + RIDGE * r.covariance.diagonal().mean() * torch.eye(len(r.covariance))
    return s.numpy(), r.weight.numpy(), r.channels.tolist(), r.roots.tolist(), r.power


@pytest.mark.parametrize(
    "readings",
    [
        [reading(0, 6, range(6), range(6))],
        [reading(1, 7, range(5), [3, 1, 0, 4, 2]), reading(2, 6, [5, 0, 1, 2, 3], range(5))],
        [reading(3, 8, range(8), [0, 0, 1, 1, 2, 2, 3, 3])],
    ],
    ids=["one consumer", "two consumers with inputs of other groups", "features behind a flattening"],
)
def test_errors_are_those_of_trying_every_channel(readings):
    size = 1 + max(int(r.roots.max()) for r in readings)
    order, errors = greedy_reconstruction(readings, size, ridge=RIDGE)
    if bool(torch.bincount(readings[0].roots).max() == 1):
        expected_order, expected = reference_scores.greedy_reconstruction([regularised(r) for r in readings], size)
        assert order.tolist() == expected_order
        np.testing.assert_allclose(errors, expected, rtol=1e-6)
    whole = reference_scores.reconstruction_error([regularised(r) for r in readings], set(range(size)))
    if bool(torch.bincount(readings[0].roots).max() == 1):
        assert float(errors.sum()) == pytest.approx(whole, rel=1e-6)
    assert sorted(order.tolist()) == list(range(size))


def test_relabelled_channels_are_removed_in_the_same_order():
    r = reading(4, 6, range(6), range(6))
    relabel = torch.tensor([4, 2, 0, 5, 1, 3])  # new number of each channel
    back = relabel.argsort()
    moved = Reading(r.covariance[back][:, back], r.weight[:, back], torch.arange(6), torch.arange(6), r.power)
    order, errors = greedy_reconstruction([r], 6)
    again, same = greedy_reconstruction([moved], 6)
    assert again.tolist() == relabel[order].tolist()
    torch.testing.assert_close(errors, same)


def test_constant_channels_are_removed_first_and_cost_nothing():
    r = reading(5, 4, range(4), range(4))
    covariance = r.covariance.clone()
    covariance[2] = covariance[:, 2] = 0.0
    order, errors = greedy_reconstruction([Reading(covariance, r.weight, r.channels, r.roots, r.power)], 4)
    assert order[0] == 2
    assert float(errors[0]) < 1e-3 * float(errors[1])


def test_a_group_without_consumers_is_an_error():
    with pytest.raises(TwoAxisError, match="at least one reading and ridge > 0, got 0"):
        greedy_reconstruction([], 3)


@pytest.mark.parametrize("seed", [5, 6])
def test_the_taps_of_a_channel_are_removed_together(seed):
    flat = reading(seed, 8, range(8), [0, 0, 1, 1, 2, 2, 3, 3])
    blocks = Reading(flat.covariance, flat.weight, torch.tensor([2, 0, 3]), torch.tensor([0, 1, 2]), flat.power, taps=2)
    columns = {0: 2, 1: 0, 2: 3}  # the group's channel -> the layer's

    def error(removed):
        return reference_scores.reconstruction_error([regularised(flat)], {columns[k] for k in removed})

    order, errors = greedy_reconstruction([blocks], 3, ridge=RIDGE)
    removed = set()
    for channel, increase in zip(order.tolist(), errors.tolist(), strict=True):
        trials = {k: error(removed | {k}) - error(removed) for k in set(range(3)) - removed}
        assert trials[channel] == min(trials.values())
        assert increase == pytest.approx(trials[channel], rel=1e-6)
        removed.add(channel)


@pytest.mark.parametrize("taps", [1, 2])
def test_wide_groups_lose_several_channels_in_a_round_in_the_same_order(taps, monkeypatch):
    size = 30
    flat = [reading(seed, size * taps, range(size), range(size), outputs=80) for seed in (7, 8)]
    readings = [Reading(r.covariance, r.weight, r.channels, r.roots, r.power, taps) for r in flat]
    order, errors = greedy_reconstruction(readings, size, ridge=RIDGE)
    monkeypatch.setattr(greedy, "ROUNDS", 10)
    again, same = greedy_reconstruction(readings, size, ridge=RIDGE)
    assert again.tolist() == order.tolist()
    torch.testing.assert_close(same, errors)


def test_channels_that_nobody_reads_leave_first_from_wide_groups(monkeypatch):
    monkeypatch.setattr(greedy, "ROUNDS", 3)
    r = reading(9, 6, range(6), [2, 3, 4, 5, 6, 8])  # the group has ten channels
    order, errors = greedy_reconstruction([r], 10, ridge=RIDGE)
    assert sorted(order[:4].tolist()) == [0, 1, 7, 9]
    assert errors[:4].tolist() == [0.0] * 4
    assert sorted(order.tolist()) == list(range(10))
