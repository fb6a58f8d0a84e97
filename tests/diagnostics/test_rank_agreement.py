"""Agreement of rankings, against scipy and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr

from tp_twoaxis.diagnostics.rank_agreement import lowest_overlap, rank_correlation


def test_rank_correlation_is_spearmans_with_ties():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(6, (20, 9), generator=generator).double()
    b = torch.randint(6, (20, 9), generator=generator).double()
    for row, x, y in zip(rank_correlation(a, b), a, b, strict=True):
        assert float(row) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    one = rank_correlation(a, b[:1])
    assert float(one[3]) == pytest.approx(spearmanr(a[3], b[0]).statistic, abs=1e-12)
    assert math.isnan(float(rank_correlation(torch.ones(1, 4), a[:1, :4])))


def test_lowest_overlap():
    full = torch.arange(10.0)[None]
    assert lowest_overlap(full, full, 0.3).tolist() == [1.0]
    assert lowest_overlap(-full, full, 0.3).tolist() == [0.0]
    swapped = full.clone()
    swapped[0, [2, 3]] = swapped[0, [3, 2]]
    assert float(lowest_overlap(swapped, full, 0.3)) == pytest.approx(2 / 3)
    assert lowest_overlap(swapped, full, 0.01).tolist() == [1.0]  # one channel at least
