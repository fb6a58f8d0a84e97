"""Snapshots of a training: the weights of uninterrupted epochs, whole files, and folders that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from cases import batches, conv_net
from safetensors import safe_open
from torch import nn

from tp_twoaxis.errors import FileFormatError, TwoAxisError
from tp_twoaxis.models import load_weights
from tp_twoaxis.training import finetune
from tp_twoaxis.training.snapshots import SnapshotWriter, read_snapshots, snapshot_files

SETTINGS = {"max_batches": None, "lr": 0.05, "schedule": "constant", "progress": False}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_snapshots_are_the_weights_after_their_epochs(tmp_path):
    net, folder = conv_net(), tmp_path / "kept"
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    finetune(net, batches(), epochs=3, on_epoch=SnapshotWriter(folder, (0, 2, 3), {"seed": 1}), **SETTINGS)
    snapshots = read_snapshots(folder)
    assert list(snapshots) == [0, 2, 3]
    assert_same(snapshots[0], before)
    assert_same(snapshots[3], net.state_dict())
    shorter = conv_net()
    finetune(shorter, batches(), epochs=2, **SETTINGS)
    assert_same(snapshots[2], shorter.state_dict())
    load_weights(shorter, folder / "epoch_3.safetensors")
    assert_same(shorter.state_dict(), net.state_dict())
    with safe_open(folder / "epoch_2.safetensors", "pt") as file:
        assert (file.metadata()["epoch"], json.loads(file.metadata()["run"])) == ("2", {"seed": 1})


def test_channels_last_and_callbacks_leave_no_trace(tmp_path):
    def meddle(epoch, network):
        torch.rand(epoch + 1)
        network.eval()
        assert not torch.is_grad_enabled()
        seen.append(epoch)

    seen = []
    plain, watched, last = conv_net(), conv_net(), conv_net()
    finetune(plain, batches(), epochs=2, **SETTINGS)
    finetune(watched, batches(), epochs=2, on_epoch=meddle, **SETTINGS)
    assert_same(plain.state_dict(), watched.state_dict())
    assert seen == [0, 1, 2]
    finetune(last, batches(), epochs=1, channels_last=True, on_epoch=SnapshotWriter(tmp_path / "k", [1]), **SETTINGS)
    assert_same(read_snapshots(tmp_path / "k")[1], last.state_dict())


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_training_leaves_no_epoch_out(tmp_path, at):
    whole, again, data = conv_net(), conv_net(), batches()
    finetune(whole, data, epochs=3, on_epoch=SnapshotWriter(tmp_path / "whole", range(4)), **SETTINGS)
    writer = SnapshotWriter(tmp_path / "again", range(4))

    def interrupted(epoch, network):
        writer(epoch, network)
        if epoch == at:
            raise KeyboardInterrupt

    options = {"epochs": 3, "checkpoint": tmp_path / "state.safetensors", **SETTINGS}
    with pytest.raises(KeyboardInterrupt):
        finetune(again, data, on_epoch=interrupted, **options)
    again = conv_net()
    report = finetune(again, data, on_epoch=writer, resume=True, **options)
    # the epoch that was written and not yet saved is trained and written again
    assert report.resumed_at == 3 * (at - 1)
    first, second = read_snapshots(tmp_path / "whole"), read_snapshots(tmp_path / "again")
    assert list(first) == list(second) == [0, 1, 2, 3]
    for epoch, weights in first.items():
        assert_same(weights, second[epoch])
    assert {path.name for path in (tmp_path / "again").iterdir()} == {f"epoch_{n}.safetensors" for n in range(4)}


def test_a_callback_that_fails_leaves_the_weights_as_they_were():
    def fail(epoch, network):
        if epoch == 1:
            raise OSError("disk full")

    net = conv_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(OSError, match="disk full"):
        finetune(net, batches(), epochs=2, on_epoch=fail, **SETTINGS)
    assert_same(net.state_dict(), before)


def test_bad_folders(tmp_path):
    assert snapshot_files(tmp_path / "none") == {}
    with pytest.raises(TwoAxisError, match=r"expected files epoch_N.safetensors, got none; write some"):
        read_snapshots(tmp_path / "none")
    net = nn.Linear(3, 2)
    SnapshotWriter(tmp_path / "runs", [0], {"seed": 1})(0, net)
    SnapshotWriter(tmp_path / "runs", [1], {"seed": 2})(1, net)
    with pytest.raises(TwoAxisError, match=r"epoch_1.safetensors is of another training; keep each"):
        read_snapshots(tmp_path / "runs")
    SnapshotWriter(tmp_path / "nets", [0])(0, net)
    SnapshotWriter(tmp_path / "nets", [4])(4, nn.Linear(3, 3))
    with pytest.raises(TwoAxisError, match=r"epoch_4.safetensors is of another network"):
        read_snapshots(tmp_path / "nets")
    torch.save(net.state_dict(), tmp_path / "nets" / "epoch_4.safetensors")
    with pytest.raises(FileFormatError, match="got a pickle"):
        read_snapshots(tmp_path / "nets")
    (tmp_path / "nets" / "epoch_4.safetensors").write_bytes(b"cut")
    with pytest.raises(FileFormatError, match="not readable as safetensors"):
        read_snapshots(tmp_path / "nets")
    (tmp_path / "file").write_text("")
    with pytest.raises(TwoAxisError, match="could not be made"):
        SnapshotWriter(tmp_path / "file", [0])(0, net)
