"""Repair pruned networks without labels and without training."""

from tp_twoaxis.known_names import parse_repair
from tp_twoaxis.repair.batch_norm import batch_norms, reestimate_batch_norm
from tp_twoaxis.repair.repair import repair_network
from tp_twoaxis.repair.repair_report import ConsumerRepair, RemovedChannel, RepairReport
from tp_twoaxis.repair.strategies import REPAIRS, check_repair, refits

__all__ = [
    "REPAIRS",
    "ConsumerRepair",
    "RemovedChannel",
    "RepairReport",
    "batch_norms",
    "check_repair",
    "parse_repair",
    "reestimate_batch_norm",
    "refits",
    "repair_network",
]
