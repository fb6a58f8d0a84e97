"""MACs as a function of how many portions have left each group, in time that does not depend on their channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tp_twoaxis.dependency.cost import CostModel, Side
from tp_twoaxis.pruning.portions import Portions

Levels = npt.NDArray[np.int64]
"""[groups], how many portions have left each."""


class AllocationCost:
    """What a cost model gives where portions leave in their order, by tables instead of masks.

    What a side of a layer has lost after so many portions of a group is summed up once, so that one evaluation
    looks at every side and layer, and at no channel.

    Args:
        cost: of masks.
        names: the groups.
        portions: of each group.

    Example:
        >>> from tp_twoaxis.dependency.cost import Term
        >>> from tp_twoaxis.pruning.portions import ScoredGroup, portions_of
        >>> side, portions = Side(4, {"a": np.ones(4)}), portions_of(ScoredGroup("a", np.arange(4.0)), 0.1, 2)
        >>> cost = AllocationCost(CostModel([Term(80.0, (side,)), Term(20.0, ())]), ["a"], [portions])
        >>> cost.macs(np.array([0])), cost.macs(np.array([1]))
        (100.0, 60.0)
    """

    def __init__(self, cost: CostModel, names: Sequence[str], portions: Sequence[Portions]) -> None:
        sides: dict[int, Side] = {id(side): side for term in cost.terms for side in term.sides}
        place = {key: position for position, key in enumerate(sides)}
        number = {name: group for group, name in enumerate(names)}
        lost = [
            (position, number[name], portions[number[name]], weights)
            for position, side in enumerate(sides.values())
            for name, weights in side.lost.items()
            if name in number
        ]
        tables = [np.concatenate([[0.0], np.cumsum(weights[own.order])])[own.gone] for _, _, own, weights in lost]
        self._losing_side = np.array([position for position, _, _, _ in lost], dtype=np.int64)
        self._losing_group = np.array([group for _, group, _, _ in lost], dtype=np.int64)
        self._starts = np.cumsum([0, *map(len, tables)])[:-1]
        self._tables = np.concatenate(tables) if tables else np.zeros(0)
        self._widths = np.array([side.width for side in sides.values()], dtype=np.float64)
        curves = [(place[key], side.curve) for key, side in sides.items() if side.curve is not None]
        self._curved = np.array([position for position, _ in curves], dtype=np.int64)
        self._curve_starts = np.cumsum([0, *(len(curve) for _, curve in curves)], dtype=np.int64)[:-1]
        self._curves = np.concatenate([np.zeros(0), *(curve for _, curve in curves)])
        self._macs = np.array([term.macs for term in cost.terms], dtype=np.float64)
        # terms have few sides; where one has fewer than another, a side that loses nothing stands in
        most = max((len(term.sides) for term in cost.terms), default=0)
        self._factors = np.full((most, len(cost.terms)), len(sides), dtype=np.int64)
        for column, term in enumerate(cost.terms):
            self._factors[: len(term.sides), column] = [place[id(side)] for side in term.sides]

    def macs(self, levels: Levels) -> float:
        """Predict the MACs left; as :meth:`CostModel.macs` of the masks.

        Args:
            levels: [groups], how many portions have left each.
        """
        weights = self._tables[self._starts + levels[self._losing_group]]
        lost = np.bincount(self._losing_side, weights, minlength=len(self._widths))
        shares = np.append(1.0 - lost / self._widths, 1.0)
        shares[self._curved] = self._curves[self._curve_starts + np.rint(lost[self._curved]).astype(np.int64)]
        product = np.ones(len(self._macs))
        for factor in self._factors:
            product *= shares[factor]
        return math.fsum((self._macs * product).tolist())
