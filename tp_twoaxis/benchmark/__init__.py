"""The comparison at equal MACs: one protocol, every method, resumable.

Not imported by the package itself: it needs what ``pip install "tp-twoaxis[cli]"`` brings.
"""

from tp_twoaxis.benchmark.config import BenchmarkConfig, DataConfig, NetworkConfig, load_config
from tp_twoaxis.benchmark.methods import Method, cross
from tp_twoaxis.benchmark.report import Report, make_report, write_report
from tp_twoaxis.benchmark.runner import RunSummary, run_benchmark

__all__ = [
    "BenchmarkConfig",
    "DataConfig",
    "Method",
    "NetworkConfig",
    "Report",
    "RunSummary",
    "cross",
    "load_config",
    "make_report",
    "run_benchmark",
    "write_report",
]
