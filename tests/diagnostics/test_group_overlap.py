"""Pairs within and between groups, pair by pair, and against permuted groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference_structure as twin
import torch
from cases import batches, conv_net

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.diagnostics.channel_groups import local_groups
from tp_twoaxis.diagnostics.group_overlap import COLUMNS, group_contrast, overlap_table
from tp_twoaxis.scores import pair_overlap


def drawn(count: int, seed: int) -> torch.Tensor:
    values = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values + values.T


def test_means_and_effect_are_those_of_the_pairs() -> None:
    pairs, groups = drawn(13, 1), torch.tensor([0, 1, 2, 0, 1, 2, 2, 2, 0, 1, 0, 2, 1])
    found = group_contrast(pairs, groups, permutations=10)
    within, between, effect = twin.contrast(pairs.tolist(), groups.tolist())
    assert (found.within, found.between, found.effect) == pytest.approx((within, between, effect))
    assert found.ratio == pytest.approx(within / between)


def test_p_is_the_share_of_permuted_groups_that_differ_as_much() -> None:
    pairs, groups = drawn(10, 2), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    generator = torch.Generator().manual_seed(5)
    gaps = []
    for order in [torch.arange(10), *(torch.randperm(10, generator=generator) for _ in range(40))]:
        within, between, _ = twin.contrast(pairs.tolist(), groups[order].tolist())
        gaps.append(abs(within - between))
    hits = sum(gap >= gaps[0] - 1e-12 for gap in gaps[1:])
    assert group_contrast(pairs, groups, permutations=40, seed=5).p == pytest.approx((1 + hits) / 41)


def test_real_groups_are_beyond_chance_and_unrelated_ones_within() -> None:
    groups = torch.arange(24) % 3
    same = (groups[:, None] == groups).double()
    assert group_contrast(drawn(24, 3) + 3.0 * same, groups).p == pytest.approx(1 / 201)
    p = [group_contrast(drawn(24, seed), groups, seed=seed).p for seed in range(40)]
    assert np.mean(np.array(p) < 0.05) <= 0.15
    assert 0.35 < np.mean(p) < 0.65


@pytest.mark.parametrize("groups", [torch.zeros(5, dtype=torch.int64), torch.arange(5)])
def test_without_pairs_of_both_kinds_there_is_no_contrast(groups: torch.Tensor) -> None:
    found = group_contrast(drawn(5, 0), groups)
    assert all(math.isnan(value) for value in (found.within, found.between, found.effect, found.p, found.ratio))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TwoAxisError, match=r"expected \[4, 4\] for 4 channels"):
        group_contrast(drawn(5, 0), torch.arange(4))


def test_the_table_is_of_local_groups_of_varying_channels() -> None:
    net = conv_net()
    with torch.no_grad():
        net.conv1.weight[3] = 0.0
        net.reduce.weight[3:] = 0.0  # three channels vary
        net.reduce.bias[3:] = 0.0
    stats = calibrate(net, batches(), progress=False)
    table = overlap_table(stats, ["conv1", "conv2", "reduce"], permutations=20)
    assert list(table) == list(COLUMNS)
    assert table.channels.tolist() == [15, 16, 3]
    assert table.groups.tolist() == [3, 3, 0]
    layer = stats["conv1"]
    varying = layer.variance > 0
    overlap = pair_overlap(layer.correlation)[varying][:, varying]
    within, between, effect = twin.contrast(overlap.tolist(), local_groups(layer)[varying].tolist())
    row = table.iloc[0]
    assert (row.overlap_within, row.overlap_between, row.overlap_effect) == pytest.approx((within, between, effect))
    last = table.iloc[2].drop(["layer", "depth", "channels", "groups"])
    assert last.isna().all()
