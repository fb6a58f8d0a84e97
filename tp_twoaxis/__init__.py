"""Two-axis channel pruning for Torch-Pruning: which channels matter, and which their peers can replace.

Names are imported when they are first used, so that ``import tp_twoaxis`` itself takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        model_card,
        prune_to_flops,
        save_pruned,
        select_score,
    )
    from tp_twoaxis.statistics import CalibrationStatistics, LayerStatistics, calibrate, calibrate_shards

_HOMES = {
    "TwoAxisError": "errors",
    "AnticipatingImportance": "importance",
    "CapQGWImportance": "importance",
    "HullImportance": "importance",
    "HybridImportance": "importance",
    "LocalImportance": "importance",
    "TargetImportance": "importance",
    "TwoAxisImportance": "importance",
    "PruningReport": "pruning",
    "SelectionResult": "pruning",
    "load_pruned": "pruning",
    "model_card": "pruning",
    "prune_to_flops": "pruning",
    "save_pruned": "pruning",
    "select_score": "pruning",
    "CalibrationStatistics": "statistics",
    "LayerStatistics": "statistics",
    "calibrate": "statistics",
    "calibrate_shards": "statistics",
}

# attributes of the package too, without an import of their own
_FOLDERS = (
    "benchmark",
    "data",
    "dependency",
    "diagnostics",
    "errors",
    "importance",
    "models",
    "pruning",
    "reconstruction",
    "repair",
    "runtime",
    "scores",
    "statistics",
    "training",
)

__all__ = [
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
    "model_card",
    "prune_to_flops",
    "save_pruned",
    "select_score",
]


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS})
