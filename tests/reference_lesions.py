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
