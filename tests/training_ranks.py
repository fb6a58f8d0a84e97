"""One rank of test_training.py: ``python training_ranks.py RANK WORLD FOLDER``."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from tp_twoaxis.training import finetune

OPTIONS = {"epochs": 3, "max_batches": 7, "lr": 0.2, "progress": False}
COUNTS = (4, 3)  # batches of each rank: the passes have those of the rank that has fewest


def network():
    torch.manual_seed(0)
    return nn.Linear(6, 3, dtype=torch.float64)


def shard(rank):
    generator = torch.Generator().manual_seed(rank + 1)
    return [
        (torch.randn(4, 6, generator=generator, dtype=torch.float64), torch.randint(3, (4,), generator=generator))
        for _ in range(COUNTS[rank])
    ]


class Stops(list):
    """A shard that ends the process's run after some batches."""

    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            if index == 2:
                raise KeyboardInterrupt
            yield batch


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model = network()
    if rank:
        nn.init.zeros_(model.weight)  # rank 0's weights count
    report = finetune(model, shard(rank), **OPTIONS)
    checkpoint = {"checkpoint": folder / "run.safetensors", "checkpoint_every": 2}
    resumed = network()
    try:
        finetune(resumed, Stops(shard(rank)), **OPTIONS, **checkpoint)
    except KeyboardInterrupt:
        dist.barrier()
    assert finetune(resumed, shard(rank), resume=True, **OPTIONS, **checkpoint).resumed_at == 2
    norms = nn.Sequential(nn.BatchNorm1d(6, dtype=torch.float64), nn.Linear(6, 3, dtype=torch.float64))
    finetune(norms, shard(rank), **OPTIONS)
    save_file(
        {
            **model.state_dict(),
            "losses": torch.tensor(report.losses, dtype=torch.float64),
            "counts": torch.tensor([report.images, report.batches]),
            "resumed.weight": resumed.weight.detach(),
            "running_mean": norms[0].running_mean,
        },
        folder / f"{rank}.safetensors",
    )
    dist.barrier()  # no rank may leave while another still answers the last collective
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    # gloo's threads may abort a loaded machine's process while it ends; what was asked for is written by now
    os._exit(0)
