"""Slow twins of graphs and groups of channels, written from the formulas; nothing here calls the package."""

from __future__ import annotations

import itertools
import math

import numpy as np


def strongest_edges(weights, share):
    """The largest tenth (or other share) of the positive pairs."""
    count = len(weights)
    positive = [(weights[k][j], -k, -j) for k in range(count) for j in range(k + 1, count) if weights[k][j] > 0]
    kept = sorted(positive, reverse=True)[: max(1, round(share * len(positive)))] if positive else []
    return [(-k, -j) for _, k, j in kept]


def modularity(weights, edges, communities):
    """Newman's Q = 1/2m sum_kj (A_kj - d_k d_j / 2m) [k and j in one community], pair by pair."""
    count = len(weights)
    adjacency = np.zeros((count, count))
    for k, j in edges:
        adjacency[k, j] = adjacency[j, k] = weights[k][j]
    degree, twice = adjacency.sum(1), adjacency.sum()
    home = {channel: number for number, members in enumerate(communities) for channel in members}
    total = 0.0
    for k, j in itertools.product(range(count), repeat=2):
        # channels that are in no community of two are each a community of their own
        if k == j or (k in home and home.get(k) == home.get(j)):
            total += adjacency[k, j] - degree[k] * degree[j] / twice
    return total / twice


def contrast(pairs, groups):
    """Means within and between groups, and Cohen's d with the pooled variance, pair by pair."""
    within, between = [], []
    for k, j in itertools.combinations(range(len(groups)), 2):
        (within if groups[k] == groups[j] else between).append(pairs[k][j])
    a, b = np.array(within), np.array(between)
    variance = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
    return a.mean(), b.mean(), (a.mean() - b.mean()) / math.sqrt(variance)
