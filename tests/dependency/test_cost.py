"""The cost model's arithmetic; that it matches the counter on networks is tested with the graph."""

import numpy as np
import pytest

from tp_twoaxis.dependency.cost import CostModel, Side, Term


def mask(size, *removed):
    out = np.zeros(size, dtype=bool)
    out[list(removed)] = True
    return out


def test_two_layer_product():
    # conv a [4 of 3], conv b [6 of 4]: a's outputs are b's inputs
    out_a, in_b, out_b = Side(4, {"a": np.ones(4)}), Side(4, {"a": np.ones(4)}), Side(6, {"b": np.ones(6)})
    cost = CostModel([Term(4 * 3 * 100.0, (out_a,)), Term(6 * 4 * 100.0, (in_b, out_b)), Term(7.0, ())])
    assert cost.dense == cost.macs({}) == 1200 + 2400 + 7
    assert cost.macs({"a": mask(4, 0)}) == pytest.approx(900 + 1800 + 7)
    assert cost.macs({"a": mask(4, 0, 3), "b": mask(6, 1, 2, 5)}) == pytest.approx(2 * 3 * 100 + 3 * 2 * 100 + 7)
    assert cost.macs({"a": mask(4, 0, 1, 2, 3), "b": mask(6)}) == pytest.approx(7)
    assert cost.macs({"other": mask(9, 1)}) == cost.dense


def test_channels_that_count_many_times_or_not_at_all():
    side = Side(52, {"flat": np.full(3, 16.0), "cat": np.array([1.0, 0.0, 2.0, 1.0])})
    cost = CostModel([Term(52.0, (side,))])
    assert cost.macs({"flat": mask(3, 1)}) == pytest.approx(36)
    assert cost.macs({"cat": mask(4, 1)}) == pytest.approx(52)
    assert cost.macs({"flat": mask(3, 0, 2), "cat": mask(4, 2, 3)}) == pytest.approx(52 - 32 - 3)


def test_a_side_may_count_twice():
    side = Side(8, {"a": np.ones(8)})
    assert CostModel([Term(64.0, (side, side))]).macs({"a": mask(8, 0, 1, 2, 3)}) == pytest.approx(16)
