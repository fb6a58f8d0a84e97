"""The GPU suite on generated images: data in two calls, training, parts, deadlines, one folder."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tp_twoaxis.benchmark.results import open_folder

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"


@pytest.fixture(scope="module")
def suite():
    spec = importlib.util.spec_from_file_location("gpu_suite", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_suite"] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_suite"]


def write_shard(path, count, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "fine_label": i % 100})
    path.parent.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_parquet(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two folders that arrive one after the other, as cifar100 is too large for one call."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    write_shard(first / "train-00000-of-00002.parquet", 60, 0)
    write_shard(second / "train-00001-of-00002.parquet", 60, 1)
    write_shard(second / "test-00000-of-00001.parquet", 30, 2)
    return first, second


def printed(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_two_calls_bring_the_data_and_parts_make_one_folder(suite, shards, tmp_path, capsys):
    store, out = tmp_path / "store", tmp_path / "out"
    small = [
        "--network",
        "resnet20",
        "--device",
        "cpu",
        "--epochs",
        "1",
        "--methods",
        "l2,capture",
        "--keep",
        "0.6,0.4",
    ]
    small += ["--images", "24", "--selection-images", "10", "--finetune-batches", "1"]
    call = [f"--store={store}", f"--out={out}", *small]
    suite.main([*call, f"--data={shards[0]}"])
    waiting = printed(capsys)
    assert waiting["waiting_for"] == ["train-00001-of-00002.parquet", "test-*.parquet"]
    assert not out.exists()
    suite.main([*call, f"--data={shards[1]}", "--part=1/2"])
    first = printed(capsys)
    assert first["trained"]["recipe"]["epochs"] == 1
    assert (first["cells"], first["left"], first["failed"]) == (2, 0, [])
    suite.main([*call, "--part=2/2"])  # nothing more to bring, nothing to train
    second = printed(capsys)
    assert (second["trained"], second["cells"], second["left"]) == (None, 2, 0)
    records = open_folder(out).read_all()
    assert len(records) == 4
    assert {r["grid"] for r in records} == {"channels"}
    assert len({r["weights"] for r in records}) == 1
    # another seed is another network in the same folder; no time remains for its trials
    suite.main([*call, "--seed=123", "--seconds=0"])
    other = printed(capsys)
    assert other["trained"]["seed"] == 123
    assert (other["cells"], other["left"]) == (4, 4)
    suite.main([*call, "--seed=123", "--part=1/2"])
    assert printed(capsys)["left"] == 0
    assert len({r["weights"] for r in open_folder(out).read_all()}) == 2


def test_the_paper_s_suite(suite):
    config = suite.suite(suite.parse(["--store", "s", "--out", "o"]))
    assert [n.name for n in config.networks] == ["resnet18", "vgg16", "mobilenetv2"]
    assert config.seeds == (42, 123, 456, 789, 1011)
    assert len(config.keep) == 10
    assert config.data.evaluate_on == "test"
    other = suite.suite(suite.parse(["--store", "s", "--out", "o", "--network", "vgg16", "--seed", "789"]))
    assert other == config  # calls differ in what they measure, not in what it is


def test_bad_input(suite, shards, tmp_path):
    with pytest.raises(SystemExit):
        suite.main([f"--store={tmp_path}", f"--out={tmp_path / 'out'}", "--network", "alexnet"])
    with pytest.raises(SystemExit, match="k/n"):
        suite.main([f"--store={tmp_path}", f"--out={tmp_path / 'out'}", "--part", "two"])
