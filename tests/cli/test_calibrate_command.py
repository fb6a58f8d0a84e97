"""``tp-twoaxis calibrate`` on several processes; on one, see test_commands.py."""

from __future__ import annotations

import json

import pytest
import torch
from cli_cases import EXACT_MODEL, succeed, two_ranks

from tp_twoaxis import CalibrationStatistics


def test_two_processes_write_the_statistics_of_one(folder, tmp_path):
    arguments = ["calibrate", EXACT_MODEL, "--json", "--data", folder / "images", "--images", 39, "--gradients"]
    succeed(*arguments, "--out", tmp_path / "one.safetensors")
    printed = two_ranks(*arguments, "--out", tmp_path / "two.safetensors")
    assert json.loads(printed[0])["images"] == 39
    assert printed[1] == ""  # rank 0 speaks for all
    one, two = (CalibrationStatistics.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert (one.reduced, two.reduced, two.num_images, list(two)) == (False, True, 39, list(one))
    for mine, theirs in zip(two._moments(), one._moments(), strict=True):
        assert (mine.count, mine.weight) == (theirs.count, pytest.approx(theirs.weight))
        torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mine.covariance, theirs.covariance, rtol=1e-9, atol=1e-12)
