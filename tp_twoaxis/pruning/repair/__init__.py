"""Mend what is left after removal, without labels and without training."""

from tp_twoaxis.pruning.repair.batch_norm import batch_norms, reestimate_batch_norm
from tp_twoaxis.pruning.repair.losses import LayerLoss, layer_losses
from tp_twoaxis.pruning.repair.report import ConsumerRepair, RemovedChannel, RepairReport
from tp_twoaxis.pruning.repair.request import REPAIRS, check_repair
from tp_twoaxis.pruning.repair.run import repair_network

__all__ = [
    "REPAIRS",
    "ConsumerRepair",
    "LayerLoss",
    "RemovedChannel",
    "RepairReport",
    "batch_norms",
    "check_repair",
    "layer_losses",
    "reestimate_batch_norm",
    "repair_network",
]
