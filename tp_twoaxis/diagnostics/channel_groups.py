"""Groups of a cell's channels by k-means, and how far two groupings agree beyond chance."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score
from torch import Tensor

from tp_twoaxis.diagnostics.axis_coordinates import local_axis
from tp_twoaxis.scores.composite import z_scores
from tp_twoaxis.statistics.layer_statistics import LayerStatistics

# the paper's text lost k; three is that of its ViT table
GROUPS = 3
NO_GROUP = -1
# fewer channels are not grouped: three groups of them would be single channels
FEWEST_GROUPED = 6
STARTS = 10
PERMUTATIONS = 200

Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Agreement(NamedTuple):
    """How far two groupings agree.

    Attributes:
        ari: adjusted Rand index.
        null_mean: its mean over permutations of the channels.
        null_upper: the value that 5 % of the permutations exceed.
        p: ``(1 + hits) / (1 + permutations)``, hits being the permutations that agree at least as well.
    """

    ari: float
    null_mean: float
    null_upper: float
    p: float


def standardised(*coordinates: Tensor) -> Floats:
    """Stack coordinates [V] of a cell's channels as z-scores, [V, d].

    Example:
        >>> import torch
        >>> standardised(torch.tensor([1.0, 3.0]), torch.tensor([5.0, 1.0])).tolist()
        [[-1.0, 1.0], [1.0, -1.0]]
    """
    return np.stack([z_scores(values.double()).cpu().numpy() for values in coordinates], axis=1)


def group_channels(features: Floats, groups: int = GROUPS, *, seed: int = 0) -> Labels | None:
    """Group channels by k-means from ten starts.

    Args:
        features: [V, d].
        groups: k.
        seed: of the starts. Channels are brought into an order of their own before, so that permuting them permutes
            the groups, up to ties.

    Returns:
        [V] group numbers, or None below six channels or where fewer than two groups are found.

    Example:
        >>> points = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [9.0], [9.2]])
        >>> labels = group_channels(points)
        >>> [len(set(labels[part])) for part in (slice(0, 3), slice(3, 5), slice(5, 7), slice(0, 7))]
        [1, 1, 1, 3]
    """
    if len(features) < FEWEST_GROUPED:
        return None
    order = np.lexsort(features.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than groups
        found = KMeans(groups, n_init=STARTS, random_state=seed).fit_predict(features[order])
    labels: Labels = np.empty(len(features), dtype=np.int64)
    labels[order] = found
    return labels if len(np.unique(labels)) > 1 else None


def local_groups(layer: LayerStatistics, groups: int = GROUPS, *, seed: int = 0) -> Tensor:
    """Group a layer's channels on the local axis, ``(z I, z R)``; see :func:`group_channels`.

    Returns:
        [C] int64 from 0, groups ascending by mean capture; -1 for constant channels, and for all channels of a layer
        without groups.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 5))
        >>> local_groups(calibrate(net, [torch.randn(64, 8)], target=None, progress=False)["1"]).tolist()
        [-1, -1, -1, -1, -1]
    """
    result = torch.full((layer.num_channels,), NO_GROUP, dtype=torch.int64)
    features = standardised(*local_axis(layer))
    labels = group_channels(features, groups, seed=seed)
    if labels is not None:
        found, own = np.unique(labels, return_inverse=True)
        captures = [features[own == group, 0].mean() for group in range(len(found))]
        result[layer.variance > 0] = torch.from_numpy(np.argsort(np.argsort(captures))[own].astype(np.int64))
    return result


def silhouette(features: Floats, labels: Labels | None) -> float:
    """Mean silhouette of a grouping (Rousseeuw 1987), in [-1, 1]; NaN without one, or where each is a group.

    Example:
        >>> points = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
        >>> silhouette(points, group_channels(points, 2)) > 0.9
        True
    """
    if labels is None or len(np.unique(labels)) >= len(features):
        return math.nan
    return float(silhouette_score(features, labels))


def adjusted_rand(a: Labels, b: Labels) -> Floats:
    """Adjusted Rand index of one grouping with several (Hubert & Arabie 1985).

    Of the pairs of channels that share a group in both, ``(sum_ij C(n_ij, 2) - e) / ((A + B) / 2 - e)``, with
    ``A = sum_i C(a_i, 2)``, ``B = sum_j C(b_j, 2)`` of the groups' sizes, and ``e = A B / C(n, 2)``.

    Args:
        a: [V] numbers from 0.
        b: [P, V] numbers from 0.

    Returns:
        [P]; 1 for equal groupings, 0 on average for unrelated ones.

    Example:
        >>> adjusted_rand(np.array([0, 0, 1, 1]), np.array([[1, 1, 0, 0], [0, 1, 0, 1]])).round(6).tolist()
        [1.0, -0.5]
    """
    rows, columns, count = int(a.max()) + 1, int(b.max()) + 1, len(b)
    places = (np.arange(count)[:, None] * rows + a) * columns + b
    table = np.bincount(places.ravel(), minlength=count * rows * columns).reshape(count, rows, columns)
    both, first, second = (_pairs(sizes).sum(-1) for sizes in (table.reshape(count, -1), table.sum(2), table.sum(1)))
    expected = first * second / _pairs(np.array(len(a)))
    most = (first + second) / 2.0
    # both groupings have one group, or each channel is its own: they are equal
    alike = most == expected
    index: Floats = np.where(alike, 1.0, (both - expected) / np.where(alike, 1.0, most - expected))
    return index


def grouping_index(a: Labels | None, b: Labels | None) -> float:
    """Adjusted Rand index of two groupings [V]; NaN where there is none.

    Example:
        >>> grouping_index(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0])), grouping_index(None, np.array([0, 1]))
        (1.0, nan)
    """
    return math.nan if a is None or b is None else float(adjusted_rand(a, b[None])[0])


def agreement(a: Labels | None, b: Labels | None, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Agreement:
    """Compare two groupings with what permuted channels give.

    Args:
        a: [V], or None where there is no grouping.
        b: [V] or None.
        permutations: how many; the smallest p is one over one more.
        seed: of the permutations.

    Returns:
        NaN throughout where either is None.

    Example:
        >>> groups = np.repeat(np.arange(3), 5)
        >>> agreement(groups, groups[::-1])[0::3]
        (1.0, 0.004975124378109453)
    """
    if a is None or b is None:
        return Agreement(math.nan, math.nan, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    shuffled = generator.permuted(np.broadcast_to(b, (permutations, len(b))), axis=1)
    index = grouping_index(a, b)
    null = adjusted_rand(a, shuffled)
    hits = int((null >= index - 1e-12).sum())
    return Agreement(index, float(null.mean()), float(np.quantile(null, 0.95)), (1 + hits) / (1 + permutations))


def _pairs(sizes: npt.NDArray[np.int64]) -> Floats:
    return sizes * (sizes - 1) / 2.0
