"""Is the model still in the state that statistics describe? The one check of that, by shape and by hash."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.runtime.layers import CHANNEL_LAYERS, out_channels_of

NamedTensors = Iterable[tuple[str, Tensor]]


class Fingerprint(NamedTuple):
    """A module at one moment.

    Attributes:
        shape: of its tensors, in words for messages and for comparison.
        digest: hash of them.
    """

    shape: str
    digest: str


def fingerprint(layer: nn.Module) -> str:
    """Hash a layer's weights, so that a later change of them is noticed.

    The hash covers every parameter's dtype, shape and bytes (their CRC-32: changes that happen, not those that somebody
    makes up); it does not depend on the device, on the memory format, or on the gradient.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = fingerprint(layer)
        >>> with torch.no_grad(): _ = layer.weight.add_(1.0)
        >>> fingerprint(layer) == before
        False
    """
    return _digest(layer.named_parameters())


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Hash a state dict, buffers included; see :func:`fingerprint`.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> before = state_digest(norm.state_dict())
        >>> norm.running_mean += 1.0
        >>> state_digest(norm.state_dict()) == before
        False
    """
    return _digest(state.items())


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Shape of a layer's weight; of attention that of its output projection.

    Example:
        >>> weight_shape(nn.Conv2d(3, 8, 5))
        (8, 3, 5, 5)
    """
    weight = (layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer).weight
    return tuple(weight.shape)  # type: ignore[arg-type]


def described_channels(channels: int, shape: tuple[int, ...]) -> str:
    """Say how wide a layer is, for messages and for comparison.

    Example:
        >>> described_channels(8, (8, 3, 5, 5))
        '8 channels and a weight [8, 3, 5, 5]'
    """
    return f"{channels} channels and a weight {list(shape)}"


def describe_layer(layer: nn.Module) -> str:
    """Say how wide a layer is as it stands in a model.

    Example:
        >>> describe_layer(nn.Linear(3, 2)), describe_layer(nn.ReLU())
        ('2 channels and a weight [2, 3]', 'no channels of its own (a ReLU)')
    """
    if not isinstance(layer, CHANNEL_LAYERS):
        return f"no channels of its own (a {type(layer).__name__})"
    return described_channels(out_channels_of(layer), weight_shape(layer))


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List a module's own parameters and floating-point buffers, not its children's."""
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and tensor.is_floating_point():
            yield name, tensor


class ModelFingerprints:
    """Fingerprints of a model's modules, to check later that they are what they were.

    What reaches a layer depends on everything before it, running statistics of BatchNorm included, so statistics of
    activations or gradients hold for one state of the whole model; see :meth:`of_model`. Statistics in a file
    remember the weights of the layers that they are of.

    Args:
        recorded: module name -> its fingerprint.
        tensors: what is hashed of a module.
        shape_of: a module's shape in words; default that of its tensors.
        again: what to do when the model changed, for messages.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> state = ModelFingerprints.of_model(net)
        >>> state.verify(net)
        >>> net[1].running_mean += 1.0
        >>> state.verify(net)
        Traceback (most recent call last):
        ...
        tp_twoaxis.errors.StaleStatisticsError: 1: ...
    """

    def __init__(
        self,
        recorded: Mapping[str, Fingerprint],
        tensors: Callable[[nn.Module], NamedTensors] = own_tensors,
        shape_of: Callable[[nn.Module], str] | None = None,
        again: str = "gather them again",
    ) -> None:
        self._recorded = dict(recorded)
        self._tensors = tensors
        self._shape_of = shape_of
        self._again = again
        self._seen: dict[str, tuple[tuple[int, int, torch.Size], ...]] = {}

    @classmethod
    def of_model(cls, model: nn.Module) -> ModelFingerprints:
        """Take the fingerprints of every module that has tensors of its own."""
        modules = {name: module for name, module in model.named_modules() if any(own_tensors(module))}
        return cls({n: Fingerprint(_shapes(own_tensors(m)), _digest(own_tensors(m))) for n, m in modules.items()})

    def verify(
        self, model: nn.Module, certainly: Iterable[nn.Module] = (), *, names: Iterable[str] | None = None
    ) -> None:
        """Check that a model is in the recorded state.

        Args:
            model: the model, unwrapped; a copy will do.
            certainly: modules to hash whatever their tensors' version says (assignments to ``.data`` leave
                no trace there); all others are hashed anew when a version moved.
            names: check these alone; default all that were recorded.

        Raises:
            StaleStatisticsError: a module is missing, has other shapes, or other values.
        """
        present, surely = dict(model.named_modules()), set(certainly)
        for name in self._recorded if names is None else names:
            module, recorded = present.get(name), self._recorded[name]
            if module is None:
                raise StaleStatisticsError(
                    f"{name}: statistics hold this layer, {type(model).__name__} has no such layer - "
                    "they belong to another model; gather those of this one"
                )
            seen = tuple((id(tensor), tensor._version, tensor.shape) for _, tensor in self._tensors(module))
            if module not in surely and self._seen.get(name) == seen:
                continue
            shape = _shapes(self._tensors(module)) if self._shape_of is None else self._shape_of(module)
            if shape != recorded.shape:
                raise StaleStatisticsError(
                    f"{name}: statistics hold {recorded.shape}, the layer has {shape} - "
                    f"it was pruned after they were gathered, or is another model's; {self._again}"
                )
            if _digest(self._tensors(module)) != recorded.digest:
                raise StaleStatisticsError(
                    f"{name}: its parameters or running statistics are not those that statistics were gathered with "
                    f"- it was trained, repaired or cast since; {self._again}"
                )
            self._seen[name] = seen


def _shapes(tensors: NamedTensors) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors)


def _digest(tensors: NamedTensors) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        data = tensor.detach().cpu().contiguous()
        # changes of up to 32 bits in a row never leave this sum as it was; a cryptographic one takes four times as long
        values = zlib.crc32(data.reshape(-1).view(torch.uint8).numpy().data)
        digest.update(f"{name} {data.dtype} {tuple(data.shape)} {values}".encode())
    return digest.hexdigest()
