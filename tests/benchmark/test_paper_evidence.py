"""The paper's evidence by one command: what is trained, judged and combined, and what is not done twice."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("paper_evidence", BENCHMARKS / "paper_evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_suite"]  # other tests load it as they want it


def write_shard(path, count):
    rng = np.random.default_rng(count)
    rows = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "fine_label": i % 4})
    pd.DataFrame(rows).to_parquet(path)


def test_one_network_from_its_training_to_its_page(script, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    write_shard(data / "train-00000-of-00001.parquet", 40)
    write_shard(data / "test-00000-of-00001.parquet", 20)
    small = ["--networks", "resnet20", "--seeds", "3", "--classes", "4", "--epochs", "1", "--images", "24"]
    call = [f"--data={data}", f"--out={tmp_path / 'out'}", "--device=cpu", *small]
    script.main(call)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {
        "resnet20-3.safetensors", "resnet20-3.snapshots", "resnet20-3.html", "resnet20-3_tables"
    }  # fmt: skip
    monkeypatch.setattr(script, "call", None)
    script.main(call)  # nothing is left to do


def test_every_seed_of_all_networks_before_the_next(script, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(script, "call", lambda *arguments: calls.append(list(map(str, arguments))))
    script.main(["--data=d", f"--out={tmp_path}", "--seeds", "1", "2", "--networks", "resnet18", "vgg16"])
    trained = [Path(own[own.index("--out") + 1]).stem for own in calls if own[0] == "train"]
    assert trained == ["resnet18-1", "vgg16-1", "resnet18-2", "vgg16-2"]
    assert calls[0][calls[0].index("--snapshots") + 1] == "0,5,10,25,50,100"
    combined = [own[own.index("--combine") + 1].count(",") + 1 for own in calls if "--combine" in own]
    assert combined == [2, 3, 4]


def test_a_command_that_fails_ends_it(script, tmp_path):
    with pytest.raises(SystemExit):
        script.main([f"--data={tmp_path / 'none'}", f"--out={tmp_path / 'out'}", "--networks=resnet20", "--seeds=1"])
