"""Model and loader in, mergeable statistics out."""

from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.store import CalibrationStatistics, LayerStatistics

__all__ = ["CalibrationStatistics", "LayerStatistics", "calibrate"]
