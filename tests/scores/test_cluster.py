"""Clusters of channels: planted ones are found, permutations carry over, small and degenerate layers stay whole."""

import builtins
import subprocess
import sys

import numpy as np
import pytest
import reference_scores as twin
import torch
from sklearn.metrics import adjusted_rand_score

from tp_twoaxis import TwoAxisError
from tp_twoaxis.scores.cluster import cluster_quantiles, feature_clusters, spectral_clusters
from tp_twoaxis.scores.local import pair_overlap


def planted(sizes, noise=0.4, seed=0, rows=400):
    """Correlation of channels that follow one factor a cluster, and the clusters."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)])
    factors = torch.randn(rows, len(sizes), generator=generator, dtype=torch.float64)
    x = factors[:, labels] + noise * torch.randn(rows, len(labels), generator=generator, dtype=torch.float64)
    order = torch.randperm(len(labels), generator=generator)
    return torch.corrcoef(x[:, order].T), labels[order]


@pytest.mark.parametrize("sizes", [(5, 7), (6, 9, 4), (40, 60, 50), (4, 4, 4, 4, 4, 4)])
def test_planted_clusters_are_found(sizes):
    rho, labels = planted(sizes)
    found = spectral_clusters(pair_overlap(rho))
    assert found.dtype == torch.int64
    assert adjusted_rand_score(labels, found) == 1.0


def test_the_number_of_clusters_has_a_bound():
    rho, _ = planted((4,) * 6)
    assert len(spectral_clusters(pair_overlap(rho), max_clusters=3).unique()) <= 3


@pytest.mark.parametrize("channels", [16, 64, 160])
def test_permuting_channels_permutes_the_clusters(channels):
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(300, channels, generator=generator, dtype=torch.float64)
    affinity = pair_overlap(torch.corrcoef((x @ torch.randn(channels, channels, generator=generator).double()).T))
    order = torch.randperm(channels, generator=generator)
    found = spectral_clusters(affinity)
    assert adjusted_rand_score(found[order], spectral_clusters(affinity[order][:, order])) == 1.0
    features = torch.randn(channels, 2, generator=generator)
    assert adjusted_rand_score(feature_clusters(features)[order], feature_clusters(features[order])) == 1.0


def test_results_do_not_depend_on_the_random_state():
    rho, _ = planted((20, 20), noise=2.0)
    np.random.seed(1)  # noqa: NPY002 - the global state is what must play no part
    first = spectral_clusters(pair_overlap(rho))
    np.random.seed(2)  # noqa: NPY002
    assert torch.equal(first, spectral_clusters(pair_overlap(rho)))


@pytest.mark.parametrize("channels", [0, 1, 2, 5])
def test_few_channels_are_one_cluster(channels):
    assert spectral_clusters(torch.rand(channels, channels)).tolist() == [0] * channels
    assert feature_clusters(torch.rand(channels, 2)).tolist() == [0] * channels


@pytest.mark.parametrize("channels", [6, 200])
def test_degenerate_affinities(channels):
    for affinity in (torch.zeros(channels, channels), torch.ones(channels, channels), torch.eye(channels)):
        assert spectral_clusters(affinity).shape == (channels,)
    assert feature_clusters(torch.zeros(channels, 2)).tolist() == [0] * channels
    duplicates = pair_overlap(torch.ones(channels, channels, dtype=torch.float64))
    assert spectral_clusters(duplicates).shape == (channels,)
    lonely = torch.ones(channels, channels)
    lonely[0] = lonely[:, 0] = 0.0  # a channel without any overlap
    assert spectral_clusters(lonely).shape == (channels,)


def test_quantiles_twin():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (30,), generator=generator).double()
    clusters = torch.randint(4, (30,), generator=generator)
    got = cluster_quantiles(scores, clusters)
    np.testing.assert_allclose(got.numpy(), twin.cluster_quantiles(scores.tolist(), clusters.tolist()))
    for k in clusters.unique():
        assert got[clusters == k].max() == 1.0
    order = torch.randperm(30, generator=generator)
    assert torch.equal(cluster_quantiles(scores[order], clusters[order]), got[order])


@pytest.mark.parametrize(
    "bad", [torch.full((7, 7), torch.nan), -torch.ones(7, 7), torch.ones(7, 6)], ids=["nan", "negative", "not square"]
)
def test_bad_affinities(bad):
    with pytest.raises(TwoAxisError, match="affinity: expected a symmetric"):
        spectral_clusters(bad)


def test_bad_features():
    with pytest.raises(TwoAxisError, match="features: expected finite"):
        feature_clusters(torch.full((7, 2), torch.inf))
    with pytest.raises(TwoAxisError, match=r"features: expected finite numbers \[C, d\], got \[7\]"):
        feature_clusters(torch.ones(7))


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    original = builtins.__import__

    def missing(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(TwoAxisError, match=r"scikit-learn, it is not installed; pip install 'tp-twoaxis\[cli\]'"):
        feature_clusters(torch.rand(8, 2))


def test_scikit_learn_is_not_imported_before_it_is_needed():
    code = "import sys, tp_twoaxis, tp_twoaxis.importance.registry; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
