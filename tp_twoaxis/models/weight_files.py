"""Weights from files: safetensors, or what ``torch.save`` wrote of tensors. No file's code is ever run.

A training script rarely saves the bare state dict. Known wrappings are taken off: a dict that holds it beside an epoch
and an optimizer, and names that a data-parallel or compiled model puts before those of the network.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tp_twoaxis.errors import FileFormatError, TwoAxisError, listing, reason
from tp_twoaxis.runtime.serialization import is_pickle

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts save a state dict, in the order in which they are looked for."""
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel, DistributedDataParallel and ``torch.compile`` put before every name."""


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file of weights into a model, all names and shapes equal; the model is unchanged on an error.

    Files saved before batch norm counted its batches may lack ``num_batches_tracked``, as PyTorch allows.

    Args:
        model: receives the weights in place, on its own device and in its own dtype.
        path: a safetensors file, or one of ``torch.save`` (``.pth``, ``.pt``), which is read by
            ``torch.load(weights_only=True)``: it holds a state dict, by itself or under ``state_dict``,
            ``model_state_dict`` or ``model``. ``module.`` and ``_orig_mod.`` before all names are taken off.

    Raises:
        FileFormatError: the file is neither, or holds other objects than tensors, numbers and texts.
        TwoAxisError: it does not exist or its names, shapes or kinds of number are not the model's.

    Example:
        >>> import tempfile
        >>> source, copy = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 3, "state_dict": source.state_dict()}, f"{folder}/linear.pth")
        ...     load_weights(copy, f"{folder}/linear.pth")
        >>> torch.equal(source.weight, copy.weight)
        True
    """
    own = model.state_dict()
    weights = _without_prefixes(read_weights(path), own)
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in own]
    unequal = [
        f"{name} {_describe(weights[name])} for {_describe(own[name])}"
        for name in own
        if name in weights
        and (
            own[name].shape != weights[name].shape or own[name].is_floating_point() != weights[name].is_floating_point()
        )
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("mismatched", unequal))
    problems = [f"{len(names)} {kind} ({listing(names, 4)})" for kind, names in kinds if names]
    if problems:
        raise TwoAxisError(
            f"{path}: expected the {len(own)} tensors of {type(model).__name__}, got {'; '.join(problems)}; "
            "build the model that the file was saved from"
        )
    before = {name: tensor.clone() for name, tensor in own.items()}
    try:
        model.load_state_dict(weights, strict=True)
    except Exception as error:  # a module's own loading hook may refuse half-way
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(before[name])
        raise TwoAxisError(
            f"{path}: names and shapes fit, but {type(model).__name__} refuses to load them ({reason(error)}); "
            "look at its load_state_dict hooks"
        ) from error


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a state dict by name; see :func:`load_weights` for the files that are read.

    Raises:
        FileFormatError: the file is none of these.
        TwoAxisError: there is no such file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(nn.Linear(2, 3).state_dict(), f"{folder}/linear.pt")
        ...     sorted(read_weights(f"{folder}/linear.pt"))
        ['bias', 'weight']
    """
    path = Path(path)
    if not path.is_file():
        raise TwoAxisError(f"{path}: expected a file of weights, there is none; check the path")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        # only now: the length that a sound safetensors file starts with can look like a pickle's first byte
        if not is_pickle(path):
            raise FileFormatError(
                f"{path}: expected a safetensors file or one of torch.save, reading it says: {error}; "
                "save it again or copy it anew"
            ) from error
    return _state_dict_of(path, _load_tensors(path))


def _load_tensors(path: Path) -> Any:
    """Read a file of ``torch.save`` that holds nothing but tensors, containers, numbers and texts."""
    try:
        # a file object: of a path, newer versions of torch look at the ending
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual protocol, before it is read or refused
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch raise whatever they meet
        raise FileFormatError(
            f"{path}: expected tensors alone, as torch.load(weights_only=True) reads them; {_reason(error)}; other "
            "objects may run code when they are read, so nothing was: where you trust the file, save "
            "model.state_dict() of it anew"
        ) from error


def _reason(error: Exception) -> str:
    """Say what torch met, without its advice to run the file's code."""
    if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it holds {foreign[1]}"
    refused = re.search(r"WeightsUnpickler error: (.*)", str(error))
    says = refused[1] if refused else re.split(r"\n|\. ", str(error))[0]
    return f"reading says: {says[:200]}"


def _state_dict_of(path: Path, content: Any) -> dict[str, Tensor]:
    """Find the state dict in what a training script saved."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise FileFormatError(f"{path}: expected a state dict, got {type(content).__name__}; save model.state_dict()")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        raise FileFormatError(
            f"{path}: expected a state dict, by itself or under {', '.join(WRAPPERS)}, got a dict with "
            f"{listing(others) or 'nothing in it'}; save model.state_dict()"
        )
    return {str(name): value for name, value in content.items()}


def _without_prefixes(weights: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Take off what wrappers put before all names, unless the model's own names start so."""
    names = set(own)
    while weights and names.isdisjoint(weights):
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in weights)), None)
        if prefix is None:
            break
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
