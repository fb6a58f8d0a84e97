"""Several ranks at one trial: calibration, fine-tuning and evaluation under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_cases import tiny_config, write_folders

from tp_twoaxis.benchmark import cross, run_benchmark
from tp_twoaxis.benchmark.results import open_folder

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    images = write_folders(tmp_path_factory.mktemp("bench") / "images")
    methods = (*cross(["local", "taylor", "random"]), *cross(["local"], budgets=[6]))
    return tiny_config(images, methods=methods, keep=(0.5,), seeds=(42,))


def torchrun(config_file, out, *options):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tp_twoaxis", "bench", "--config", str(config_file), "--out", str(out), "--json", *options,
    ]  # fmt: skip
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_two_ranks_measure_what_one_does(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    alone = run_benchmark(config, tmp_path / "alone", progress=False).folder.read_all()
    done = torchrun(tmp_path / "config.json", tmp_path / "together")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ran"] == 4  # rank 0 alone speaks
    together = open_folder(tmp_path / "together").read_all()
    for first, second in zip(alone, together, strict=True):
        assert second["status"] == "ok", second["error"]
        assert second["provenance"]["machine"]["ranks"] == 2
        assert first["kept_channels"] == second["kept_channels"]
        assert first["images"] == second["images"]
        assert second["accuracy"]["before_finetuning"] == pytest.approx(
            first["accuracy"]["before_finetuning"], abs=0.03
        )
    # ranks draw other images in another order: the same training, not the same numbers
    assert together[-1]["finetuning"]["batches"] == 6
    assert together[-1]["accuracy"]["pruned"] == pytest.approx(alone[-1]["accuracy"]["pruned"], abs=0.3)


def test_workers_and_ranks_exclude_each_other(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    done = torchrun(tmp_path / "config.json", tmp_path / "out", "--workers", "2")
    assert done.returncode != 0
    assert "leave workers and engine out" in done.stderr
    assert not (tmp_path / "out").exists()
