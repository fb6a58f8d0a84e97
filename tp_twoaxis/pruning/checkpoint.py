"""Pruned networks on disk: weights and a recipe of their structure in one safetensors file, no pickle.

The recipe holds, by module name, the class, every integer attribute (``out_channels``, ``num_heads``,
``normalized_shape``, ...) and the scale of attention as absolute values. Loading builds the dense network with the
user's own factory, sets those of its attributes that differ, puts every parameter and buffer in its place and compares
their shapes with the attributes. Recipe and tensors are under one checksum.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.attention import SCALES
from tp_twoaxis.errors import FileFormatError, TwoAxisError, listing, reason
from tp_twoaxis.pruning.card_text import model_card
from tp_twoaxis.pruning.pruning_report import PruningReport
from tp_twoaxis.runtime import serialization
from tp_twoaxis.runtime.model_state import fork_rng, unwrap
from tp_twoaxis.runtime.tensor_shapes import misshapen

FORMAT = "tp-twoaxis/pruned"
VERSION = 2  # 2: scales of attention


class JsonReport(Protocol):
    """Anything that describes itself as a JSON string, as a ``PruningReport`` does."""

    def to_json(self) -> str:
        """Return the description."""


class _Slot(NamedTuple):
    """A place for a parameter or buffer: ``module._parameters[key]`` or ``module._buffers[key]``."""

    module: nn.Module
    key: str
    is_parameter: bool
    tensor: Tensor | None


def save_pruned(
    model: nn.Module, path: str | Path, report: JsonReport | None = None, *, card: bool | str = False
) -> None:
    """Write a pruned (or dense) network to one safetensors file, whole or not at all.

    Kept are all parameters and buffers, also non-persistent ones, with dtype, strides (channels-last stays)
    and tying, all integer attributes, and the scale of attention, which follows the width of its heads. Everything
    else - other floats, strings, functions, hooks - comes from the factory at loading.

    Args:
        model: any module; wrappers are stripped.
        path: where to; an existing file is replaced.
        report: how the network came about; :func:`read_header` returns it.
        card: write a model card beside the file, with ``.md`` for its suffix: a text, such as
            :func:`~tp_twoaxis.pruning.card_text.model_card` makes, or True for the one that it makes of the report.

    Raises:
        TwoAxisError: an argument is of another kind, the folder does not exist or cannot be written, a tensor has no
            values (meta device), or the attributes of one of torch's own layers describe other shapes than those of
            its tensors.

    Example:
        >>> import tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "net.safetensors")
        >>> save_pruned(nn.Linear(4, 2), path)
        >>> load_pruned(path, lambda: nn.Linear(4, 3))
        Linear(in_features=4, out_features=2, bias=True)
    """
    _check_arguments(model, path, report)
    text = model_card(cast("PruningReport", report), file=Path(path).name) if card is True else card
    model = unwrap(model)
    _check_shapes(model)
    tensors: dict[str, Tensor] = {}
    first_name: dict[Tensor, str] = {}
    aliases: dict[str, str] = {}
    strides: dict[str, list[int]] = {}
    empty: list[str] = []
    for name, slot in _slots(model).items():
        if slot.tensor is None:
            empty.append(name)
        elif slot.tensor in first_name:
            aliases[name] = first_name[slot.tensor]
        elif slot.tensor.is_meta:
            raise TwoAxisError(f"{name}: expected a tensor with values, got one on the meta device; load the weights")
        else:
            first_name[slot.tensor] = name
            value = slot.tensor.detach()
            # a copy always: safetensors refuses tensors that share memory, as views of one another do
            tensors[name] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
            dense = torch.empty_like(value, device="meta").stride()
            if dense != tensors[name].stride():
                strides[name] = list(dense)
    header: serialization.Json = {
        "torch": torch.__version__,
        "modules": {
            name: {"class": type(module).__name__, "attributes": _structure(module)}
            for name, module in model.named_modules()
        },
        "aliases": aliases,
        "empty": empty,
        "strides": strides,
        "report": None if report is None else report.to_json(),
    }
    serialization.write_tensors(path, tensors, header, kind=FORMAT, version=VERSION)
    if text:
        serialization.write_bytes(Path(path).with_suffix(".md"), text.encode())


def read_header(path: str | Path) -> dict[str, Any]:
    """Read what a file says of itself, without its tensors.

    Returns:
        ``"report"`` (the JSON string given to :func:`save_pruned`, or None), ``"torch"`` (the version that
        wrote), and the recipe: ``"modules"`` (name -> class and attributes), ``"aliases"`` (tied name
        -> stored name), ``"empty"`` (parameters and buffers that are None), ``"strides"`` (of non-contiguous
        tensors).

    Raises:
        FileFormatError: the file is missing, corrupted, a pickle, foreign, or of a newer version.

    Example:
        >>> import tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "net.safetensors")
        >>> save_pruned(nn.Linear(4, 2), path)
        >>> read_header(path)["modules"]
        {'': {'class': 'Linear', 'attributes': {'in_features': 4, 'out_features': 2}}}
    """
    return serialization.read_header(path, kind=FORMAT, version=VERSION)


def load_pruned(path: str | Path, model_factory: Callable[[], nn.Module]) -> nn.Module:
    """Rebuild a network that :func:`save_pruned` wrote.

    Args:
        path: the file.
        model_factory: builds the dense network, for example ``lambda: resnet18(num_classes=10)``. Its values
            do not matter, so the meta device will do; ``requires_grad`` flags and devices are kept from it.

    Returns:
        The network in evaluation mode; its outputs are those of the saved one bit for bit, on the same
        machine, device and torch version.

    Raises:
        FileFormatError: the file is missing, corrupted, a pickle, foreign, of a newer version or incomplete, or its
            attributes and the shapes of its tensors contradict each other.
        TwoAxisError: the factory builds another network than the one that was pruned.

    Example:
        >>> import tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "net.safetensors")
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))
        >>> save_pruned(net, path)
        >>> x = torch.ones(1, 4)
        >>> torch.equal(load_pruned(path, lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)))(x), net(x))
        True
    """
    if isinstance(model_factory, nn.Module) or not callable(model_factory):
        raise TwoAxisError(
            "model_factory: expected a function that builds the dense network, got "
            f"{type(model_factory).__name__}; give for example lambda: resnet18(num_classes=10)"
        )
    tensors, header = serialization.read_tensors(path, kind=FORMAT, version=VERSION)
    with fork_rng():
        model = model_factory()
    if not isinstance(model, nn.Module):
        raise TwoAxisError(
            f"model_factory: expected it to return an nn.Module, got {type(model).__name__}; return the dense network"
        )
    model = unwrap(model)
    try:
        saved = {name: _restride(name, tensor, header["strides"]) for name, tensor in tensors.items()}
        saved |= {name: saved[stored] for name, stored in header["aliases"].items()}
        classes = {name: module["class"] for name, module in header["modules"].items()}
        attributes = {name: _checked(module["attributes"]) for name, module in header["modules"].items()}
        empty = set(header["empty"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FileFormatError(
            f"{path}: the recipe is incomplete or damaged ({reason(error)}); save the network again"
        ) from error
    modules = dict(model.named_modules())
    slots = _slots(model)
    _compare(path, "module", classes, modules)
    for name, module in modules.items():
        if type(module).__name__ != classes[name]:
            raise TwoAxisError(
                f"{path}: module {name or '(root)'}: expected the saved class {classes[name]}, the factory "
                f"built {type(module).__name__}; build the network that was pruned"
            )
    _compare(path, "parameter or buffer", {*saved, *empty}, slots)
    # a layer whose subclass shapes its tensors in a way of its own has no rule to follow
    ruled = {name: module for name, module in modules.items() if misshapen(module) is None}
    for name, module in modules.items():
        for key, value in attributes[name].items():
            _set_attribute(path, name, module, key, value)
    _fill(slots, saved)
    for name, module in ruled.items():
        if (wrong := misshapen(module)) is not None:
            raise FileFormatError(
                f"{path}: module {name or '(root)'}: its attributes ({_attributes_of(module)}) ask for {wrong}; "
                "the recipe and the tensors belong to different networks, save the network again"
            )
    return model.eval()


def loading_notes(network: nn.Module) -> list[str]:
    """Say what of a network cannot load it again once it is pruned: methods that build it from a configuration.

    Example:
        >>> loading_notes(nn.Linear(2, 2))
        []
    """
    kinds = sorted({type(module).__name__ for module in network.modules() if hasattr(type(module), "from_pretrained")})
    if not kinds:
        return []
    return [
        f"{listing(kinds, 3)}: from_pretrained cannot load the pruned network, because its configuration knows one "
        "width for all layers and this one has many; write it with save_pruned(model, path, report) and read it with "
        "load_pruned(path, factory), where factory builds the dense network, such as lambda: Model(config)"
    ]


def _check_arguments(model: object, path: object, report: object) -> None:
    """Refuse what cannot be saved, before anything is gathered.

    Raises:
        TwoAxisError: saying which argument, and what it should be.
    """
    order = "save_pruned(model, path, report)"
    if not isinstance(model, nn.Module):
        raise TwoAxisError(f"model: expected an nn.Module, got {type(model).__name__}; the order is {order}")
    if not isinstance(path, (str, os.PathLike)):
        raise TwoAxisError(f"path: expected the name of a file, got {type(path).__name__}; the order is {order}")
    if report is not None and not callable(getattr(report, "to_json", None)):
        raise TwoAxisError(
            f"report: expected what prune_to_flops returned, got {type(report).__name__}; pass that, or leave it out"
        )


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """All places for parameters and buffers by full name; a shared module's under each of its names."""
    slots = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for is_parameter, store in ((True, module._parameters), (False, module._buffers)):
            for key, tensor in store.items():
                slots[f"{prefix}.{key}" if prefix else key] = _Slot(module, key, is_parameter, tensor)
    return slots


def _structure(module: nn.Module) -> dict[str, int | float | list[int]]:
    """Public integers, tuples or lists of integers, and scales of attention; bools are settings, not structure."""
    found: dict[str, int | float | list[int]] = {}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if _is_integer(value):
            found[name] = int(value)
        elif _is_scale(name, value):
            found[name] = value
        elif isinstance(value, (tuple, list)) and value and all(_is_integer(item) for item in value):
            found[name] = [int(item) for item in value]
    return found


def _attributes_of(module: nn.Module) -> str:
    return listing(f"{name} {value}" for name, value in _structure(module).items())


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_scale(name: str, value: object) -> bool:
    return name in SCALES and isinstance(value, float) and math.isfinite(value)


def _checked(attributes: dict[str, Any]) -> dict[str, int | float | tuple[int, ...]]:
    """Attributes from a file: only what :func:`_structure` can have written may be set on a module."""
    checked: dict[str, int | float | tuple[int, ...]] = {}
    for name, value in attributes.items():
        items = value if isinstance(value, list) else [value]
        if name.startswith("_") or not (_is_scale(name, value) or all(_is_integer(item) for item in items)):
            raise ValueError(f"attribute {name} = {value!r} is no structure")
        checked[name] = tuple(value) if isinstance(value, list) else value
    return checked


def _set_attribute(
    path: str | Path, name: str, module: nn.Module, key: str, value: int | float | tuple[int, ...]
) -> None:
    """Set an attribute that the module has, by a value of the kind that it has.

    One that is None in the class, and that the factory leaves so, is what a forward remembers of images that it met: it
    stays None, because what was computed with it is not in the file.

    Raises:
        TwoAxisError: the module has no such attribute, or one of another kind.
    """
    present = vars(module)
    if key not in present and hasattr(type(module), key):
        present = {key: getattr(type(module), key)}
        if present[key] is None:
            return
    current = present.get(key)
    wanted = list(value) if isinstance(current, list) and isinstance(value, tuple) else value
    if key in present and current == wanted:
        return
    several = isinstance(current, (tuple, list))
    number = isinstance(current, (int, float)) and not isinstance(current, bool)
    if key not in present or not (current is None or (several if isinstance(value, tuple) else number)):
        got = f"{key} = {current!r}" if key in present else f"no attribute {key}"
        raise TwoAxisError(
            f"{path}: module {name or '(root)'}: the saved {type(module).__name__} has {key} = {wanted!r}, the "
            f"factory's has {got}; build the network that was pruned, and let the factory set what was set on it later"
        )
    setattr(module, key, wanted)


def _check_shapes(model: nn.Module) -> None:
    """Refuse layers that could not be told from damaged ones when they are read.

    Raises:
        TwoAxisError: one of torch's own layers has attributes that are not those of its tensors.
    """
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.modules.") and (wrong := misshapen(module)) is not None:
            raise TwoAxisError(
                f"{name or type(module).__name__}: its attributes ({_attributes_of(module)}) ask for {wrong}; "
                "set them to what the tensors are"
            )


def _restride(name: str, tensor: Tensor, strides: dict[str, list[int]]) -> Tensor:
    """Copy a tensor into aligned memory of its own, in the saved layout: kernels are chosen by both."""
    layout = torch.empty(tensor.shape, device="meta").stride()
    if name in strides:
        layout = tuple(strides[name])
        # a layout with gaps or overlaps was never written, and could ask for any amount of memory
        probe = torch.empty_strided(tensor.shape, layout, device="meta")
        if torch.empty_like(probe).stride() != layout:
            raise ValueError(f"{name}: strides {layout} do not fit shape {tuple(tensor.shape)}")
    return torch.empty_strided(tensor.shape, layout, dtype=tensor.dtype).copy_(tensor)


def _compare(path: str | Path, what: str, saved: Any, built: Any) -> None:
    missing, extra = [n for n in saved if n not in built], [n for n in built if n not in saved]
    if missing or extra:
        raise TwoAxisError(
            f"{path}: expected the factory to build the network that was pruned; {what} missing from it: "
            f"{listing(sorted(missing)) or 'none'}; extra in it: {listing(sorted(extra)) or 'none'}; "
            "give the factory the saved network's architecture and options"
        )


def _fill(slots: dict[str, _Slot], saved: dict[str, Tensor]) -> None:
    """Put the saved tensors in their places; names that shared a tensor share it again."""
    tensors = (slot.tensor for slot in slots.values())
    home = next((t.device for t in tensors if t is not None and not t.is_meta), torch.device("cpu"))
    placed: dict[tuple[Tensor, bool], Tensor] = {}
    for name, slot in slots.items():
        value = saved.get(name)
        if value is not None:
            identity = (value, slot.is_parameter)
            if identity not in placed:
                placed[identity] = _placed(value, slot, home)
            value = placed[identity]
        # not into `_parameters`: a recurrent layer keeps a second list, which its own __setattr__ updates
        setattr(slot.module, slot.key, value)


def _placed(value: Tensor, slot: _Slot, home: torch.device) -> Tensor:
    """Move a saved tensor to its slot's device; a parameter trains if the factory's did."""
    value = value.to(home if slot.tensor is None or slot.tensor.is_meta else slot.tensor.device)
    if not slot.is_parameter:
        return value
    trains = value.is_floating_point() if slot.tensor is None else slot.tensor.requires_grad
    return nn.Parameter(value, requires_grad=trains)
