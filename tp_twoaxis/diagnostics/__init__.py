"""The paper's evidence on a network of one's own, one file a question; models are read and never changed."""

from tp_twoaxis.diagnostics.group_sensitivity import SensitivityReport, sensitivity
from tp_twoaxis.diagnostics.reliability import CalibrationSize, LayerReliability, calibration_is_enough
from tp_twoaxis.diagnostics.stability import LayerStability, StabilityReport, score_stability

__all__ = [
    "CalibrationSize",
    "LayerReliability",
    "LayerStability",
    "SensitivityReport",
    "StabilityReport",
    "calibration_is_enough",
    "score_stability",
    "sensitivity",
]
