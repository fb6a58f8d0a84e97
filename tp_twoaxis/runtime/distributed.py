"""One process or several: rank and number of processes, and the collectives that the package needs."""

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


class ProcessInfo(NamedTuple):
    """Rank of a process, number of processes, and the process's device."""

    rank: int
    world_size: int
    device: str


@contextmanager
def process_group(device: str) -> Iterator[ProcessInfo]:
    """Join the processes that torchrun started, if it did, for the length of the block.

    Args:
        device: ``cuda`` becomes the rank's own GPU, with NCCL as the backend; everything else runs over Gloo.

    Example:
        >>> with process_group("cpu") as process:
        ...     process
        ProcessInfo(rank=0, world_size=1, device='cpu')
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ProcessInfo(0, 1, device)
        return
    on_gpu = device == "cuda"
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield ProcessInfo(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes in a group, by default of all; 1 without one.

    Example:
        >>> world_size()
        1
    """
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process in the group; 0 without a group.

    Example:
        >>> rank()
        0
    """
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def data_parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a network so that it starts from rank 0's weights and every backward pass averages gradients.

    Example:
        >>> data_parallel(nn.Linear(2, 1), torch.device("cpu"))
        Linear(in_features=2, out_features=1, bias=True)
    """
    if world_size() == 1:
        return network
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def broadcast_buffers(network: nn.Module) -> None:
    """Send rank 0's running statistics to the other ranks, which have gathered theirs on other images.

    Example:
        >>> broadcast_buffers(nn.BatchNorm1d(2))
    """
    _broadcast(network.buffers())


def barrier() -> None:
    """Wait for the other ranks.

    Example:
        >>> barrier()
    """
    if world_size() > 1:
        dist.barrier()


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block on rank 0 and then on the other ranks, which find what rank 0 has made.

    Example:
        >>> with rank_zero_first():
        ...     pass
    """
    if rank() != 0:
        barrier()
    try:
        yield
    finally:
        if rank() == 0:
            barrier()


def broadcast_from_rank_zero(value: T) -> T:
    """Send rank 0's value, any picklable object, to all ranks.

    Example:
        >>> broadcast_from_rank_zero([1, 2])
        [1, 2]
    """
    if world_size() == 1:
        return value
    box: list[T] = [value]
    dist.broadcast_object_list(box, 0, device=collective_device())
    return box[0]


def broadcast_state(network: nn.Module) -> None:
    """Send rank 0's parameters and buffers to the other ranks.

    Example:
        >>> broadcast_state(nn.BatchNorm1d(2))
    """
    _broadcast([*network.parameters(), *network.buffers()])


def sum_over_ranks(*numbers: float) -> list[float]:
    """Add each number up over all ranks.

    Example:
        >>> sum_over_ranks(3, 4)
        [3.0, 4.0]
    """
    sums = torch.tensor(numbers, dtype=torch.float64, device=collective_device())
    sum_in_place(sums)
    return [float(number) for number in sums]


def sum_in_place(*tensors: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Replace each tensor by its sum over the ranks of a group, by default all.

    Example:
        >>> sum_in_place(torch.ones(2))
    """
    if world_size(group) > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)


def min_over_ranks(number: int) -> int:
    """Smallest value of a whole number over all ranks.

    Example:
        >>> min_over_ranks(3)
        3
    """
    if world_size() == 1:
        return number
    smallest = torch.tensor(number, device=collective_device())
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)


def gather_over_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Gather the values of a group's ranks, any picklable objects, by rank; by default of all ranks.

    Example:
        >>> gather_over_ranks("a")
        ['a']
    """
    gathered = [value] * world_size(group)
    if len(gathered) > 1:
        dist.all_gather_object(gathered, value, group)
    return gathered


def collective_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Device on which the backend of a group expects the tensors of a collective.

    Example:
        >>> collective_device()
        device(type='cpu')
    """
    on_gpu = world_size(group) > 1 and dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _broadcast(tensors: Iterable[Tensor]) -> None:
    if world_size() > 1:
        with torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, 0)
