"""Criteria of others, as published; Torch-Pruning's own versions where they differ."""

import torch_pruning as tp

from tp_twoaxis.importance.baselines.gradient_criteria import TaylorBNImportance

READ_FROM_MODEL = (
    tp.importance.GroupTaylorImportance,
    tp.importance.GroupHessianImportance,
    tp.importance.OBDCImportance,
    tp.importance.ActivationImportance,
    TaylorBNImportance,
)
"""Importances whose numbers are on the model, of the state in which somebody put them there."""

__all__ = ["READ_FROM_MODEL"]
