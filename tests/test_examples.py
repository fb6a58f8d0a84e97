"""Every example runs as it is copied: on bundled images, and on a folder of images."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
BACKBONES = ("convnext", "efficientnet", "resnet", "vgg", "vit")
# with packages that only `make examples` installs, and their smallest arguments
ELSEWHERE = {
    "huggingface_vit": ("datasets", []),
    "with_accelerate": ("accelerate", []),
    "with_lightning": ("lightning", []),
    "yolo": ("ultralytics", ["--images", "16"]),
}
OTHERS = ("drop_in", "segmentation", "vit_axes", *ELSEWHERE)
TINY = ["--size", "32", "--images", "32", "--batches", "1"]


def run(script, *arguments):
    torch.manual_seed(0)
    before = sys.argv
    sys.argv = [script, *arguments]
    try:
        return runpy.run_path(str(EXAMPLES / f"{script}.py"))
    finally:
        sys.argv = before


def test_all_examples_are_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*BACKBONES, *OTHERS}
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"{name}.py" in listed for name in (*BACKBONES, *OTHERS))


@pytest.mark.parametrize("script", BACKBONES)
def test_backbones(script, tmp_path, capsys):
    small = ["--model", f"test_{script}"] if script in ("convnext", "efficientnet", "vit") else []  # timm's own, tiny
    state = run(script, *TINY, *small, "--out", str(tmp_path / "net.safetensors"))
    assert abs(state["report"].achieved - 0.5) <= (0.01 if script == "efficientnet" else 0.005)
    assert state["report"].importance.startswith("HullImportance(" if script == "vgg" else "anticipating")
    assert state["report"].repair == (["ridge", "bn"] if script == "vgg" else ["joint"])
    assert "loaded again" in capsys.readouterr().out
    if script == "efficientnet":
        assert all(len(g.kept) % 8 == 0 for g in state["report"].groups if g.removed)


def test_a_folder_of_images(tmp_path):
    for split in ("train", "val"):
        for label, shade in (("dark", 40), ("light", 200)):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 36), (shade, shade + 5 * i, shade)).save(folder / f"{i}.png")
    state = run("resnet", *TINY, "--data", str(tmp_path), "--out", str(tmp_path / "net.safetensors"))
    assert state["model"].fc.out_features == 2
    assert state["total"] == 8


def test_both_axes_of_a_transformer(capsys):
    state = run("vit_axes", "--images", "48", "--width", "48")
    assert len(state["table"]) == 12
    assert all(-1 <= rho <= 1 and -0.5 <= ari <= 1 for rho, ari in state["table"])
    assert all(len(torch.cat(kept)) == 48 for kept in state["tokens"])
    assert "ARI of 3 groups" in capsys.readouterr().out


def test_segmentation(tmp_path):
    options = ["--model", "lraspp_mobilenet_v3_large", "--images", "10"]
    state = run("segmentation", *options, "--size", "32", "--out", str(tmp_path / "net.safetensors"))
    assert (state["report"].importance, state["report"].repair) == ("hull", ["joint"])
    assert state["after"] == state["before"] == {"out": (1, 21, 32, 32)}


@pytest.mark.filterwarnings("ignore")  # of other people's packages
@pytest.mark.parametrize("script", ELSEWHERE)
def test_networks_and_trainers_of_other_packages(script, tmp_path, monkeypatch, capsys):
    package, options = ELSEWHERE[script]
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    state = run(script, *options)
    assert state["report"].after.macs < 0.62 * state["report"].before.macs
    assert "MACs" in capsys.readouterr().out


def test_drop_in(capsys):
    state = run("drop_in", "--images", "32")
    assert state["model"].conv1.out_channels < 64
    assert state["after"] < state["before"]
    assert "MACs" in capsys.readouterr().out
