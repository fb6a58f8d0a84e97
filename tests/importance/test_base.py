"""Scores of several layers of a group become one importance per root channel: against a loop."""

import pytest
import torch

from tp_twoaxis import TwoAxisError
from tp_twoaxis.importance.base import reduce_members


@pytest.mark.parametrize("reduction", ["mean", "sum", "max", "first"])
def test_reductions_against_a_loop(reduction):
    generator = torch.Generator().manual_seed(0)
    parts = []
    for n in (6, 12, 3):
        roots = torch.arange(6) if n == 6 else torch.randint(6, (n,), generator=generator)
        parts.append((torch.randn(n, generator=generator), roots))
    expected = []
    for root in range(6):
        found = [
            float(score)
            for scores, roots in (parts[:1] if reduction == "first" else parts)
            for score, other in zip(scores, roots.tolist(), strict=True)
            if other == root
        ]
        expected.append(
            {"mean": sum(found) / len(found), "sum": sum(found), "max": max(found), "first": found[0]}[reduction]
        )
    assert reduce_members(parts, 6, reduction).tolist() == pytest.approx(expected)


def test_reduction_errors():
    parts = [(torch.ones(2), torch.tensor([0, 2]))]
    with pytest.raises(TwoAxisError, match="1 of 3 root channels"):
        reduce_members(parts, 3, "mean")
    with pytest.raises(TwoAxisError, match="group_reduction: expected one of mean, sum, max, first, got 'prod'"):
        reduce_members(parts, 3, "prod")
