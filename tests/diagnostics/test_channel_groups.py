"""Groups of channels and their agreement, against pairs counted by hand and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference_alignment as slow
import torch
from cases import batches, conv_net
from sklearn.metrics import adjusted_rand_score

from tp_twoaxis import calibrate
from tp_twoaxis.diagnostics.axis_coordinates import local_axis
from tp_twoaxis.diagnostics.channel_groups import (
    adjusted_rand,
    agreement,
    group_channels,
    grouping_index,
    local_groups,
    silhouette,
    standardised,
)


def test_the_index_counts_pairs():
    generator = np.random.default_rng(0)
    a, several = generator.integers(3, size=11), generator.integers(4, size=(20, 11))
    found = adjusted_rand(a, several)
    for index, b in zip(found, several, strict=True):
        assert index == pytest.approx(slow.adjusted_rand(a, b), abs=1e-12)
        assert index == pytest.approx(adjusted_rand_score(a, b), abs=1e-12)
    # each channel its own group, or one group for all
    for equal in (np.arange(5), np.zeros(5, dtype=int)):
        assert adjusted_rand(equal, equal[None])[0] == 1.0


def test_p_is_the_share_of_permutations_that_agree_as_well():
    a, b = np.array([0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 1, 2, 2])
    found = agreement(a, b, permutations=4000)
    assert found.ari == pytest.approx(slow.adjusted_rand(a, b))
    assert found.p == pytest.approx(slow.exact_p(a, b), abs=0.02)
    assert found.null_mean == pytest.approx(0.0, abs=0.02)
    # by hand, from the permutations of the seed
    few = agreement(a, b, permutations=9, seed=3)
    shuffled = np.random.default_rng(3).permuted(np.tile(b, (9, 1)), axis=1)
    null = [slow.adjusted_rand(a, other) for other in shuffled]
    assert few.p == (1 + sum(value >= found.ari - 1e-12 for value in null)) / 10
    assert few.null_upper == pytest.approx(np.quantile(null, 0.95))
    assert agreement(a, a).p == pytest.approx(1 / 201, abs=0.03)


def test_silhouettes_by_hand():
    points = np.random.default_rng(1).normal(size=(12, 2))
    labels = group_channels(points)
    assert silhouette(points, labels) == pytest.approx(slow.silhouette(points, labels))
    assert math.isnan(silhouette(points, None))
    assert math.isnan(silhouette(points, np.arange(12)))


def test_groups_are_of_the_channels_not_of_their_order():
    features = np.random.default_rng(2).normal(size=(40, 2))
    order = np.random.default_rng(3).permutation(40)
    assert grouping_index(group_channels(features)[order], group_channels(features[order])) == 1.0
    assert len(set(group_channels(features, 5))) == 5


def test_too_few_or_equal_channels_have_no_groups():
    assert group_channels(np.random.default_rng(0).normal(size=(5, 2))) is None
    assert group_channels(np.zeros((9, 2))) is None
    two = np.repeat([[0.0, 0.0], [1.0, 1.0]], 4, axis=0)
    assert len(set(group_channels(two, 3))) == 2  # fewer different points than groups
    assert math.isnan(grouping_index(None, np.zeros(3, dtype=int)))
    assert all(math.isnan(value) for value in agreement(None, None))


def test_features_are_z_scores():
    values = torch.tensor([1.0, 2.0, 6.0])
    expected = (values - values.mean()) / values.std(correction=0)
    assert standardised(values, torch.ones(3))[:, 0] == pytest.approx(expected.numpy())
    assert not standardised(values, torch.ones(3))[:, 1].any()


def test_local_groups_ascend_by_capture_and_leave_constant_channels_out():
    net = conv_net()
    with torch.no_grad():
        net.conv1.weight[3] = 0.0
    layer = calibrate(net, batches(), progress=False)["conv1"]
    groups, axis = local_groups(layer), local_axis(layer)
    assert groups[3] == -1
    own = groups[layer.variance > 0]
    assert adjusted_rand_score(own, group_channels(standardised(*axis))) == 1.0
    means = [float(axis.capture[own == group].mean()) for group in range(3)]
    assert means == sorted(means)
