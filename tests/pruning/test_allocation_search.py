"""The search for an allocation against every allocation there is."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_twoaxis.pruning.allocation_search import nearest_allocation


def departure(allocation, start, penalties):
    return sum(
        sum(own[min(level, home) : max(level, home)])
        for level, home, own in zip(allocation, start, penalties, strict=True)
    )


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_nearest_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    penalties = [rng.random(rng.integers(1, 5)).tolist() for _ in range(3)]
    start = tuple(int(rng.integers(0, len(own) + 1)) for own in penalties)
    every = list(itertools.product(*(range(len(own) + 1) for own in penalties)))
    wanted = {allocation for allocation in every if rng.random() < 0.05}
    found = nearest_allocation(start, penalties, wanted.__contains__)
    if not wanted:
        assert found is None
        return
    assert found in wanted
    least = min(departure(allocation, start, penalties) for allocation in wanted)
    assert departure(found, start, penalties) == pytest.approx(least)


def test_the_start_itself_comes_first_and_nothing_is_looked_at_twice():
    seen = []

    def fits(allocation):
        seen.append(allocation)
        return False

    assert nearest_allocation((1, 1), [[0.5, 0.1], [0.2, 0.3]], fits) is None
    assert seen[0] == (1, 1)
    assert len(seen) == len(set(seen)) == 9
    assert nearest_allocation((1, 1), [[0.5, 0.1], [0.2, 0.3]], lambda allocation: True) == (1, 1)


def test_work_is_bounded():
    looked_at = []
    penalties = [[1.0] * 8 for _ in range(20)]
    assert nearest_allocation((4,) * 20, penalties, lambda a: bool(looked_at.append(a)), limit=100) is None
    assert len(looked_at) == 100
    assert len(set(looked_at)) == 100
    assert departure(looked_at[-1], looked_at[0], penalties) == 2.0


def test_every_allocation_comes_once_in_the_order_of_departure():
    rng = np.random.default_rng(1)
    penalties = [rng.random(size).tolist() for size in (3, 0, 4, 2)]
    penalties[0][1] = 0.0  # a tie with the threshold
    penalties[2][3] = math.inf  # a channel that leaves before any other
    looked_at = []
    assert nearest_allocation((1, 0, 2, 2), penalties, lambda a: bool(looked_at.append(a))) is None
    every = list(itertools.product(range(4), range(1), range(5), range(3)))
    assert sorted(looked_at) == every
    departures = [departure(allocation, looked_at[0], penalties) for allocation in looked_at]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(departures))
