"""Two-axis channel pruning for Torch-Pruning: which channels matter, and which their peers can replace."""

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance import (
    AnticipatingImportance,
    CapQGWImportance,
    HullImportance,
    HybridImportance,
    LocalImportance,
    TargetImportance,
    TwoAxisImportance,
)
from tp_twoaxis.pruning import (
    PruningReport,
    SelectionResult,
    load_pruned,
    prune_to_flops,
    save_pruned,
    select_score,
)
from tp_twoaxis.scores import LOCAL_FAMILY
from tp_twoaxis.statistics import CalibrationStatistics, LayerStatistics, calibrate, calibrate_shards

__all__ = [
    "LOCAL_FAMILY",
    "AnticipatingImportance",
    "CalibrationStatistics",
    "CapQGWImportance",
    "HullImportance",
    "HybridImportance",
    "LayerStatistics",
    "LocalImportance",
    "PruningReport",
    "SelectionResult",
    "TargetImportance",
    "TwoAxisError",
    "TwoAxisImportance",
    "calibrate",
    "calibrate_shards",
    "load_pruned",
    "prune_to_flops",
    "save_pruned",
    "select_score",
]
