"""Slow twins of the evidence on target redundancy, from the formulas; nothing here calls the package."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.special import digamma


def mutual_information(table: np.ndarray) -> float:
    """``sum p ln(p / (p_t p_y))`` of a joint table [T, Y], cell by cell."""
    total = 0.0
    for t, y in np.ndindex(*table.shape):
        if table[t, y] > 1e-100:
            total += table[t, y] * np.log(table[t, y] / (table[t].sum() * table[:, y].sum()))
    return total


def _joint(q: np.ndarray) -> float:
    return mutual_information(q.reshape(len(q), -1))


def union_information_by_descent(first: np.ndarray, second: np.ndarray, steps: int = 300) -> float:
    """Least ``I_Q(T; Y X)`` by mirror descent: a multiplicative step, then iterative proportional fitting.

    Relative to the entropy the objective has smoothness 1, so that steps of 1 descend.
    """
    q = np.einsum("ty,tx->tyx", first, second) / first.sum(1)[:, None, None]
    for _ in range(steps):
        total = q.sum(0)
        q = np.where(q > 0, q / np.where(q > 0, q / np.where(total > 0, total, 1.0), 1.0), 0.0)
        for _ in range(40):
            rows = q.sum(2)
            q *= np.divide(first, rows, out=np.zeros_like(first), where=rows > 0)[:, :, None]
            columns = q.sum(1)
            if np.abs(columns - second).max() < 1e-10:
                break
            q *= np.divide(second, columns, out=np.zeros_like(second), where=columns > 0)[:, None, :]
    return _joint(q)


class ConicProgramme:
    """Least ``I_Q(T; Y X)`` as a conic programme: relative entropies, solved by Clarabel; compiled once."""

    def __init__(self, targets: int, rows: int, columns: int) -> None:
        import cvxpy as cp

        self._q = [[cp.Variable(columns, nonneg=True) for _ in range(rows)] for _ in range(targets)]
        self._first, self._second = cp.Parameter((targets, rows), nonneg=True), cp.Parameter((targets, columns))
        constraints = []
        for t in range(targets):
            constraints += [cp.sum(self._q[t][y]) == self._first[t, y] for y in range(rows)]
            constraints.append(sum(self._q[t]) == self._second[t])
        terms = [
            cp.sum(cp.rel_entr(self._q[t][y], sum(self._q[s][y] for s in range(targets))))
            for t, y in itertools.product(range(targets), range(rows))
        ]
        self._problem = cp.Problem(cp.Minimize(sum(terms)), constraints)
        self._solver = cp.CLARABEL

    def solve(self, first: np.ndarray, second: np.ndarray) -> float:
        self._first.value, self._second.value = first, second
        value = self._problem.solve(solver=self._solver)
        of_target = first.sum(1)
        return float(value - sum(p * np.log(p) for p in of_target if p > 0))


def ksg(x: np.ndarray, y: np.ndarray, neighbours: int) -> float:
    """Estimator 1 of Kraskov, Stögbauer & Grassberger (2004) of I(X; Y), by distances of all pairs."""
    dx, dy = np.abs(x[:, None] - x[None]), np.abs(y[:, None] - y[None])
    joint = np.maximum(dx, dy)
    total = 0.0
    for i in range(len(x)):
        others = np.delete(np.arange(len(x)), i)
        radius = np.sort(joint[i, others])[neighbours - 1]
        total += digamma((dx[i, others] < radius).sum() + 1) + digamma((dy[i, others] < radius).sum() + 1)
    return digamma(neighbours) + digamma(len(x)) - total / len(x)


def gaussian_information(samples: np.ndarray, target: np.ndarray, channels: tuple[int, ...]) -> float:
    """``-1/2 ln(1 - R^2)`` of the least-squares fit of the target by some channels of samples [n, C]."""
    design = np.column_stack([samples[:, list(channels)], np.ones(len(samples))])
    residual = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
    return -0.5 * np.log(residual.var() / target.var())


def triplet_ratio(samples: np.ndarray, target: np.ndarray, channels: list[int]) -> float:
    """Mean excess of all triplets of some channels over their best pair, over the pairs' mean excess."""
    one = {k: gaussian_information(samples, target, (k,)) for k in channels}
    two = {pair: gaussian_information(samples, target, pair) for pair in itertools.combinations(channels, 2)}
    pairs = [max(0.0, value - max(one[k] for k in pair)) for pair, value in two.items()]
    triplets = [
        max(0.0, gaussian_information(samples, target, triple) - max(two[p] for p in itertools.combinations(triple, 2)))
        for triple in itertools.combinations(channels, 3)
    ]
    return float(np.mean(triplets) / np.mean(pairs))
