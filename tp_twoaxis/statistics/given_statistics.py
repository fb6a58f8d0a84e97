"""Statistics where a user gives them, which may be something else."""

from __future__ import annotations

from pathlib import Path

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.store import CalibrationStatistics


def check_statistics(stats: object) -> None:
    """Refuse what stands in the place of statistics, such as the path of their file.

    Raises:
        TwoAxisError: saying how statistics come of it.

    Example:
        >>> check_statistics("stats.safetensors")
        Traceback (most recent call last):
        tp_twoaxis.errors.TwoAxisError: stats: expected CalibrationStatistics, got str; read the file:
        CalibrationStatistics.load('stats.safetensors')
    """
    if isinstance(stats, CalibrationStatistics):
        return
    way = "calibrate(model, loader) gathers them"
    if isinstance(stats, (str, Path)):
        way = f"read the file: CalibrationStatistics.load({str(stats)!r})"
    raise TwoAxisError(f"stats: expected CalibrationStatistics, got {type(stats).__name__}; {way}")
