"""Orders: handing values out, and the annealed order against a twin that empties a layer channel by channel."""

import numpy as np
import pytest
import reference_scores as twin
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_twoaxis.scores.quantiles import annealed_quantiles, assign_by_rank

numbers = st.lists(st.floats(-5, 5), min_size=1, max_size=12)


@given(numbers, st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_handing_out_keeps_the_values_and_takes_the_order(values, seed):
    v = torch.tensor(values, dtype=torch.float64)
    ranking = torch.rand(len(v), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = assign_by_rank(v, ranking)
    assert got.sort().values.tolist() == sorted(values)
    assert (got[ranking.argsort()].diff() >= 0).all()
    np.testing.assert_array_equal(got.numpy(), twin.assign_by_rank(values, ranking.tolist()))


def test_ties_in_the_ranking_go_by_the_values():
    values = torch.tensor([3.0, 1.0, 2.0, 9.0])
    assert torch.equal(assign_by_rank(values, torch.zeros(4)), values)
    assert assign_by_rank(values, torch.tensor([1.0, 1.0, 0.0, 0.0])).tolist() == [9.0, 3.0, 1.0, 2.0]


@pytest.mark.parametrize("removed", [0.0, 0.4])
@pytest.mark.parametrize("channels", [1, 2, 9])
def test_annealed_twin(channels, removed):
    generator = torch.Generator().manual_seed(channels)
    early, late = (torch.randn(channels, generator=generator, dtype=torch.float64) for _ in range(2))
    slow = twin.annealed(early.tolist(), late.tolist(), removed)
    np.testing.assert_allclose(annealed_quantiles(early, late, removed=removed).numpy(), slow)


def test_annealing_begins_with_one_criterion_and_ends_with_the_other():
    early, late = torch.tensor([0.0, 5.0, 5.0, 5.0]), torch.tensor([9.0, 1.0, 2.0, 3.0])
    quantiles = annealed_quantiles(early, late)
    assert quantiles[0] == 0.25  # worst by the first criterion, best by the second
    assert annealed_quantiles(early, late, removed=0.9)[0] == 1.0
    assert torch.equal(annealed_quantiles(early, early).argsort(), early.argsort(stable=True))
