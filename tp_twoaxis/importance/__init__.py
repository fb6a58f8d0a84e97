"""Criteria: scores as Torch-Pruning importances, and the one way to find and build them."""

from tp_twoaxis.importance import criteria as _criteria  # noqa: F401  # fills the registry
from tp_twoaxis.importance.cap_qgw import CapQGWImportance
from tp_twoaxis.importance.criterion import Criterion, Importance
from tp_twoaxis.importance.distortion_curves import DistortionCurve, DistortionCurves
from tp_twoaxis.importance.hybrid import HybridImportance
from tp_twoaxis.importance.pruning_state import PruningState
from tp_twoaxis.importance.registry import (
    CRITERIA,
    as_criterion,
    expand_criteria,
    find_criterion,
    layer_score,
    make_importance,
)
from tp_twoaxis.importance.repair_aware import AnticipatingImportance
from tp_twoaxis.importance.two_axis import (
    HullImportance,
    LocalImportance,
    TargetImportance,
    TwoAxisImportance,
)
from tp_twoaxis.known_names import FAMILIES, criterion_names

__all__ = [
    "CRITERIA",
    "FAMILIES",
    "AnticipatingImportance",
    "CapQGWImportance",
    "Criterion",
    "DistortionCurve",
    "DistortionCurves",
    "HullImportance",
    "HybridImportance",
    "Importance",
    "LocalImportance",
    "PruningState",
    "TargetImportance",
    "TwoAxisImportance",
    "as_criterion",
    "criterion_names",
    "expand_criteria",
    "find_criterion",
    "layer_score",
    "make_importance",
]
