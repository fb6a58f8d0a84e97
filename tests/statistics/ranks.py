"""One rank of test_distributed.py: ``python ranks.py RANK WORLD FOLDER``."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from cases import batches, conv_net

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.statistics.moments import CoMoments

CUTS = {1: [0, 44], 2: [0, 31, 44], 3: [0, 5, 27, 44]}  # uneven shards of 44 images


def shard(rank, world):
    """This rank's images, in batches of 8."""
    x, y = batches(44, 44)[0]
    own = slice(CUTS[world][rank], CUTS[world][rank + 1])
    return list(zip(x[own].double().split(8), y[own].split(8), strict=True))


def calibrated(loader, **options):
    options = {"positions": 5, "gradients": True, **options}
    return calibrate(conv_net().double(), loader, progress=False, **options)


def refused(action):
    """The message of the TwoAxisError, or nothing."""
    try:
        action()
    except TwoAxisError as error:
        return str(error)
    return ""


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    groups = {size: dist.new_group(list(range(size))) for size in CUTS}
    for size, group in groups.items():
        if rank < size:
            stats = calibrated(shard(rank, size), consumers=True)
            assert stats.all_reduce(group) is stats
            stats.save(folder / f"{size}-{rank}.safetensors")

    # far from zero, an empty rank, and the whole group by default
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 3, generator=generator, dtype=torch.float64) + 1e5
    moments = CoMoments(3, 2)
    part = [rows[:0], rows[:100], rows[100:]][rank]
    moments.update(part, part[:, :2])
    moments.all_reduce()
    single = CoMoments(3, 2)
    single.update(rows, rows[:, :2])
    assert moments.count == 300
    torch.testing.assert_close(moments.covariance, single.covariance, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moments.other_mean, single.other_mean, rtol=1e-14, atol=0)

    layers = calibrated(shard(rank, world), layers=["conv1", "fc"] if rank == 1 else None)
    labels = calibrated(shard(rank, world) if rank else [x for x, _ in shard(rank, world)], gradients=False)
    gradients = calibrated(shard(rank, world), gradients=rank == 1)
    for name, stats in {"layers": layers, "labels": labels, "gradients": gradients}.items():
        (folder / f"{name}-{rank}.txt").write_text(refused(stats.all_reduce))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
