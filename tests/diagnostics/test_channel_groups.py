"""Groups of channels: what they are made of, and what does not change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import batches, conv_net
from sklearn.cluster import KMeans

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.diagnostics.channel_groups import (
    group_rows,
    local_coordinates,
    local_groups,
    target_coordinates,
    target_groups,
)
from tp_twoaxis.scores import input_capture, peer_overlap
from tp_twoaxis.scores.named_scores import target_excess, task_mi


@pytest.fixture(scope="module")
def layer():
    net = conv_net()
    with torch.no_grad():
        net.conv1.weight[3] = 0.0
    return calibrate(net, batches(), progress=False)["conv1"]


def z(values: torch.Tensor) -> np.ndarray:
    numbers = values.numpy()
    return (numbers - numbers.mean()) / numbers.std()


def test_coordinates_are_z_scores_of_varying_channels(layer) -> None:
    active = layer.variance > 0
    pairs = [
        (local_coordinates(layer), input_capture(layer.variance), peer_overlap(layer.correlation, active)),
        (target_coordinates(layer), task_mi(layer), target_excess(layer)),
    ]
    for found, first, second in pairs:
        assert found[3].tolist() == [0.0, 0.0]
        np.testing.assert_allclose(found[active].numpy(), np.stack([z(first[active]), z(second[active])], 1))


def test_groups_are_tight_and_ascend(layer) -> None:
    active = layer.variance > 0
    for labels, coordinates in (
        (local_groups(layer), local_coordinates(layer)),
        (target_groups(layer), target_coordinates(layer)),
    ):
        assert labels[3] == -1
        rows, own = coordinates[active].numpy(), labels[active].numpy()
        centres = np.stack([rows[own == group].mean(0) for group in range(3)])
        nearest = ((rows[:, None] - centres) ** 2).sum(2).argmin(1)
        assert nearest.tolist() == own.tolist()  # of k-means nothing can be moved to a nearer centre
        spread = ((rows - centres[own]) ** 2).sum()
        assert spread <= 1.1 * KMeans(3, n_init=50, random_state=7).fit(rows).inertia_
        means = [rows[own == group, 0].mean() for group in range(3)]
        assert means == sorted(means)


def test_permuting_channels_permutes_groups() -> None:
    rows = torch.randn(20, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    assert torch.equal(group_rows(rows[order]), group_rows(rows)[order])


def test_fewer_different_channels_than_groups_make_fewer_groups() -> None:
    assert group_rows(torch.tensor([[0.0, 0.0]] * 4 + [[1.0, 0.0]] * 4)).tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("groups", [1, 5])
def test_numbers_of_groups_out_of_range_are_refused(groups: int) -> None:
    with pytest.raises(TwoAxisError, match="groups: expected 2 to 4"):
        group_rows(torch.randn(4, 2), groups)
