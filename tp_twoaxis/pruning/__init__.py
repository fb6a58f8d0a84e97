"""Importance in, smaller model out."""

from tp_twoaxis.pruning.card_text import model_card
from tp_twoaxis.pruning.checkpoint import load_pruned, save_pruned
from tp_twoaxis.pruning.prune import prune_to_flops
from tp_twoaxis.pruning.pruning_report import PruningReport
from tp_twoaxis.pruning.selection import select_score
from tp_twoaxis.pruning.selection_result import SelectionResult

__all__ = [
    "PruningReport",
    "SelectionResult",
    "load_pruned",
    "model_card",
    "prune_to_flops",
    "save_pruned",
    "select_score",
]
