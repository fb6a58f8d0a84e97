"""What a removal is worth: each layer's MACs as a product of the shares of its outputs and inputs that stay."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Side:
    """One side (outputs or inputs) of a layer: its width and what each group removes from it.

    Attributes:
        width: channels in the dense layer.
        lost: group name -> [size] channels of this side that leave with each of the group's root channels
            (1 as a rule, 49 where a 7 x 7 map is flattened, 0 where concatenation passes the channel by).
        curve: [width + 1] share of a term that is left when so many channels are gone; None where it is the share of
            the channels.
    """

    width: int
    lost: dict[str, Array] = field(default_factory=dict)
    curve: Array | None = None

    def kept(self, lost: float) -> float:
        """Share of a term that is left when so many of the side's channels are gone.

        Example:
            >>> Side(4).kept(1.0), Side(2, curve=np.array([1.0, 0.75, 0.0])).kept(1.0)
            (0.75, 0.75)
        """
        return 1.0 - lost / self.width if self.curve is None else float(self.curve[round(lost)])


@dataclass(frozen=True)
class Term:
    """MACs that scale with the product of what some sides keep; without sides a constant."""

    macs: float
    sides: tuple[Side, ...]


@dataclass
class CostModel:
    """MACs of a network as a function of the removed channels of each group.

    Exact for convolutions and linear layers; attention products scale with the kept width.

    Attributes:
        terms: one or two a layer, plus a constant for what no group touches.
        unit: what is counted, for messages; whatever it is, it stands where MACs are spoken of.

    Example:
        >>> side = Side(4, {"a": np.ones(4)})
        >>> CostModel([Term(80.0, (side,)), Term(20.0, ())]).macs({"a": np.array([True, True, False, False])})
        60.0
    """

    terms: list[Term]
    unit: str = "MACs"

    def macs(self, removed: dict[str, npt.NDArray[np.bool_]]) -> float:
        """Predict the MACs left.

        Args:
            removed: group name -> [size] bool; groups that are missing stay whole.

        Returns:
            MACs of one example.
        """
        lost = {id(side): self._lost(side, removed) for term in self.terms for side in term.sides}
        return math.fsum(term.macs * math.prod(side.kept(lost[id(side)]) for side in term.sides) for term in self.terms)

    @property
    def dense(self) -> float:
        """MACs with nothing removed."""
        return math.fsum(term.macs for term in self.terms)

    @staticmethod
    def _lost(side: Side, removed: dict[str, npt.NDArray[np.bool_]]) -> float:
        return float(sum(weights[removed[name]].sum() for name, weights in side.lost.items() if name in removed))


def channel_count(sizes: dict[str, int]) -> CostModel:
    """Count channels instead of MACs: every root channel of every group weighs 1.

    Args:
        sizes: group name -> root channels.

    Example:
        >>> channel_count({"a": 4, "b": 2}).macs({"b": np.array([True, False])})
        5.0
    """
    return CostModel([Term(float(n), (Side(n, {name: np.ones(n)}),)) for name, n in sizes.items()], "channels")
