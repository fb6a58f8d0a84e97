"""A method of the comparison: criterion, allocation, steps, repair and fine-tuning budget; and a trial of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

from pydantic import ConfigDict
from torch import Tensor

from tp_twoaxis.errors import check_count, check_name
from tp_twoaxis.importance import Importance, find_criterion
from tp_twoaxis.repair import parse_repair


class UniformAllocation:
    """An importance's order inside every group, and the same share of every group removed.

    Scores become quantiles of their group, so that a global threshold removes the same share of all groups: what
    differs between two methods is the ranking alone.

    Args:
        importance: any Torch-Pruning importance.

    Example:
        >>> import torch
        >>> UniformAllocation(lambda group: torch.tensor([5.0, -1.0, 2.0]))(None)
        tensor([0.8333, 0.1667, 0.5000])
    """

    def __init__(self, importance: Importance) -> None:
        self.importance = importance

    def __call__(self, group: Any) -> Any:
        """Rank a group; [C] quantiles in (0, 1), or None where the importance declines."""
        scores: Any = self.importance(group)
        if not isinstance(scores, Tensor):
            return scores
        ranks = scores.detach().cpu().argsort(stable=True).argsort()
        return (ranks + 0.5) / len(scores)


def _as_it_is(importance: Importance) -> Importance:
    return importance


ALLOCATIONS: dict[str, Callable[[Importance], Importance]] = {"global": _as_it_is, "uniform": UniformAllocation}
"""How a score decides how many channels each group loses: ``global`` by one threshold on the normalised scores."""


STRICT = ConfigDict(extra="forbid", strict=True)
"""How a dataclass of a config is read: no unknown keys, and no text in a number's place."""


@dataclass(frozen=True)
class Method:
    """One column of a table.

    Attributes:
        criterion: an expression, see :func:`~tp_twoaxis.importance.find_criterion`.
        allocation: a name in :data:`ALLOCATIONS`.
        repair: repairs in the order of :func:`~tp_twoaxis.prune_to_flops`; () repairs nothing.
        finetune_batches: training batches after the repair; 0 trains nothing.
        steps: of pruning; see :func:`~tp_twoaxis.prune_to_flops`.

    Example:
        >>> Method("l2", repair=("bn",), finetune_batches=200).name
        'l2+bn+ft200'
        >>> Method("l2", repair=("bn",), steps=3).name
        'l2+bn+steps3'
    """

    __pydantic_config__: ClassVar = STRICT

    criterion: str
    allocation: str = "global"
    repair: tuple[str, ...] = ("bn",)
    finetune_batches: int = 0
    steps: int = 1

    @property
    def treatment(self) -> str:
        """All but the criterion: ``"bn+ft200"``, ``"none"``, ``"uniform bn"``."""
        return ("" if self.allocation == "global" else f"{self.allocation} ") + ("+".join(self._parts) or "none")

    @property
    def name(self) -> str:
        """The criterion and the treatment in short, unique within a table."""
        return "+".join([self.criterion + ("" if self.allocation == "global" else f"/{self.allocation}"), *self._parts])

    @property
    def _parts(self) -> list[str]:
        # one step and no training are what a method is without a name for them
        steps = [f"steps{self.steps}"] if self.steps > 1 else []
        return [*self.repair, *steps] + ([f"ft{self.finetune_batches}"] if self.finetune_batches else [])

    def checked(self) -> Method:
        """Return the method with aliases replaced.

        Raises:
            TwoAxisError: a name is unknown or a number is out of range; the message lists the valid names.

        Example:
            >>> Method("local").checked().criterion
            'capture'
        """
        criterion = find_criterion(self.criterion).name
        check_name("allocation", self.allocation, ALLOCATIONS)
        repair = parse_repair(self.repair)
        check_count("finetune_batches", self.finetune_batches, least=0)
        check_count("steps", self.steps)
        return replace(self, criterion=criterion, repair=repair)


def cross(
    criteria: Iterable[str],
    *,
    allocations: Iterable[str] = ("global",),
    repairs: Iterable[Sequence[str]] = (("bn",),),
    budgets: Iterable[int] = (0,),
    steps: Iterable[int] = (1,),
) -> tuple[Method, ...]:
    """Every criterion with every allocation, repair, fine-tuning budget and number of steps.

    Example:
        >>> [m.name for m in cross(["l1", "l2"], repairs=[(), ("bn",)])]
        ['l1', 'l1+bn', 'l2', 'l2+bn']
    """
    return tuple(
        Method(criterion, allocation, tuple(repair), budget, number).checked()
        for criterion, allocation, repair, budget, number in product(criteria, allocations, repairs, budgets, steps)
    )


@dataclass(frozen=True)
class Trial:
    """One network, pruned once by one method.

    Attributes:
        network: its name in the sweep.
        seed: of the calibration images' draw, of ``random``, of fine-tuning.
        method: what prunes it.
        keep: share to keep.

    Example:
        >>> Trial("resnet20", 42, Method("l2"), 0.5).key
        'resnet20|42|l2+bn|0.5'
    """

    network: str
    seed: int
    method: Method
    keep: float

    @property
    def key(self) -> str:
        """The trial's identity within a sweep."""
        return f"{self.network}|{self.seed}|{self.method.name}|{self.keep:g}"

    @property
    def file_name(self) -> str:
        """Name of its file: readable, and unique by a few digits of a hash."""
        readable = re.sub(r"[^\w.+-]+", "_", f"{self.network}-{self.method.name}-keep{self.keep:g}-seed{self.seed}")
        return f"{readable[:120]}-{hashlib.blake2b(self.key.encode(), digest_size=4).hexdigest()}.json"
