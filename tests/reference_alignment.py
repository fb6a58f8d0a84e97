"""Slow twins of the evidence on alignment, from the formulas; nothing is imported from the package."""

from __future__ import annotations

import itertools
import math

import numpy as np


def adjusted_rand(a, b):
    """Over pairs of items: those that share a group in both, less what chance gives."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    both = sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)
    first = sum(a[i] == a[j] for i, j in pairs)
    second = sum(b[i] == b[j] for i, j in pairs)
    expected = first * second / len(pairs)
    most = (first + second) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def exact_p(a, b):
    """Share of all permutations of the items that agree at least as well."""
    index = adjusted_rand(a, b)
    hits = [adjusted_rand(a, other) >= index - 1e-12 for other in itertools.permutations(b)]
    return sum(hits) / len(hits)


def silhouette(points, labels):
    """Mean over points of (nearest other group - own group) / the larger of the two mean distances."""
    values = []
    for i, point in enumerate(points):
        own = [j for j in range(len(points)) if labels[j] == labels[i] and j != i]
        if not own:
            values.append(0.0)
            continue
        inside = np.mean([math.dist(point, points[j]) for j in own])
        outside = min(
            np.mean([math.dist(point, points[j]) for j in range(len(points)) if labels[j] == other])
            for other in set(labels) - {labels[i]}
        )
        values.append((outside - inside) / max(inside, outside))
    return float(np.mean(values))


def spearman(a, b):
    """Pearson's correlation of ranks without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def kendall(a, b):
    """Concordant less discordant pairs, over all pairs; without ties."""
    signs = [np.sign((a[i] - a[j]) * (b[i] - b[j])) for i, j in itertools.combinations(range(len(a)), 2)]
    return float(np.mean(signs))
