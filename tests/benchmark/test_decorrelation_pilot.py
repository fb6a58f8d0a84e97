"""The pilot with a penalty on overlap, on generated images: what it writes, and that it goes on."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from bench_cases import write_folders

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def pilot():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("decorrelation_pilot", BENCHMARKS / "decorrelation.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("provenance", None)


def test_the_pilot(pilot, tmp_path, capsys, monkeypatch):
    data, out = write_folders(tmp_path / "images"), tmp_path / "pilot.json"
    call = ["--data", str(data), "--model", "cases:conv_net", "--epochs", "4", "--batch-size", "20"]
    call += ["--out", str(out), "--device", "cpu"]
    monkeypatch.setattr(pilot, "OVERLAP_IMAGES", 40)
    pilot.main([*call, "--lambdas", "0"])
    first = json.loads(out.read_text())["trainings"]
    pilot.main([*call, "--lambdas", "0,1"])
    content = json.loads(out.read_text())
    assert content["trainings"][0] == first[0]  # not trained again
    assert [entry["lambda"] for entry in content["trainings"]] == [0, 1]
    before, after = content["trainings"]
    assert after["mean_overlap"] < before["mean_overlap"]
    assert list(before["overlap"]) == ["conv1", "conv2", "depthwise", "reduce"]
    assert (before["test_images"], before["overlap_images"]) == (40, 40)
    assert "lambda 1: accuracy" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "pilot.json"]
