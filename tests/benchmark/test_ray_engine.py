"""The same trials on a Ray cluster of this machine, and with a worker killed midway."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path

import pytest
import torch
from bench_cases import numbers, tiny_config, write_folders

from tp_twoaxis import TwoAxisError
from tp_twoaxis.benchmark import RayEngine, cross, run_benchmark
from tp_twoaxis.benchmark.methods import Method
from tp_twoaxis.benchmark.report import make_report

ray = pytest.importorskip("ray", reason="pip install tp-twoaxis[ray]")
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def marker(tmp_path_factory):
    """A file that exists once a worker was killed."""
    return tmp_path_factory.mktemp("ray") / "killed"


@pytest.fixture(scope="module")
def cluster(marker):
    environment = {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "KILLED_ONCE": str(marker),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error",
            runtime_env={"env_vars": environment},
        )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(write_folders(tmp_path_factory.mktemp("bench") / "images"))


def comparable(folder):
    """Records without the name of the criterion that kills."""
    return [(r["network"]["name"], r["seed"], r["keep"], *rest) for r, (_, *rest) in folder]


@pytest.mark.usefixtures("cluster")
def test_the_numbers_are_those_of_a_sequential_run_though_a_worker_was_killed(config, marker, tmp_path):
    by_seed = [Method(f"bench_cases:{name}") for name in ("by_seed", "kills_its_worker_once")]
    plain, deadly = (dataclasses.replace(config, methods=(*cross(["local", "l2"]), m)) for m in by_seed)
    sequential = run_benchmark(plain, tmp_path / "sequential", progress=False).folder
    summary = run_benchmark(deadly, tmp_path / "ray", engine=RayEngine(workers=2), progress=False)
    assert marker.is_file()
    assert (summary.total, summary.ran, summary.failed) == (12, 12, [])
    files = list((tmp_path / "ray" / "cells").iterdir())
    assert len(files) == 12  # nothing lost, nothing doubled

    def compared(folder):
        return [(r["seed"], r["keep"], *n[1:]) for r, n in zip(folder.read_all(), numbers(folder), strict=True)]

    assert compared(summary.folder) == compared(sequential)
    tables = [make_report(folder.path).summary.drop(columns=["method", "criterion"]) for folder in
              (summary.folder, sequential)]  # fmt: skip
    assert tables[0].equals(tables[1])
    # what is there stays: Ray has nothing to do
    assert run_benchmark(deadly, tmp_path / "ray", engine=RayEngine(workers=2), progress=False).ran == 0


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_always_dies_ends_the_run_and_loses_nothing(config, tmp_path):
    methods = (Method("l2"), Method("bench_cases:kills_its_worker"))
    sweep = dataclasses.replace(config, methods=methods, seeds=(42,), keep=(0.5,))
    with pytest.raises(TwoAxisError, match="died more than 1 times"):
        run_benchmark(sweep, tmp_path / "out", engine=RayEngine(workers=1, retries=1), progress=False)
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1


@pytest.mark.usefixtures("cluster")
def test_more_than_the_cluster_has_is_refused_before_any_work(config, tmp_path):
    with pytest.raises(TwoAxisError, match=r"1 GPU for a trial, it has 0 in all"):
        run_benchmark(config, tmp_path / "out", engine=RayEngine(gpus=1), progress=False)
    assert list((tmp_path / "out" / "cells").iterdir()) == []


@pytest.mark.parametrize("options", [{"workers": 0}, {"cpus": 0}, {"gpus": -1}, {"retries": -1}])
def test_numbers_out_of_range(options):
    with pytest.raises(TwoAxisError, match="workers >= 1"):
        RayEngine(**options)


def test_without_ray_the_extra_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(TwoAxisError, match=r"tp-twoaxis\[ray\]"):
        run_benchmark(config, tmp_path / "out", engine=RayEngine(), progress=False)
