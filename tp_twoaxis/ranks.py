"""One process or several: which this is, and what the others do with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class Place(NamedTuple):
    """Rank of a process, number of processes, and the process's device."""

    rank: int
    ranks: int
    device: str


@contextmanager
def process_group(device: str) -> Iterator[Place]:
    """Join the processes that torchrun started, if it did, for the length of the block.

    Args:
        device: ``cuda`` becomes the rank's own GPU, and talks over NCCL; everything else over Gloo.

    Example:
        >>> with process_group("cpu") as place:
        ...     place
        Place(rank=0, ranks=1, device='cpu')
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Place(0, 1, device)
        return
    on_gpu = device == "cuda"
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


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
    _send(network.buffers())


def barrier() -> None:
    """Wait for the other ranks.

    Example:
        >>> barrier()
    """
    if ranks() > 1:
        dist.barrier()


@contextmanager
def leader_first() -> Iterator[None]:
    """Run the block on rank 0, and then on the others: what it makes is there when they look.

    Example:
        >>> with leader_first():
        ...     pass
    """
    if rank() != 0:
        barrier()
    try:
        yield
    finally:
        if rank() == 0:
            barrier()


def from_leader(value: T) -> T:
    """Give every rank the value that rank 0 has.

    Example:
        >>> from_leader([1, 2])
        [1, 2]
    """
    if ranks() == 1:
        return value
    box: list[T] = [value]
    dist.broadcast_object_list(box, 0, device=_device())
    return box[0]


def share_state(network: nn.Module) -> None:
    """Send rank 0's parameters and buffers to the others.

    Example:
        >>> share_state(nn.BatchNorm1d(2))
    """
    _send([*network.parameters(), *network.buffers()])


def total(*numbers: float) -> list[float]:
    """Add each number up over all ranks.

    Example:
        >>> total(3, 4)
        [3.0, 4.0]
    """
    sums = torch.tensor(numbers, dtype=torch.float64, device=_device())
    if ranks() > 1:
        dist.all_reduce(sums)
    return [float(number) for number in sums]


def _send(tensors: Iterable[Tensor]) -> None:
    if ranks() > 1:
        with torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def _device() -> torch.device:
    """Where collectives want their tensors."""
    on_gpu = ranks() > 1 and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
