"""Ranks with uneven shards end with the statistics of one process; ranks that differ raise instead of hanging."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import batches, conv_net

from tp_twoaxis import CalibrationStatistics, calibrate

WORLD = 3

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What three processes wrote; groups of one, two and three of them calibrated the same images."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.platform.startswith("linux"):
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ranks.py")), str(rank), str(WORLD), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * WORLD, "\n".join(said)
    return folder


@pytest.mark.parametrize(("name", "size"), [("one", 1), ("two", 2), ("three", 3), ("idle", 3)])
def test_every_rank_ends_with_the_statistics_of_one_process(folder, name, size):
    loader = [(x.double(), y) for x, y in batches(44, 11)]
    single = calibrate(conv_net().double(), loader, positions=5, consumers=True, gradients=True, progress=False)
    for rank in range(size):
        stats = CalibrationStatistics.load(folder / f"{name}-{rank}.safetensors")
        assert (stats.num_images, stats.target, stats.extras) == (44, single.target, single.extras)
        assert list(stats) == list(single)
        assert stats.image_rows.tolist() == list(range(44))
        for (key, mine), (expected, theirs) in zip(stats._named_moments(), single._named_moments(), strict=True):
            assert (key, mine.count, mine.weight) == (expected, theirs.count, pytest.approx(theirs.weight))
            torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(mine.covariance, theirs.covariance, rtol=1e-9, atol=1e-12)
        for layer, entry in single.layers.items():
            assert torch.equal(stats[layer].weight_power, entry.weight_power)
            torch.testing.assert_close(stats[layer].target_correlation(), entry.target_correlation(), rtol=1e-9, atol=0)
        stats.verify(conv_net().double())


@pytest.mark.parametrize(("name", "size"), [("two", 2), ("three", 3), ("idle", 3)])
def test_the_ranks_agree_to_the_last_bit(folder, name, size):
    first, *others = (CalibrationStatistics.load(folder / f"{name}-{rank}.safetensors") for rank in range(size))
    for other in others:
        for mine, theirs in zip(first._moments(), other._moments(), strict=True):
            assert torch.equal(mine.scatter, theirs.scatter)
            assert torch.equal(mine.mean, theirs.mean)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("layers", "all_reduce: ranks 0 and 1 hold statistics that differ in their layers, weights, recorded "),
        ("labels", "all_reduce: ranks 0 and 1 hold statistics that differ in their target, task variables"),
        ("gradients", "all_reduce: ranks 0 and 1 hold statistics that differ in their gradients, recorded moments; "),
        ("nothing", "all_reduce: no rank has images; check the data path and split"),
        ("one reduced", "all_reduce: rank 2: the statistics hold the images of all ranks already; reduce those of"),
    ],
)
def test_ranks_that_do_not_fit_raise_on_every_rank(folder, what, expected):
    for rank in range(WORLD):
        assert re.match(expected, (folder / f"{what}-{rank}.txt").read_text())
