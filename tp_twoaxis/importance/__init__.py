"""Scores as Torch-Pruning importances."""

from tp_twoaxis.importance.two_axis import (
    HullImportance,
    LocalImportance,
    TargetImportance,
    TwoAxisImportance,
)

__all__ = ["HullImportance", "LocalImportance", "TargetImportance", "TwoAxisImportance"]
