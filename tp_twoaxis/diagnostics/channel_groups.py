"""Descriptive groups of a layer's channels on either axis: k-means on its two standardised coordinates."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.scores import local
from tp_twoaxis.scores.composite import z_scores
from tp_twoaxis.scores.named_scores import capture, target_excess, task_mi
from tp_twoaxis.statistics.layer_statistics import LayerStatistics

GROUPS = 3  # the paper's for its transformer; of its convolutional networks the text lost the number
STARTS = 10
FEWEST_CHANNELS = 6
NO_GROUP = -1


def local_coordinates(layer: LayerStatistics) -> Tensor:
    """Place a layer's channels on the local axis, ``(z(I_k), z(R_k))``.

    Returns:
        [C, 2]; 0 for constant channels, which do not count in the z-scores.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 6))
        >>> local_coordinates(calibrate(net, [torch.randn(64, 8)], target=None, progress=False)["1"]).shape
        torch.Size([6, 2])
    """
    active = layer.variance > 0
    overlap = local.peer_overlap(layer.correlation, active)
    return torch.stack([z_scores(capture(layer), active), z_scores(overlap, active)], dim=1)


def target_coordinates(layer: LayerStatistics) -> Tensor:
    """Place a layer's channels on the target axis, ``(z(M_k), z(X_k))``.

    Returns:
        [C, 2]; 0 for constant channels, which do not count in the z-scores.

    Raises:
        TwoAxisError: the statistics hold no target.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 6))
        >>> stats = calibrate(net, [(torch.randn(64, 8), torch.randint(6, (64,)))], progress=False)
        >>> target_coordinates(stats["1"]).shape
        torch.Size([6, 2])
    """
    active = layer.variance > 0
    return torch.stack([z_scores(task_mi(layer), active), z_scores(target_excess(layer), active)], dim=1)


def local_groups(layer: LayerStatistics, groups: int = GROUPS, *, seed: int = 0) -> Tensor:
    """Group a layer's channels on the local axis; see :func:`group_rows`.

    Returns:
        [C] int64 from 0, groups ascending by mean capture; -1 for constant channels, and for all channels of a layer
        with fewer than 6 that vary.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 5))
        >>> local_groups(calibrate(net, [torch.randn(64, 8)], target=None, progress=False)["1"]).tolist()
        [-1, -1, -1, -1, -1]
    """
    return _groups_of_varying(layer, local_coordinates(layer), groups, seed)


def target_groups(layer: LayerStatistics, groups: int = GROUPS, *, seed: int = 0) -> Tensor:
    """Group a layer's channels on the target axis; see :func:`group_rows`.

    Returns:
        [C] int64 from 0, groups ascending by mean task information; -1 as in :func:`local_groups`.

    Raises:
        TwoAxisError: the statistics hold no target.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 6))
        >>> stats = calibrate(net, [(torch.randn(64, 8), torch.randint(6, (64,)))], progress=False)
        >>> sorted(set(target_groups(stats["1"]).tolist()))
        [0, 1, 2]
    """
    return _groups_of_varying(layer, target_coordinates(layer), groups, seed)


def group_rows(coordinates: Tensor, groups: int = GROUPS, *, seed: int = 0) -> Tensor:
    """Group points by k-means (scikit-learn's, the best of 10 starts).

    Args:
        coordinates: [n, d], finite.
        groups: k, from 2 to n.
        seed: of the starts. Points are brought into an order of their own before, so that permuting them permutes
            the groups.

    Returns:
        [n] int64 from 0, ascending by the mean of the first coordinate; fewer groups where fewer points differ.

    Raises:
        TwoAxisError: the number of groups is out of range.

    Example:
        >>> group_rows(torch.tensor([[5.0], [0.0], [5.1], [0.1]]), 2).tolist()
        [1, 0, 1, 0]
    """
    if not 2 <= groups <= len(coordinates):
        raise TwoAxisError(f"groups: expected 2 to {len(coordinates)} for so many channels, got {groups}")
    rows = coordinates.detach().cpu().double().numpy()
    order = np.lexsort(rows.T[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer different points than groups: then there are fewer groups
        sorted_labels = KMeans(groups, n_init=STARTS, random_state=seed).fit_predict(rows[order])
    labels = np.empty(len(rows), dtype=np.int64)
    labels[order] = sorted_labels
    found = np.unique(labels)
    rank = np.argsort(np.argsort([rows[labels == label, 0].mean() for label in found], kind="stable"))
    return torch.from_numpy(rank[np.searchsorted(found, labels)].astype(np.int64))


def _groups_of_varying(layer: LayerStatistics, coordinates: Tensor, groups: int, seed: int) -> Tensor:
    active = layer.variance > 0
    labels = torch.full((layer.num_channels,), NO_GROUP, dtype=torch.int64)
    if int(active.sum()) >= FEWEST_CHANNELS:
        labels[active] = group_rows(coordinates[active], groups, seed=seed)
    return labels
