"""Portions of a group against a loop over its units, one at a time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_twoaxis import TwoAxisError
from tp_twoaxis.pruning.portions import ScoredGroup, leaving_order, portions_of


def slow_portions(group, min_keep, round_to):
    """By loops: the score and the channels of every portion."""
    size, units = len(group.scores), len(group.scores) // group.blocks // group.run
    constant = np.zeros(size, dtype=bool) if group.constant is None else group.constant
    blocks = []  # of each block its units in the order in which they may be taken, as (channels, score)
    for block in range(group.blocks):
        own = []
        for unit in range(units):
            channels = [(block * units + unit) * group.run + i for i in range(group.run)]
            own.append((channels, np.mean(group.scores[channels])))
        if not group.aligned:
            own.sort(key=lambda part: (not constant[part[0]].all(), part[1]))
        blocks.append(own)
    ranked = []
    for unit in range(units):
        channels = [channel for own in blocks for channel in own[unit][0]]
        score = -math.inf if constant[channels].all() else np.mean([own[unit][1] for own in blocks])
        ranked.append((score, channels))
    ranked.sort(key=lambda part: part[0])
    floor = max(1, math.ceil(min_keep * (group.width or size)))
    portions, waiting, kept = [], [], size
    for score, channels in ranked:
        waiting, kept = waiting + channels, kept - len(channels)
        if kept >= floor and kept % round_to == 0 and (group.widths is None or kept in group.widths):
            portions.append((score, sorted(waiting)))
            waiting = []
    return portions


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_twin(data):
    blocks, run, units = (data.draw(st.integers(1, most)) for most in (3, 3, 7))
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    size = blocks * run * units
    constant = rng.random(size) < 0.4 if data.draw(st.booleans()) else None
    widths = tuple(range(0, size, 4)) if data.draw(st.booleans()) else None
    scores, aligned = rng.integers(0, 5, size).astype(float), data.draw(st.booleans())
    group = ScoredGroup("g", scores, blocks, run, aligned=aligned, constant=constant, widths=widths)
    min_keep, round_to = data.draw(st.sampled_from([0.01, 0.3, 1.0])), data.draw(st.sampled_from([1, 2, 6]))
    portions, slow = portions_of(group, min_keep, round_to), slow_portions(group, min_keep, round_to)
    assert len(portions) == len(slow)
    gone = np.zeros(size, dtype=bool)
    assert np.array_equal(portions.mask(0), gone)
    for taken, (score, channels) in enumerate(slow, 1):
        gone[channels] = True
        assert portions.scores[taken - 1] == pytest.approx(score)
        assert np.array_equal(portions.mask(taken), gone)
        assert portions.gone[taken] == gone.sum()
    assert (np.diff(portions.gone) > 0).all()
    assert sorted(portions.order) == list(range(size))


def test_groups_take_turns_by_score_and_equal_ones_in_order():
    groups = [ScoredGroup("a", np.array([2.0, 2.0, 5.0, 9.0])), ScoredGroup("b", np.array([1.0, 2.0, 9.0]))]
    assert leaving_order([portions_of(group, 0.1, 1) for group in groups]).tolist() == [1, 0, 0, 1, 0]
    assert leaving_order([portions_of(group, 1.0, 1) for group in groups]).tolist() == []
    assert leaving_order([]).tolist() == []


def test_what_does_not_split_is_refused():
    with pytest.raises(TwoAxisError, match="g: 12 channels do not split into 5 blocks of runs of 1"):
        portions_of(ScoredGroup("g", np.zeros(12), 5), 0.1, 1)
