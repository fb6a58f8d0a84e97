"""Slow NumPy twins of the scores, from the formulas, one channel at a time; nothing is imported from the package."""

from __future__ import annotations

import numpy as np

CAP = 1.0 - 1e-12  # information of a perfect correlation stays finite


def info(r2):
    """-1/2 ln(1 - R^2)."""
    return -0.5 * np.log(1.0 - min(max(r2, 0.0), CAP))


def capture(variance, noise_power=None):
    if noise_power is None:
        positive = [p for p in variance if p > 0]
        noise_power = np.median(positive) if positive else 1.0
    return np.array([0.5 * np.log(1.0 + p / noise_power) for p in variance])


def rayleigh_quotient(weight, patch_covariance):
    """From the weights [C, D] and the unfolded patches' covariance [D, D], never from the outputs."""
    return np.array([w @ patch_covariance @ w / (w @ w) for w in weight])


def peer_overlap(rho, active):
    out = np.zeros(len(rho))
    for k in range(len(rho)):
        peers = [j for j in range(len(rho)) if j != k and active[j]]
        if active[k] and peers:
            out[k] = sum(info(rho[k, j] ** 2) for j in peers) / len(peers)
    return out


def task_information(r):
    return np.array([info(x**2) for x in r])


def target_redundancy(m):
    return np.array([np.mean([min(m[k], m[j]) for j in range(len(m)) if j != k]) for k in range(len(m))])


def pair_information(r, rho):
    """By regression on both channels: R^2 = r' C^-1 r with the pair's 2 x 2 correlation matrix."""
    out = np.zeros_like(rho)
    for k in range(len(r)):
        for j in range(len(r)):
            if k == j:
                out[k, j] = info(r[k] ** 2)
            else:
                pair = np.array([[1.0, rho[k, j]], [rho[k, j], 1.0]])
                out[k, j] = info(np.array([r[k], r[j]]) @ np.linalg.solve(pair, np.array([r[k], r[j]])))
    return out


def pair_excess(r, rho):
    joint, single = pair_information(r, rho), task_information(r)
    out = np.zeros_like(rho)
    for k in range(len(r)):
        for j in range(len(r)):
            if k != j:
                out[k, j] = max(0.0, joint[k, j] - max(single[k], single[j]))
    return out


def target_excess(r, rho, partners=10, rule="task-mi"):
    excess, single, joint = pair_excess(r, rho), task_information(r), pair_information(r, rho)
    preference = {
        "task-mi": lambda k, j: single[j],
        "joint-mi": lambda k, j: joint[k, j],
        "excess": lambda k, j: excess[k, j],
    }[rule]
    out = np.zeros(len(r))
    for k in range(len(r)):
        others = sorted((j for j in range(len(r)) if j != k), key=lambda j: -preference(k, j))
        out[k] = np.mean([excess[k, j] for j in others[:partners]])
    return out


def explanation(covariance, k, peers, ridge=0.0):
    """E_k(P) = S_kP S_PP^-1 S_Pk / S_kk by an explicit inverse."""
    peers = list(peers)
    if not peers or covariance[k, k] <= 0:
        return 0.0
    inner = covariance[np.ix_(peers, peers)]
    inner = inner + ridge * np.diag(np.diag(inner))
    outer = covariance[k, peers]
    return float(np.clip(outer @ np.linalg.inv(inner) @ outer / covariance[k, k], 0.0, 1.0))


def greedy_hull(rho, k, active, pool=32, max_size=10, epsilon=0.1, ridge=1e-6):
    """Peers in order of selection, E_k after each, E_k of the pool, and the hull's size."""
    candidates = sorted((j for j in range(len(rho)) if j != k and active[j]), key=lambda j: -abs(rho[k, j]))[:pool]
    if not active[k]:
        return [], [], 0.0, 0
    whole = explanation(rho, k, candidates, ridge)
    chosen, path = [], []
    for _ in range(min(max_size, len(candidates))):
        values = {j: explanation(rho, k, [*chosen, j], ridge) for j in candidates if j not in chosen}
        best = max(values, key=values.get)
        chosen.append(best)
        path.append(values[best])
    whole = max([whole, *path[-1:]])
    size = next((i + 1 for i, value in enumerate(path) if value >= (1.0 - epsilon) * whole), len(path))
    size = size if whole > 1e-24 else 0
    return chosen, path, whole, size


def z(values, active):
    """(x - mean) / deviation over the active ones; 0 elsewhere and where all are alike."""
    chosen = [v for v, on in zip(values, active, strict=True) if on]
    mean = sum(chosen) / max(len(chosen), 1)
    deviation = np.sqrt(sum((v - mean) ** 2 for v in chosen) / max(len(chosen), 1))
    return np.array(
        [(v - mean) / deviation if on and deviation > 0 else 0.0 for v, on in zip(values, active, strict=True)]
    )


def compact_support(rho, active):
    """K_k = E_k(H_k) / |H_k|, with E of the hull alone."""
    out = np.zeros(len(rho))
    for k in range(len(rho)):
        _, path, _, size = greedy_hull(rho, k, active)
        out[k] = path[size - 1] / size if size else 0.0
    return out


def assign_by_rank(values, ranking):
    """The i-th smallest value to the i-th lowest ranked."""
    out = np.zeros(len(values))
    for value, k in zip(sorted(values), sorted(range(len(values)), key=lambda k: (ranking[k], values[k])), strict=True):
        out[k] = value
    return out


def annealed(early, late, removed=0.0):
    """Take out the lowest of (1 - t) early + t late, one after the other."""
    left, out, count = list(range(len(early))), np.zeros(len(early)), len(early)
    while left:
        t = removed + (1 - removed) * (count - len(left)) / count
        lowest = min(left, key=lambda k: (1 - t) * early[k] + t * late[k])
        left.remove(lowest)
        out[lowest] = 1 - len(left) / count
    return out


def cluster_quantiles(scores, clusters):
    """Share of the own cluster that scores no higher."""
    return np.array(
        [
            np.mean([other <= score for other, c in zip(scores, clusters, strict=True) if c == own])
            for score, own in zip(scores, clusters, strict=True)
        ]
    )


def reconstruction_error(readings, removed):
    """Error of the readers' outputs when channels are predicted from all others: sum over readers of tr(W R W')."""
    total = 0.0
    for covariance, weight, channels, roots, power in readings:
        gone = [c for c, r in zip(channels, roots, strict=True) if r in removed]
        if not gone:
            continue
        kept = [i for i in range(len(covariance)) if i not in gone]
        s = covariance
        rest = s[np.ix_(gone, gone)]
        if kept:
            rest = rest - s[np.ix_(gone, kept)] @ np.linalg.solve(s[np.ix_(kept, kept)], s[np.ix_(kept, gone)])
        w = weight[:, gone]
        total += np.trace(w @ rest @ w.T) / power
    return total


def greedy_reconstruction(readings, size):
    """Try every channel at every step, from scratch."""
    removed, losses, before = [], [], 0.0
    while len(removed) < size:
        errors = {k: reconstruction_error(readings, {*removed, k}) for k in range(size) if k not in removed}
        best = min(errors, key=errors.get)
        losses.append(errors[best] - before)
        before = errors[best]
        removed.append(best)
    return removed, losses
