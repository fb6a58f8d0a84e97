"""Importance in, smaller model out."""

from tp_twoaxis.pruning.apply import prune_to_flops
from tp_twoaxis.pruning.checkpoint import load_pruned, save_pruned
from tp_twoaxis.pruning.report import PruningReport

__all__ = ["PruningReport", "load_pruned", "prune_to_flops", "save_pruned"]
