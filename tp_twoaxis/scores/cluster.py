"""Groups of channels that stand for each other: clusters of a layer, and ranks inside them (appendix F and K)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError

# the number of clusters is chosen from 2 to this by silhouette; the paper's local clusterings have a handful
MAX_CLUSTERS = 8
# fewer channels are one cluster: a silhouette over clusters of one or two means nothing
MIN_CHANNELS = 6
# up to here a full eigendecomposition is cheaper than Lanczos iterations
DENSE_CHANNELS = 128

Floats = npt.NDArray[np.float64]


def spectral_clusters(affinity: Tensor, *, max_clusters: int = MAX_CLUSTERS, seed: int = 0) -> Tensor:
    """Cluster a layer's channels on a matrix of pairwise affinities (Ng, Jordan & Weiss 2001).

    K-means on the leading eigenvectors of the normalised affinity, rows scaled to length 1; the number of
    clusters is the one of best mean silhouette among 2 to ``max_clusters``. Only the leading eigenvectors are computed,
    so the cost is O(C^2 max_clusters) a pass over the matrix; the silhouettes cost as much. Needs scikit-learn.

    Args:
        affinity: [C, C] symmetric, not negative; the diagonal does not count.
        max_clusters: largest number of clusters tried; at most half the channels are used as such.
        seed: of k-means. Channels are brought into an order of their own before anything random happens,
            so that permuting them permutes the result, up to ties.

    Returns:
        [C] int64 cluster numbers from 0; all 0 for fewer than 6 channels.

    Raises:
        TwoAxisError: scikit-learn is missing, or the matrix is not such a one.

    Example:
        >>> blocks = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)) + 0.01
        >>> spectral_clusters(blocks).tolist()
        [1, 1, 1, 0, 0, 0, 0]
    """
    count = len(affinity)
    matrix = affinity.detach().cpu().double().numpy().copy()
    if matrix.shape != (count, count) or not np.isfinite(matrix).all() or bool((matrix < 0).any()):
        raise TwoAxisError(
            f"affinity: expected a symmetric [C, C] of finite numbers of at least 0, got {list(affinity.shape)} "
            "with others"
        )
    if count < MIN_CHANNELS:
        return torch.zeros(count, dtype=torch.int64)
    np.fill_diagonal(matrix, 0.0)
    # a weak link between all keeps the graph in one piece and channels without any overlap in play
    matrix += 1e-6 * (matrix.max() or 1.0)
    np.fill_diagonal(matrix, 0.0)
    order = np.argsort(-matrix.sum(1), kind="stable")
    vectors = _leading_vectors(matrix[np.ix_(order, order)], min(max_clusters, count // 2))
    return _clusters([_unit_rows(vectors[:, :k]) for k in range(2, vectors.shape[1] + 1)], order, seed)


def feature_clusters(features: Tensor, *, max_clusters: int = MAX_CLUSTERS, seed: int = 0) -> Tensor:
    """Cluster a layer's channels on a few features each by k-means, the number of clusters by silhouette.

    Args:
        features: [C, d], of comparable scales; see :func:`~tp_twoaxis.scores.composite.z_scores`.
        max_clusters: largest number of clusters tried, at most half the channels.
        seed: of k-means; permuting channels permutes the result, up to ties.

    Returns:
        [C] int64 cluster numbers from 0; all 0 for fewer than 6 channels.

    Raises:
        TwoAxisError: scikit-learn is missing, or features are not finite.

    Example:
        >>> feature_clusters(torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])).tolist()
        [0, 0, 0, 1, 1, 1]
    """
    count = len(features)
    rows = features.detach().cpu().double().numpy()
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise TwoAxisError(f"features: expected finite numbers [C, d], got {list(features.shape)} with others")
    if count < MIN_CHANNELS:
        return torch.zeros(count, dtype=torch.int64)
    order = np.lexsort(-rows.T[::-1])  # descending by the first feature, then the next
    return _clusters([rows[order]] * (min(max_clusters, count // 2) - 1), order, seed)


def cluster_quantiles(scores: Tensor, clusters: Tensor) -> Tensor:
    """Rank each channel inside its cluster: the share of the cluster that scores no higher.

    Args:
        scores: [C], larger keeps.
        clusters: [C] int64.

    Returns:
        [C] in (0, 1]; the best channel of every cluster has 1, so every cluster keeps its leader longest.

    Example:
        >>> cluster_quantiles(torch.tensor([5.0, 1.0, 3.0, 2.0]), torch.tensor([0, 0, 1, 0])).tolist()
        [1.0, 0.333..., 1.0, 0.666...]
    """
    out = torch.zeros(len(scores), dtype=torch.float64)
    for number in torch.unique(clusters):
        chosen = clusters == number
        values = scores[chosen].double()
        # equal scores get equal quantiles, so the order of the channels plays no part
        out[chosen] = torch.searchsorted(values.sort().values, values, right=True).double() / len(values)
    return out


def _leading_vectors(matrix: Floats, count: int) -> Floats:
    """Eigenvectors of the ``count`` largest eigenvalues of D^-1/2 A D^-1/2, largest first."""
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    scale = 1.0 / np.sqrt(matrix.sum(1))
    normalised = matrix * scale * scale[:, None]
    if len(matrix) > DENSE_CHANNELS:
        try:
            values, vectors = eigsh(normalised, k=count, which="LA", v0=np.ones(len(matrix)), tol=1e-8)
        except ArpackNoConvergence:  # eigenvalues too close to tell apart by iterating
            values, vectors = np.linalg.eigh(normalised)
    else:
        values, vectors = np.linalg.eigh(normalised)
    leading: Floats = vectors[:, np.argsort(-values)[:count]]
    return leading


def _unit_rows(rows: Floats) -> Floats:
    unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def _clusters(embeddings: list[Floats], order: npt.NDArray[np.int64], seed: int) -> Tensor:
    """Run k-means with k = 2, 3, ... on the embedding of each, and keep the labels of best silhouette."""
    learn: Any = _scikit_learn()
    best, score = np.zeros(len(order), dtype=np.int64), -np.inf
    for k, rows in enumerate(embeddings, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer different rows than clusters: then there are fewer clusters
            labels = learn.cluster.KMeans(k, n_init=4, random_state=seed).fit_predict(rows)
        if not 2 <= len(np.unique(labels)) < len(rows):
            continue
        silhouette = learn.metrics.silhouette_score(rows, labels)
        if silhouette > score + 1e-9:  # the smaller number where both are as good
            best, score = labels, silhouette
    out = torch.zeros(len(order), dtype=torch.int64)
    out[torch.from_numpy(order)] = torch.from_numpy(best.astype(np.int64))
    return out


def _scikit_learn() -> Any:
    try:
        import sklearn.cluster
        import sklearn.metrics
    except ImportError as error:
        raise TwoAxisError(
            "clusters of channels: expected scikit-learn, it is not installed; pip install 'tp-twoaxis[cli]' or "
            "scikit-learn, or choose a score without clusters"
        ) from error
    return sklearn
