"""Is the model still in the state that statistics describe? Every module's own tensors, remembered by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from tp_twoaxis.errors import StaleStatisticsError

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class ModelState:
    """Shapes and hashes of a model's parameters and floating-point buffers, module by module.

    What reaches a layer depends on everything before it, running statistics of BatchNorm included, so
    statistics of activations or gradients hold for one state of the whole model.

    Args:
        model: the model as it is now, unwrapped.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> state = ModelState(net)
        >>> state.verify(net)
        >>> net[1].running_mean += 1.0
        >>> state.verify(net)
        Traceback (most recent call last):
        ...
        tp_twoaxis.errors.StaleStatisticsError: 1: ...
    """

    def __init__(self, model: nn.Module) -> None:
        self._shapes: dict[str, Shapes] = {}
        self._hashes: dict[str, str] = {}
        self._seen: dict[str, tuple[tuple[int, int], ...]] = {}
        for name, module in model.named_modules():
            if any(_tensors(module)):
                self._shapes[name], self._hashes[name] = _shapes(module), _hash(module)

    def verify(self, model: nn.Module, certainly: Iterable[nn.Module] = ()) -> None:
        """Check that a model is in the remembered state.

        Args:
            model: the model, unwrapped; a copy will do.
            certainly: modules to hash whatever their tensors' version says (assignments to ``.data`` leave
                no trace there); all others are hashed anew when a version moved.

        Raises:
            StaleStatisticsError: a module is missing, has other shapes, or other values.
        """
        present, surely = dict(model.named_modules()), set(certainly)
        for name, shapes in self._shapes.items():
            if name not in present:
                raise StaleStatisticsError(
                    f"{name}: statistics know this layer, {type(model).__name__} has no such layer - "
                    "they belong to another model; gather them on this one"
                )
            module = present[name]
            if _shapes(module) != shapes:
                raise StaleStatisticsError(
                    f"{name}: statistics are of a layer with {_listed(shapes)}, it has {_listed(_shapes(module))} - "
                    "it was pruned after they were gathered; gather them again"
                )
            seen = tuple((id(tensor), tensor._version) for _, tensor in _tensors(module))
            if module not in surely and self._seen.get(name) == seen:
                continue
            if _hash(module) != self._hashes[name]:
                raise StaleStatisticsError(
                    f"{name}: its parameters or running statistics are not those that statistics were gathered with "
                    "- it was trained, repaired or cast since; gather them again"
                )
            self._seen[name] = seen


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and tensor.is_floating_point():
            yield name, tensor


def _shapes(module: nn.Module) -> Shapes:
    return tuple((name, tuple(tensor.shape)) for name, tensor in _tensors(module))


def _listed(shapes: Shapes) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes)


def _hash(module: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in _tensors(module):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
