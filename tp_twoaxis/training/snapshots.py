"""Weights of a training by epoch: one safetensors file each, written while it runs and read for what is asked of it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tp_twoaxis.errors import FileFormatError, TwoAxisError, listing
from tp_twoaxis.runtime.distributed import rank
from tp_twoaxis.runtime.serialization import refuse_pickle, write_bytes

NAME = re.compile(r"epoch_(\d+)\.safetensors")


@dataclass(frozen=True)
class SnapshotWriter:
    """Write a network's weights after some epochs, as ``on_epoch`` of :func:`~tp_twoaxis.training.finetune`.

    A file is there whole or not at all, and an epoch that an interrupted run repeats is written again with the same
    weights. Rank 0 writes. Each file is one of weights, which :func:`~tp_twoaxis.models.load_weights` takes too.

    Attributes:
        folder: made when the first file is written; its files are ``epoch_N.safetensors``.
        epochs: after which to write; 0 is before the first step.
        run: JSON-able, what tells this training from others; files of several are not read together.

    Example:
        >>> import tempfile, torch
        >>> from tp_twoaxis.training import finetune
        >>> net, folder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), Path(tempfile.mkdtemp(), "run")
        >>> batch = torch.randn(8, 3, 2, 2), torch.randint(4, (8,))
        >>> _ = finetune(net, [batch], epochs=2, on_epoch=SnapshotWriter(folder, (0, 2)), progress=False)
        >>> snapshots = read_snapshots(folder)
        >>> list(snapshots), torch.equal(snapshots[2]["1.weight"], net[1].weight)
        ([0, 2], True)
    """

    folder: Path
    epochs: Collection[int]
    run: dict[str, Any] = field(default_factory=dict)

    def __call__(self, epoch: int, network: nn.Module) -> None:
        """Write the weights, if it is an epoch for it."""
        if epoch not in self.epochs or rank() != 0:
            return
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise TwoAxisError(f"{self.folder}: the folder could not be made ({error}); choose another") from error
        described = {"epoch": str(epoch), "run": json.dumps(self.run, sort_keys=True)}
        write_weights(network, self.folder / f"epoch_{epoch}.safetensors", described)


def write_weights(network: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write a network's parameters and buffers as one safetensors file, whole or not at all.

    Raises:
        TwoAxisError: it cannot be written.
    """
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in network.state_dict().items()}
    write_bytes(path, save(tensors, metadata={"format": "pt", **metadata}))


def snapshot_files(folder: Path) -> dict[int, Path]:
    """List the snapshots in a folder, epoch -> file, ascending; none where there is no folder."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def read_snapshots(folder: str | Path) -> dict[int, dict[str, Tensor]]:
    """Read what a :class:`SnapshotWriter` wrote.

    Args:
        folder: of one training.

    Returns:
        Epoch -> state dict on the CPU, ascending.

    Raises:
        TwoAxisError: there are no snapshots, or they are of several trainings or networks.
        FileFormatError: a file is damaged or no safetensors file.
    """
    files = snapshot_files(Path(folder))
    if not files:
        raise TwoAxisError(f"{folder}: expected files epoch_N.safetensors, got none; write some with train --snapshots")
    snapshots: dict[int, dict[str, Tensor]] = {}
    identity: tuple[str | None, dict[str, Any]] | None = None
    for epoch, path in files.items():
        run, snapshots[epoch] = _read(path)
        shapes = {name: tensor.shape for name, tensor in snapshots[epoch].items()}
        if identity is not None and identity != (run, shapes):
            what = "training" if identity[1] == shapes else "network"
            raise TwoAxisError(
                f"{folder}: expected snapshots of one training, got {listing(p.name for p in files.values())}, of "
                f"which {path.name} is of another {what}; keep each training in a folder of its own"
            )
        identity = (run, shapes)
    return snapshots


def _read(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("run"), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        refuse_pickle(path)
        raise FileFormatError(f"{path}: not readable as safetensors ({error}); remove it or train again") from error
