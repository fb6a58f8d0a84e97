"""One rank of test_reduction.py: ``python ranks.py RANK WORLD FOLDER``."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from cases import batches, conv_net

from tp_twoaxis import CalibrationStatistics, TwoAxisError, calibrate
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.reduction import reduce_moments

# uneven shards of 44 images
CUTS = {"one": [0, 44], "two": [0, 31, 44], "three": [0, 5, 27, 44], "idle": [0, 0, 30, 44]}


def shard(rank, cuts):
    """This rank's images, in batches of 8."""
    x, y = batches(44, 44)[0]
    own = slice(cuts[rank], cuts[rank + 1])
    return list(zip(x[own].double().split(8), y[own].split(8), strict=True)) if own.start < own.stop else []


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


def check_rows_far_from_zero(rank):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 3, generator=generator, dtype=torch.float64) + 1e4
    rows[:, 2] = 1e4 / 3  # a constant: its scatter stays nought
    part = [rows[:0], rows[:100], rows[100:]][rank]
    own, single = (CoMoments(3), CoMoments(3, 2)), (CoMoments(3), CoMoments(3, 2))
    for moments, seen in ((own, part), (single, rows)):
        moments[0].update(seen, weight=2.0)
        moments[1].update(seen, seen[:, :2])
    reduce_moments(own)
    centred = rows - rows.mean(0)
    for mine, theirs, other in zip(own, single, (centred, centred[:, :2]), strict=True):
        assert (mine.count, mine.weight) == (theirs.count, theirs.weight)
        torch.testing.assert_close(mine.mean, rows.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(mine.other_mean, theirs.other_mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(mine.covariance, centred.T @ other / 300, rtol=1e-9, atol=1e-9)
    assert float(own[0].covariance[2, 2]) < 1e-20


def check_second_reduction(stats, group, folder, name):
    """What was reduced, was read back, or took in what was reduced, is refused on every rank."""
    stats.save(folder / f"{name}.safetensors")
    again = CalibrationStatistics.load(folder / f"{name}.safetensors")
    merged = calibrated(shard(1, CUTS["two"]), consumers=True).merge(again)
    for reduced in (stats, again, merged):
        message = refused(lambda reduced=reduced: reduced.all_reduce(group))
        assert message.startswith("all_reduce: rank 0: the statistics hold the images of all ranks already;"), message


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    collectives, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: collectives.append(args) or all_reduce(*args, **kwargs)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, world + 1)}
    for name, cuts in CUTS.items():
        size = len(cuts) - 1
        if rank < size:
            stats = calibrated(shard(rank, cuts), consumers=True)
            # as of a loader that says which images it has; a rank without any has no loader to ask
            stats.image_rows = torch.arange(cuts[rank], cuts[rank + 1]) if len(stats) else None
            collectives.clear()
            with torch.inference_mode():
                assert stats.all_reduce(groups[size]) is stats
            assert len(collectives) == (size > 1)
            check_second_reduction(stats, groups[size], folder, f"{name}-{rank}")

    check_rows_far_from_zero(rank)

    own = shard(rank, CUTS["three"])
    cases = {
        "layers": calibrated(own, layers=["conv1", "fc"] if rank == 1 else None),
        "labels": calibrated(own if rank else [x for x, _ in own], gradients=False),
        "gradients": calibrated(own, gradients=rank == 1),
        "nothing": calibrated([]),
        "one reduced": calibrated(own),
    }
    cases["one reduced"].reduced = rank == 2
    for name, stats in cases.items():
        (folder / f"{name}-{rank}.txt").write_text(refused(stats.all_reduce))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
