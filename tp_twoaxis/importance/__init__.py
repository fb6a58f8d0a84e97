"""Scores as Torch-Pruning importances."""

from tp_twoaxis.importance.anticipating import AnticipatingImportance
from tp_twoaxis.importance.cap import CapQGWImportance
from tp_twoaxis.importance.hybrid import HybridImportance
from tp_twoaxis.importance.two_axis import (
    HullImportance,
    LocalImportance,
    TargetImportance,
    TwoAxisImportance,
)

__all__ = [
    "AnticipatingImportance",
    "CapQGWImportance",
    "HullImportance",
    "HybridImportance",
    "LocalImportance",
    "TargetImportance",
    "TwoAxisImportance",
]
