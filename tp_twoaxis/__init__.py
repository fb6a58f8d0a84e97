"""Two-axis channel pruning for Torch-Pruning: which channels matter, and which their peers can replace."""

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance import (
    CapQGWImportance,
    HullImportance,
    HybridImportance,
    LocalImportance,
    TargetImportance,
    TwoAxisImportance,
)
from tp_twoaxis.pruning import PruningReport, load_pruned, prune_to_flops, save_pruned
from tp_twoaxis.statistics import CalibrationStatistics, LayerStatistics, calibrate

__all__ = [
    "CalibrationStatistics",
    "CapQGWImportance",
    "HullImportance",
    "HybridImportance",
    "LayerStatistics",
    "LocalImportance",
    "PruningReport",
    "TargetImportance",
    "TwoAxisError",
    "TwoAxisImportance",
    "calibrate",
    "load_pruned",
    "prune_to_flops",
    "save_pruned",
]
