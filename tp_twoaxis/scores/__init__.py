"""Pure scores: statistics of a layer in, one number a channel out."""

from tp_twoaxis.scores.hull import Hulls, full_explanation, greedy_hulls
from tp_twoaxis.scores.local import input_capture, pair_overlap, peer_overlap, rayleigh_quotient
from tp_twoaxis.scores.named_scores import SCORES, find_score
from tp_twoaxis.scores.target import (
    pair_excess,
    pair_information,
    target_excess,
    target_redundancy,
    task_information,
)

__all__ = [
    "SCORES",
    "Hulls",
    "find_score",
    "full_explanation",
    "greedy_hulls",
    "input_capture",
    "pair_excess",
    "pair_information",
    "pair_overlap",
    "peer_overlap",
    "rayleigh_quotient",
    "target_excess",
    "target_redundancy",
    "task_information",
]
