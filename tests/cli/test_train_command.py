"""``tp-twoaxis train``: what it writes, how it goes on, and how it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from cli_cases import MODEL, refused, run, succeed, two_ranks
from safetensors import safe_open
from safetensors.torch import load_file

from tp_twoaxis.cli import train_command as command
from tp_twoaxis.data import open_dataset
from tp_twoaxis.training import finetune, training_batches
from tp_twoaxis.training.snapshots import read_snapshots

SMALL = ("--epochs", 3, "--batch-size", 8, "--lr", 0.05)


@pytest.fixture
def arguments(folder, tmp_path):
    return ("train", MODEL, "--data", folder / "images", "--out", tmp_path / "w.safetensors")


def test_train_writes_weights_that_other_commands_take(folder, tmp_path, arguments):
    result = succeed(*arguments, *SMALL, "--eval-split", "test")
    assert "for 15 batches (120 images)" in result.stdout
    assert "top-1 accuracy on 20 images (test)" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        origin = json.loads(file.metadata()["training"])
    assert (origin["recipe"]["name"], origin["recipe"]["epochs"], origin["seed"]) == ("paper", 3, 0)
    assert origin["evaluation"]["images"] == 20
    checkpoint = ("--checkpoint", tmp_path / "w.safetensors")
    payload = json.loads(succeed("score", MODEL, "--data", folder / "images", *checkpoint, "--json").stdout)
    assert payload["notes"] == []
    # a pruned network is trained on as it is
    pruned = tmp_path / "p.safetensors"
    succeed("prune", MODEL, "--data", folder / "images", *checkpoint, "--out", pruned, "--flops", 0.6)
    further = tmp_path / "f.safetensors"
    options = ("--checkpoint", pruned, "--max-batches", 4, "--out", further, "--epochs", 1, "--teacher", checkpoint[1])
    payload = json.loads(succeed(*arguments[:4], *options, "--json", "--batch-size", 8).stdout)
    assert (payload["batches"], payload["recipe"]["distillation"]) == (4, [4.0, 0.5])
    assert payload["losses"][-1] == payload["final_loss"]
    sizes = {name: t.shape for name, t in load_file(pruned).items()}
    assert {name: t.shape for name, t in load_file(further).items()} == sizes
    succeed("score", MODEL, "--data", folder / "images", "--checkpoint", further)


def test_train_is_the_library_and_the_recipe(folder, tmp_path, arguments):
    succeed(*arguments, "--recipe", "fast", "--epochs", 2, "--batch-size", 8, "--seed", 3)
    recipe = command.RecipeOptions(recipe="fast", epochs=2, batch_size=8).settings(MODEL, "cpu")
    assert (recipe.lr, recipe.nesterov, recipe.schedule, recipe.amp) == (0.4, True, "linear", None)
    network = command.ModelOptions(model=MODEL).build()
    loader = training_batches(open_dataset(str(folder / "images")), 8, seed=3)
    finetune(network, loader, max_batches=None, seed=3, progress=False, **recipe.settings())
    written = load_file(tmp_path / "w.safetensors")
    for name, tensor in network.state_dict().items():
        assert torch.equal(written[name], tensor), name


def test_an_interrupted_command_goes_on(tmp_path, arguments, monkeypatch):
    succeed(*arguments, *SMALL)
    expected = load_file(tmp_path / "w.safetensors")
    steps = []

    def interrupted(*positional, **options):
        loader = training_batches(*positional, **options)
        normalise = loader.dataset.normalise

        def counted(images):
            steps.append(1)
            if len(steps) == 8:
                raise KeyboardInterrupt
            return normalise(images)

        loader.dataset.normalise = counted
        return loader

    monkeypatch.setattr("tp_twoaxis.training.training_batches", interrupted)
    assert run(*arguments, *SMALL, "--force").exit_code == 130
    state = tmp_path / "w.state.safetensors"
    assert state.exists()
    monkeypatch.setattr("tp_twoaxis.training.training_batches", training_batches)
    assert "the file exists" in refused(*arguments[:-1], tmp_path / "other.safetensors", *SMALL, "--state", state)
    assert "lr 0.05 instead of 0.1" in refused(*arguments, "--epochs", 3, "--batch-size", 8, "--resume", "--force")
    result = succeed(*arguments, *SMALL, "--resume", "--force")
    assert "resumed at batch 5" in result.stdout
    assert not state.exists()
    for name, tensor in load_file(tmp_path / "w.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_snapshots_stand_beside_the_weights(tmp_path, arguments):
    result = succeed(*arguments, *SMALL, "--snapshots", "3,0,1")
    folder = tmp_path / "w.snapshots"
    assert f"wrote 3 snapshots to {folder}" in result.stdout
    snapshots = read_snapshots(folder)
    assert list(snapshots) == [0, 1, 3]
    trained = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(trained[name], tensor) for name, tensor in snapshots[3].items())
    (tmp_path / "w.safetensors").unlink()
    assert "the folder is not empty" in refused(*arguments, *SMALL, "--snapshots", "1")
    # another training in their place leaves none of them
    payload = json.loads(succeed(*arguments, *SMALL, "--snapshots", "2", "--seed", 1, "--force", "--json").stdout)
    assert payload["snapshots"] == [str(folder / "epoch_2.safetensors")]
    assert list(read_snapshots(folder)) == [2]


def test_augmentation_is_for_training_alone(tmp_path, arguments, monkeypatch):
    seen = []

    def watched(*positional, **options):
        loader = training_batches(*positional, **options)
        seen.append(loader.augment)
        return loader

    measured = []
    monkeypatch.setattr("tp_twoaxis.training.training_batches", watched)
    accuracy = "tp_twoaxis.training.evaluation.accuracy"
    monkeypatch.setattr(accuracy, lambda _, loader, **__: measured.append(loader.augment) or (0.5, 20))
    succeed(*arguments, *SMALL, "--eval-split", "test")
    succeed(*arguments, *SMALL, "--no-augment", "--force")
    assert (seen, measured) == ([True, False], [False])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "slow"), "expected one of paper, fast, got 'slow'"),
        (("--amp", "fp16"), "fp16 needs a model on a CUDA GPU"),
        (("--amp", "fp8"), "--amp: expected one of bf16, fp16, none, got 'fp8'"),
        (("--lr", "-1"), "lr: expected a positive number"),
        (("--epochs", "0"), "--epochs"),
        (("--device", "nowhere", "--recipe", "fast"), "--device"),
        (("--distillation", "4"), "expected a temperature and a weight"),
        (("--teacher", "none.safetensors"), "there is none"),
        (("--split", "nope"), "split"),
        (("--eval-images", "3"), "--eval-split"),
        (("--checkpoint", "none.safetensors"), "there is none"),
        (("--snapshots", "0,last"), "--snapshots: expected whole numbers"),
        (("--snapshots", "-1,2"), "expected epochs of 0 or more, got -1"),
        (("--epochs", "3", "--snapshots", "0,4"), "expected epochs of 0 to 3, got 4"),
    ],
)
def test_refusals_leave_nothing(tmp_path, arguments, options, message):
    assert message in refused(*arguments, *options)
    assert list(tmp_path.iterdir()) == []


def test_data_that_does_not_fit(folder, tmp_path):
    out = ("--out", tmp_path / "w.safetensors", "--batch-size", 8)
    line = refused("train", "cifar_resnet20_option_a", "--num-classes", 3, "--data", folder / "images", *out)
    assert "build it with num_classes=" in line
    flat = folder / "images" / "test" / "class0"
    assert "has none" in refused("train", MODEL, "--data", flat, *out)
    assert list(tmp_path.iterdir()) == []


def test_help():
    text = succeed("train", "--help").stdout
    assert "Example: tp-twoaxis train" in text
    assert "--resume" in text


def test_two_processes_share_the_batches(folder, tmp_path):
    arguments = ["train", MODEL, "--json", "--data", folder / "images", "--out", tmp_path / "w.safetensors"]
    printed = two_ranks(*arguments, "--epochs", 1, "--batch-size", 10, "--eval-split", "test")
    payload = json.loads(printed[0])
    assert (payload["batches"], payload["images"], payload["evaluation"]["images"]) == (4, 40, 20)
    assert printed[1] == ""
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
