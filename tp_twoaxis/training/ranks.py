"""One process or several: which this is, and what the others do with it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def ranks() -> int:
    """Number of processes that train together.

    Example:
        >>> ranks()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is.

    Example:
        >>> rank()
        0
    """
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def averaging(network: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a network so that it starts from rank 0's weights and every backward pass averages gradients.

    Example:
        >>> averaging(nn.Linear(2, 1), torch.device("cpu"))
        Linear(in_features=2, out_features=1, bias=True)
    """
    if ranks() == 1:
        return network
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def share_buffers(network: nn.Module) -> None:
    """Send rank 0's running statistics to the others, each of which has seen other images last.

    Example:
        >>> share_buffers(nn.BatchNorm1d(2))
    """
    if ranks() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
