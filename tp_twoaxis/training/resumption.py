"""The state of a training run on disk: one safetensors file with a JSON header, written atomically, no pickle.

Tensors: ``weights/NAME`` (parameters and buffers), ``momentum/NAME``, and for every rank r ``random/r/...`` (now)
and ``start/r/...`` (at the start of the pass, for a checkpoint inside an epoch), each with ``cpu``, ``cuda`` and
``loader`` (the state of the loader's generator). The header holds the settings, the counts and the losses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tp_twoaxis.errors import FileFormatError, TwoAxisError, reason
from tp_twoaxis.runtime.distributed import gather_over_ranks, rank
from tp_twoaxis.runtime.serialization import read_tensors, write_tensors

FORMAT = "tp-twoaxis/training"
VERSION = 1

RandomState = dict[str, Tensor]


@dataclass
class Progress:
    """How far a run has come; counts are over all ranks, images and losses up to the last time they were read."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # inside the epoch
    images: int = 0
    seen: int = 0  # images inside the epoch
    right: int = 0  # of them classified right
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    epochs: list[tuple[int, int]] = field(default_factory=list)  # right, images

    def count(self, right: int, images: int) -> None:
        """Add images that were read, and how many of them were classified right."""
        self.images += images
        self.seen += images
        self.right += right

    def end_epoch(self) -> None:
        """Record the epoch's counts and begin the next.

        Example:
            >>> progress = Progress(step=3, batch=3, seen=24, right=6)
            >>> progress.end_epoch()
            >>> progress.epoch, progress.batch, progress.epochs
            (1, 0, [(6, 24)])
        """
        self.epochs.append((self.right, self.seen))
        self.epoch += 1
        self.batch = self.seen = self.right = 0


class RunState(NamedTuple):
    """The objects whose state is saved and restored."""

    network: nn.Module
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.SGD
    scaler: Any
    loader: Iterable[Any]
    device: torch.device


def random_state(loader: Iterable[Any], device: torch.device) -> RandomState:
    """Torch's random state on the CPU and on the run's GPU, and that of the loader's own generator.

    Example:
        >>> sorted(random_state([], torch.device("cpu")))
        ['cpu']
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    generator = getattr(loader, "generator", None)
    if isinstance(generator, torch.Generator):
        states["loader"] = generator.get_state()
    return states


def set_random_state(states: RandomState, loader: Iterable[Any], device: torch.device) -> None:
    """Restore what :func:`random_state` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    generator = getattr(loader, "generator", None)
    if isinstance(generator, torch.Generator) and "loader" in states:
        generator.set_state(states["loader"])


def save(
    path: Path, state: RunState, config: dict[str, Any], progress: Progress, start: RandomState | None = None
) -> None:
    """Write the state; every rank calls this, rank 0 writes.

    Args:
        path: of the file, which is replaced as a whole.
        state: network, optimizer and what belongs to them.
        config: JSON-able settings that a resumption must share.
        progress: counts and losses.
        start: this rank's random state when the epoch in progress began; None between epochs.

    Raises:
        TwoAxisError: the file cannot be written.
    """
    by_rank = gather_over_ranks({"random": random_state(state.loader, state.device), "start": start or {}})
    if rank() != 0:
        return
    tensors = {
        f"{kind}/{number}/{name}": value.cpu().clone()
        for number, states in enumerate(by_rank)
        for kind, values in states.items()
        for name, value in values.items()
    }
    for name, tensor in _tensors(state.network).items():
        tensors[f"weights/{name}"] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    for name, parameter in state.trained.items():
        buffer = state.optimizer.state[parameter].get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum/{name}"] = buffer.to("cpu", copy=True, memory_format=torch.contiguous_format)
    header = {
        "config": config,
        "progress": asdict(progress),
        "scaler": state.scaler.state_dict(),
        "torch": torch.__version__,
    }
    write_tensors(path, tensors, header, kind=FORMAT, version=VERSION)


def load(path: Path, state: RunState, config: dict[str, Any]) -> tuple[Progress, RandomState | None]:
    """Restore a run in place; every rank calls this.

    Args:
        path: what :func:`save` wrote.
        state: of the run that goes on; network, optimizer, scaler and the random states are set.
        config: of the run that goes on.

    Returns:
        How far the run has come, and the random state at the start of the epoch in progress (None between
        epochs): set it, drop ``progress.batch`` batches, and set the present state again.

    Raises:
        FileFormatError: the file is missing, corrupted, a pickle, foreign or of a newer version.
        TwoAxisError: it belongs to another network or to other settings.
    """
    tensors, header = read_tensors(path, kind=FORMAT, version=VERSION)
    try:
        saved, counts = dict(header["config"]), dict(header["progress"])
        progress = Progress(**{f.name: counts[f.name] for f in fields(Progress)})
        progress.epochs = [(int(right), int(images)) for right, images in progress.epochs]
        scaler = header["scaler"]
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path}: the header is incomplete or damaged ({reason(error)}); start again without it"
        ) from error
    expected = json.loads(json.dumps(config))
    other = [name for name in expected if saved.get(name) != expected[name]]
    if other:
        changes = ", ".join(f"{name} {saved.get(name)!r} instead of {expected[name]!r}" for name in other)
        raise TwoAxisError(
            f"{path}: expected the checkpoint of this run, got one with {changes}; "
            "take the settings it was begun with, or another file"
        )
    own, weights = _tensors(state.network), _under(tensors, "weights/")
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    if shapes != {name: tensor.shape for name, tensor in own.items()}:
        raise TwoAxisError(f"{path}: expected the tensors of this network, got those of another; build the same one")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    for name, buffer in _under(tensors, "momentum/").items():
        if name in state.trained:
            parameter = state.trained[name]
            state.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
    if scaler:
        state.scaler.load_state_dict(scaler)
    set_random_state(_under(tensors, f"random/{rank()}/"), state.loader, state.device)
    return progress, _under(tensors, f"start/{rank()}/") or None


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}
