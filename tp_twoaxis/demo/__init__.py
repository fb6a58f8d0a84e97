"""Two axes on real images in about a minute, without a network connection or a GPU: a sweep over digits."""

from tp_twoaxis.demo.result import DemoResult
from tp_twoaxis.demo.run import run_demo

__all__ = ["DemoResult", "run_demo"]
