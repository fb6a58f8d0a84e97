"""Weights from files: what is read, what is taken off, what is refused, and that no code is run."""

from __future__ import annotations

import copy
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tp_twoaxis.errors import FileFormatError, TwoAxisError
from tp_twoaxis.models import cifar_resnet20_conv_shortcut, cifar_resnet20_option_a, load_weights


def test_load_weights_round_trip(tmp_path):
    source, target = cifar_resnet20_conv_shortcut().eval(), cifar_resnet20_conv_shortcut().eval()
    weights = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(weights, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(source(x), target(x))


def test_load_weights_takes_any_header_length(tmp_path):
    """A header of 128 + 256 k bytes makes a sound file start with the byte that starts a pickle."""
    model, path = nn.Linear(1, 1), tmp_path / "w.safetensors"
    first = set()
    for extra in range(0, 256, 8):
        save_file(model.state_dict(), path, metadata={"note": "x" * extra})
        first.add(path.read_bytes()[0])
        load_weights(model, path)
    assert 0x80 in first


def test_load_weights_leaves_the_model_alone_on_errors(tmp_path):
    model = cifar_resnet20_option_a()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "w.safetensors"
    weights = cifar_resnet20_option_a().state_dict()
    del weights["conv1.weight"]
    weights |= {"fc.weight": torch.ones(1), "linear.weight": torch.ones(7, 64)}
    weights["bn1.bias"] = torch.ones(16, dtype=torch.int64)
    save_file(weights, path)
    with pytest.raises(TwoAxisError) as error:
        load_weights(model, path)
    for part in (
        "1 missing (conv1.weight)",
        "1 unexpected (fc.weight)",
        "2 mismatched",
        "linear.weight float32[7, 64] for float32[10, 64]",
    ):
        assert part in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_load_weights_is_undone_when_a_module_refuses(tmp_path):
    class Refusing(nn.Linear):
        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)
            raise RuntimeError("not me")

    model = nn.Sequential(nn.Linear(2, 2), Refusing(2, 2))
    before = copy.deepcopy(model.state_dict())
    save_file(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(TwoAxisError, match="not me"):
        load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_code_in_a_file_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Bomb()}, "zip.pt")
    torch.save({"w": Bomb()}, "old.pt", _use_new_zipfile_serialization=False)
    Path("plain.safetensors").write_bytes(pickle.dumps(Bomb()))
    for name in ("zip.pt", "old.pt", "plain.safetensors"):
        with pytest.raises(FileFormatError, match=r"weights_only=True.*(it holds|reading says)") as error:
            load_weights(nn.Linear(1, 1), name)
        assert "weights_only=False" not in str(error.value)
        assert len(str(error.value)) < 400
    assert not Path("exploded").exists()


STATE = nn.Linear(2, 3).state_dict()
PARALLEL = {f"module.{name}": tensor for name, tensor in STATE.items()}
COMPILED = {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"epoch": 3, "state_dict": STATE, "optimizer": {"lr": 0.1}},
        {"model": {"state_dict": PARALLEL}},
        {"model_state_dict": COMPILED, "model": "resnet"},
        PARALLEL,
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_wrappings_of_training_scripts_are_taken_off(tmp_path, content, zipped):
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    model = nn.Linear(2, 3)
    load_weights(model, tmp_path / "w.pth")
    assert torch.equal(model.weight, STATE["weight"])


def test_prefixes_are_taken_off_in_safetensors_too_and_kept_where_they_are_the_models_own(tmp_path):
    save_file(PARALLEL, tmp_path / "w.safetensors")
    plain, own = nn.Linear(2, 3), nn.ModuleDict({"module": nn.Linear(2, 3)})
    load_weights(plain, tmp_path / "w.safetensors")
    load_weights(own, tmp_path / "w.safetensors")
    assert torch.equal(plain.weight, STATE["weight"])
    assert torch.equal(own["module"].weight, STATE["weight"])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([torch.ones(1)], "expected a state dict, got list"),
        ({"epoch": 3}, "got a dict with epoch"),
        ({"state_dict": {}}, "got a dict with nothing in it"),
        ({"args": Namespace(lr=0.1), "state_dict": STATE}, "it holds argparse.Namespace"),
        ({"head.weight": torch.ones(1)}, "2 missing \\(weight, bias\\); 1 unexpected \\(head.weight\\)"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, part):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(TwoAxisError, match=part):
        load_weights(nn.Linear(2, 3), tmp_path / "w.pth")


def test_a_torchscript_archive_is_refused(tmp_path):
    scripted = torch.jit.trace(nn.Linear(2, 3), torch.ones(1, 2))
    torch.jit.save(scripted, tmp_path / "w.pt")
    with pytest.raises(FileFormatError, match=r"with TorchScript archives passed to ``torch\.load``; other"):
        load_weights(nn.Linear(2, 3), tmp_path / "w.pt")


def test_other_files_are_refused(tmp_path):
    for content in (b"", b"hello world, not tensors"):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(FileFormatError, match="safetensors"):
            load_weights(nn.Linear(1, 1), tmp_path / "x")
    (tmp_path / "x").write_bytes(b"PK and no zip")
    with pytest.raises(FileFormatError, match="expected tensors alone"):
        load_weights(nn.Linear(1, 1), tmp_path / "x")
    with pytest.raises(TwoAxisError, match="check the path"):
        load_weights(nn.Linear(1, 1), tmp_path)
