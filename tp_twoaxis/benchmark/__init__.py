"""The comparison at equal MACs: one protocol, every method, resumable.

Not imported by the package itself: it needs what ``pip install "tp-twoaxis[cli]"`` brings. Tables and figures are in
:mod:`tp_twoaxis.benchmark.report`, apart, so that worker processes start without pandas and matplotlib.
"""

from tp_twoaxis.benchmark.engines import LocalEngine
from tp_twoaxis.benchmark.methods import Method, cross
from tp_twoaxis.benchmark.ray_engine import RayEngine
from tp_twoaxis.benchmark.runner import RunSummary, run_benchmark
from tp_twoaxis.benchmark.sweep import BenchmarkConfig, DataConfig, NetworkConfig, load_config

__all__ = [
    "BenchmarkConfig",
    "DataConfig",
    "LocalEngine",
    "Method",
    "NetworkConfig",
    "RayEngine",
    "RunSummary",
    "cross",
    "load_config",
    "run_benchmark",
]
