"""Model and loader in, mergeable statistics out."""

from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.layer_statistics import LayerStatistics
from tp_twoaxis.statistics.pooled_samples import PooledSamples, pooled_samples
from tp_twoaxis.statistics.resampling import calibrate_shards
from tp_twoaxis.statistics.store import CalibrationStatistics

__all__ = [
    "CalibrationStatistics",
    "LayerStatistics",
    "PooledSamples",
    "calibrate",
    "calibrate_shards",
    "pooled_samples",
]
