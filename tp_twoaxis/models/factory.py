"""Build a model from its name, and load weights without unpickling.

Built in are the networks of :mod:`tp_twoaxis.models.cifar_resnet` and :mod:`tp_twoaxis.models.cifar_networks`;
torchvision's and timm's models and any ``module:factory`` are reached by name. Both libraries are imported only when
a name needs them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tp_twoaxis.errors import FileFormatError, TwoAxisError, listing
from tp_twoaxis.models.cifar_networks import cifar_mobilenet_v2, cifar_resnet18, cifar_vgg16_bn
from tp_twoaxis.models.cifar_resnet import (
    cifar_resnet20_conv_shortcut,
    cifar_resnet20_option_a,
    cifar_resnet56_conv_shortcut,
    cifar_resnet56_option_a,
)
from tp_twoaxis.runtime.factories import load_attribute, working_directory_on_path
from tp_twoaxis.runtime.serialization import refuse_pickle

FORMS = (
    "a built-in name, a torchvision classification model (`resnet50` or `torchvision:resnet50`), "
    "a timm model (`timm:deit_tiny_patch16_224`) or `module:factory`"
)

BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (
        cifar_resnet20_option_a,
        cifar_resnet20_conv_shortcut,
        cifar_resnet56_option_a,
        cifar_resnet56_conv_shortcut,
        cifar_resnet18,
        cifar_vgg16_bn,
        cifar_mobilenet_v2,
    )
}


def _library_names(library: str) -> list[str]:
    """Model names of torchvision or timm; empty where the library is not installed."""
    try:
        models = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    except ImportError:
        return []
    # torchvision's list also holds detection, segmentation and video models unless its module is named
    names = models.list_models() if library == "timm" else models.list_models(module=models)
    return list(names)


def available_models() -> list[str]:
    """Names that :func:`build_model` takes: built-in ones, then ``torchvision:...`` and ``timm:...``.

    Example:
        >>> available_models()[0]
        'cifar_resnet20_option_a'
    """
    names = list(BUILT_IN)
    for library in ("torchvision", "timm"):
        names += [f"{library}:{name}" for name in _library_names(library)]
    return names


def build_model(spec: str, *, num_classes: int | None = None, pretrained: bool = False) -> nn.Module:
    """Build a model from its name.

    Args:
        spec: a built-in name, ``resnet50`` or ``torchvision:resnet50``, ``timm:deit_tiny_patch16_224``, or
            ``module:factory``, a callable in an importable module or in one of the working directory. A plain
            name is looked up in this order: built-in, torchvision, timm.
        num_classes: outputs of the head; None keeps the model's own default.
        pretrained: load the weights that torchvision or timm publish for the name.

    Returns:
        The model in training mode, as its factory returns it.

    Raises:
        TwoAxisError: if the name is unknown (near matches are listed), if the library is missing or refuses,
            if the factory does not return a module, or if ``pretrained`` does not apply.

    Example:
        >>> build_model("cifar_resnet20_option_a", num_classes=100).linear.out_features
        100
    """
    library, colon, name = spec.partition(":")
    if spec in BUILT_IN:
        _refuse_pretrained(spec, pretrained)
        return BUILT_IN[spec](**({} if num_classes is None else {"num_classes": num_classes}))
    if colon and library not in ("torchvision", "timm"):
        _refuse_pretrained(spec, pretrained)
        return _from_factory(spec, num_classes)
    plain = name if colon else spec
    for candidate in [library] if colon else ["torchvision", "timm"]:
        if candidate == "torchvision" and plain in _library_names("torchvision"):
            return _from_library("torchvision", plain, num_classes, pretrained)
        # timm's names may carry a tag of the weights, as in resnet50.a1_in1k
        if candidate == "timm" and plain.partition(".")[0] in _library_names("timm"):
            return _from_library("timm", plain, num_classes, pretrained)
    names = available_models()
    # each name with and without its library, once
    spellings = dict.fromkeys(names + [n.partition(":")[2] for n in names])
    near = difflib.get_close_matches(spec, spellings, n=6)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    absent = [lib for lib in ("torchvision", "timm") if not any(n.startswith(f"{lib}:") for n in names)]
    install = f"; {' and '.join(absent)} not found, install tp-twoaxis[cli]" if absent else ""
    raise TwoAxisError(f"model: expected {FORMS}, got {spec!r}; {hint}available_models() lists all{install}")


def _refuse_pretrained(spec: str, pretrained: bool) -> None:
    if pretrained:
        raise TwoAxisError(
            f"{spec}: pretrained=True expects a torchvision or timm model, no weights come with this one; "
            "build it without and call load_weights(model, path)"
        )


def _from_library(library: str, name: str, num_classes: int | None, pretrained: bool) -> nn.Module:
    options = {} if num_classes is None else {"num_classes": num_classes}
    try:
        if library == "timm":
            model = importlib.import_module("timm").create_model(name, pretrained=pretrained, **options)
        else:
            models = importlib.import_module("torchvision.models")
            model = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    except Exception as error:  # both libraries raise whatever their download or constructor meets
        step = "get the weights elsewhere and call load_weights(model, path)" if pretrained else "check num_classes"
        raise TwoAxisError(
            f"{library}:{name}: expected a model, {library} says {type(error).__name__}: {error}; {step}"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _from_factory(spec: str, num_classes: int | None) -> nn.Module:
    factory = load_attribute(spec, "model", otherwise=f"a model is {FORMS}")
    if not callable(factory):
        raise TwoAxisError(
            f"{spec}: expected a callable, got {type(factory).__name__}; name a function or class that makes a model"
        )
    options = {}
    if num_classes is not None:
        parameters = inspect.signature(factory).parameters.values()
        if not any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters):
            raise TwoAxisError(f"{spec}: the factory has no num_classes, got {num_classes}; leave it out")
        options["num_classes"] = num_classes
    with working_directory_on_path():  # the factory may import more
        model = factory(**options)
    if not isinstance(model, nn.Module):
        raise TwoAxisError(
            f"{spec}: expected a torch.nn.Module, got {type(model).__name__}; return the model from the factory"
        )
    return model


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a safetensors file into a model, all names and shapes equal; the model is unchanged on an error.

    Files saved before batch norm counted its batches may lack ``num_batches_tracked``, as PyTorch allows.

    Args:
        model: receives the weights in place, on its own device and in its own dtype.
        path: a ``.safetensors`` file. Pickles are refused, never opened.

    Raises:
        FileFormatError: if the file is a pickle or otherwise no safetensors file.
        TwoAxisError: if it does not exist or its names, shapes or kinds of number are not the model's.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> source, copy = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(source.state_dict(), f"{folder}/linear.safetensors")
        ...     load_weights(copy, f"{folder}/linear.safetensors")
        >>> torch.equal(source.weight, copy.weight)
        True
    """
    weights = _read_safetensors(Path(path))
    own = model.state_dict()
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
            f"{path}: names and shapes fit, but {type(model).__name__} refuses to load them: {error}; "
            "look at its load_state_dict hooks"
        ) from error


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise TwoAxisError(f"{path}: expected a safetensors file, there is none; check the path")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        # only now: the length that a sound safetensors file starts with can look like a pickle's first byte
        refuse_pickle(path)
        raise FileFormatError(
            f"{path}: expected a safetensors file, reading it says: {error}; save it again or copy it anew"
        ) from error
