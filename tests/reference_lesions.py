"""Slow twins of the diagnostics of single channels; nothing is imported from the package."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn


def without_channel(model, name, channel, value, peers=(), weights=()):
    """A copy of the network whose layer itself writes ``value + sum_j weights_j y_j`` in a channel's place."""
    twin = copy.deepcopy(model)
    layer = dict(twin.named_modules())[name]
    layer = layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer
    with torch.no_grad():
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(len(layer.weight), dtype=layer.weight.dtype))
        row, bias = torch.zeros_like(layer.weight[channel]), value
        for peer, weight in zip(peers, weights, strict=True):
            row += weight * layer.weight[peer]
            bias += weight * float(layer.bias[peer])
        layer.weight[channel], layer.bias[channel] = row, bias
    return twin


def losses(model, images, labels):
    """Cross-entropy of each image in nats, and whether the largest logit is its label's."""
    with torch.no_grad():
        logits = model(images).double().numpy()
    logits = logits - logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -log_p[np.arange(len(labels)), labels.numpy()], logits.argmax(1) == labels.numpy()


def regression(rows, k, peers):
    """Weights, intercept and R^2 of ordinary least squares on the rows themselves, [n, C]."""
    design = np.column_stack([rows[:, list(peers)], np.ones(len(rows))])
    solution, *_ = np.linalg.lstsq(design, rows[:, k], rcond=None)
    residual = rows[:, k] - design @ solution
    return solution[:-1], solution[-1], 1.0 - residual.var() / rows[:, k].var()


def rank_below(values, k, active):
    """Share of the other active entries below entry k, ties counted half."""
    others = [values[j] for j in range(len(values)) if j != k and active[j]]
    if not others:
        return 0.5
    return sum(1.0 if v < values[k] else 0.5 if v == values[k] else 0.0 for v in others) / len(others)


def wilson(wins, trials, z=1.959963984540054):
    """Wilson's interval of a share: where (share - p)^2 = z^2 p (1 - p) / n, solved for p."""
    share = wins / trials
    a, b, c = 1 + z**2 / trials, -(2 * share + z**2 / trials), share**2
    root = np.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def mean_ranks(values):
    """1 for the smallest; equal values share the mean of their ranks."""
    return np.array([sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values])


def pair_wins(capture, prop, damage):
    """Pairs of neighbours by capture that tell something, and those where more of the property costs less."""
    order = sorted(range(len(capture)), key=lambda k: capture[k])
    pairs = wins = 0
    for a, b in zip(order[::2], order[1::2], strict=False):
        more, less = (a, b) if prop[a] > prop[b] else (b, a)
        if prop[a] != prop[b] and damage[a] != damage[b]:
            pairs += 1
            wins += damage[more] < damage[less]
    return pairs, wins


def matched_recovery(cells, bins=5):
    """Correlations of the share with E_8, I, M by centred ranks in cells and bins of M, and trials and wins of halves.

    ``cells``: a list of dicts of arrays ``share``, ``e8``, ``i``, ``m``.
    """
    stacked = {name: [] for name in ("share", "e8", "i", "m")}
    trials = wins = 0
    for cell in cells:
        order = sorted(range(len(cell["m"])), key=lambda k: cell["m"][k])
        for b in range(bins):
            members = [k for place, k in enumerate(order) if place * bins // len(order) == b]
            for name, values in stacked.items():
                ranks = mean_ranks([cell[name][k] for k in members])
                values.extend(ranks - ranks.mean() if members else [])
            half = len(members) // 2
            if half:
                by_peers = sorted(members, key=lambda k: cell["e8"][k])
                low, high = (
                    np.median([cell["share"][k] for k in part]) for part in (by_peers[:half], by_peers[-half:])
                )
                trials, wins = trials + (low != high), wins + (high > low)
    share = np.array(stacked.pop("share"))
    found = {
        n: (share @ np.array(v)) / np.sqrt((share @ share) * (np.array(v) @ np.array(v))) for n, v in stacked.items()
    }
    return found, trials, wins
