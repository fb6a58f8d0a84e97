"""Costs of levels are the cost model's of the masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_twoaxis.dependency.cost import CostModel, Side, Term
from tp_twoaxis.pruning.allocation_cost import AllocationCost
from tp_twoaxis.pruning.portions import ScoredGroup, portions_of


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_twin(seed):
    """Sides that lose channels of no, one or several groups, of groups that are not planned, and several at a time;
    what they keep falls with their channels or is read off a curve."""
    rng = np.random.default_rng(seed)
    sizes = {f"g{i}": int(rng.integers(2, 9)) for i in range(4)}
    sides = []
    for _ in range(5):
        lost = {name: rng.integers(0, 4, size).astype(float) for name, size in sizes.items() if rng.random() < 0.5}
        width = 50 + int(rng.integers(100))
        sides.append(Side(width, lost, rng.random(width + 1) if rng.random() < 0.5 else None))
    terms = [Term(float(rng.integers(1, 10**6)), tuple(rng.choice(sides, rng.integers(0, 4)))) for _ in range(6)]
    model = CostModel(terms)
    planned = [ScoredGroup(name, rng.random(size)) for name, size in sizes.items() if name != "g3"]
    portions = [portions_of(group, 0.2, 1 + int(rng.integers(2))) for group in planned]
    cost = AllocationCost(model, [group.name for group in planned], portions)
    for _ in range(10):
        levels = np.array([rng.integers(0, len(own) + 1) for own in portions])
        masks = {g.name: own.mask(taken) for g, own, taken in zip(planned, portions, levels, strict=True)}
        assert cost.macs(levels) == pytest.approx(model.macs(masks), rel=1e-14)


def test_networks_without_groups_or_layers():
    nothing = np.zeros(0, dtype=np.int64)
    assert AllocationCost(CostModel([]), [], []).macs(nothing) == 0.0
    assert AllocationCost(CostModel([Term(7.0, (Side(4, {"a": np.ones(4)}),))]), [], []).macs(nothing) == 7.0
    portions = portions_of(ScoredGroup("a", np.arange(4.0)), 0.1, 1)
    assert AllocationCost(CostModel([Term(7.0, ())]), ["a"], [portions]).macs(np.array([2])) == 7.0
