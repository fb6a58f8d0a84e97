"""Slow NumPy twins of the baselines, from the formulas, one channel and one image at a time; nothing is imported
from the package."""

from __future__ import annotations

import numpy as np


def nuclear_norm(matrix):
    return np.linalg.svd(matrix, compute_uv=False).sum()


def channel_independence(maps):
    """[images, C, P] -> [C]: mean drop of the nuclear norm when a row is zeroed."""
    drops = np.zeros(maps.shape[:2])
    for image, matrix in enumerate(maps):
        for k in range(len(matrix)):
            without = matrix.copy()
            without[k] = 0.0
            drops[image, k] = nuclear_norm(matrix) - nuclear_norm(without)
    return drops.mean(0)


def adjacent_information(x, y, noise):
    """Rows [n, C_in] and [n, C_out] -> I(X_k; Y + noise) by determinants of the joint covariances."""
    s_yy = np.cov(y.T, bias=True).reshape(y.shape[1], y.shape[1])
    s_yy = s_yy + noise * np.mean(np.diag(s_yy)) * np.eye(len(s_yy))
    out = np.zeros(x.shape[1])
    for k in range(x.shape[1]):
        s_kk = x[:, k].var()
        if s_kk == 0:
            continue
        cross = [np.mean((x[:, k] - x[:, k].mean()) * (y[:, j] - y[:, j].mean())) for j in range(y.shape[1])]
        joint = np.block([[np.array([[s_kk]]), np.array([cross])], [np.array([cross]).T, s_yy]])
        out[k] = 0.5 * (np.log(s_kk) + np.linalg.slogdet(s_yy)[1] - np.linalg.slogdet(joint)[1])
    return out


def cells(rows, number):
    """[images, positions, C] -> [images * number, C]: means of stretches, as adaptive pooling cuts them."""
    positions = rows.shape[1]
    parts = [
        rows[:, int(np.floor(i * positions / number)) : int(np.ceil((i + 1) * positions / number))].mean(1)
        for i in range(number)
    ]
    return np.stack(parts, axis=1).reshape(-1, rows.shape[-1])


def folded_norm(weight, gamma, variance, eps):
    return np.array([abs(gamma[k]) / np.sqrt(variance[k] + eps) * np.sqrt((w**2).sum()) for k, w in enumerate(weight)])


def squared_group_sums(products, sizes):
    """[minibatches][C][...]: weight times gradient of everything that leaves with a channel -> [C]."""
    total = np.zeros(len(products[0]))
    for minibatch, size in zip(products, sizes, strict=True):
        for k, numbers in enumerate(minibatch):
            group_sum = 0.0
            for number in numbers:
                group_sum += number
            total[k] += size * group_sum**2
    return total / sum(sizes)


def layer_saliency(element, *, reads=False, groups=1):
    """Sum a convolution's element saliencies [out, in / groups, ...] by output or by input channel, one by one."""
    outputs, per_group = element.shape[:2]
    total = np.zeros(per_group * groups if reads else outputs)
    for o in range(outputs):
        for i in range(per_group):
            channel = (o // (outputs // groups)) * per_group + i if reads else o
            total[channel] += element[o, i].sum()
    return total
