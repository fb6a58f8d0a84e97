"""Ranks with uneven shards end with the statistics of one process; ranks that differ raise instead of hanging."""

import os
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


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_ends_with_the_statistics_of_one_process(folder, size):
    loader = [(x.double(), y) for x, y in batches(44, 11)]
    single = calibrate(conv_net().double(), loader, positions=5, consumers=True, gradients=True, progress=False)
    for rank in range(size):
        stats = CalibrationStatistics.load(folder / f"{size}-{rank}.safetensors")
        assert stats.num_images == 44
        assert list(stats) == list(single)
        for mine, theirs in zip(stats._moments(), single._moments(), strict=True):
            assert (mine.count, mine.weight) == (theirs.count, pytest.approx(theirs.weight))
            torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(mine.covariance, theirs.covariance, rtol=1e-9, atol=1e-12)
        stats.verify(conv_net().double())


@pytest.mark.parametrize("size", [2, 3])
def test_the_ranks_agree_to_the_last_bit(folder, size):
    first, *others = (CalibrationStatistics.load(folder / f"{size}-{rank}.safetensors") for rank in range(size))
    for other in others:
        for mine, theirs in zip(first._moments(), other._moments(), strict=True):
            assert torch.equal(mine.scatter, theirs.scatter)


@pytest.mark.parametrize("what", ["layers", "labels", "gradients"])
def test_ranks_that_differ_raise_on_every_rank(folder, what):
    for rank in range(WORLD):
        message = (folder / f"{what}-{rank}.txt").read_text()
        assert message.startswith("all_reduce: the ranks hold statistics of different models, layers or targets; give")
