"""Build a model from its name.

Built in are the networks of :mod:`tp_twoaxis.models.cifar_resnet` and :mod:`tp_twoaxis.models.cifar_networks`;
torchvision's and timm's models and any ``module:factory`` are reached by name. Both libraries are imported only when
a name needs them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable

from torch import nn

from tp_twoaxis.errors import TwoAxisError, reason
from tp_twoaxis.models.cifar_networks import cifar_mobilenet_v2, cifar_resnet18, cifar_vgg16_bn
from tp_twoaxis.models.cifar_resnet import (
    cifar_resnet20_conv_shortcut,
    cifar_resnet20_option_a,
    cifar_resnet56_conv_shortcut,
    cifar_resnet56_option_a,
)
from tp_twoaxis.runtime.factories import load_attribute, working_directory_on_path

FORMS = (
    "a built-in name, a torchvision classification model (`resnet50` or `torchvision:resnet50`), "
    "a timm model (`timm:deit_tiny_patch16_224`) or `module:factory`"
)

LOAD = "give the file to --checkpoint (in Python: load_weights(model, path))"

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
    library, colon, name = str(spec).partition(":")
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
    near = difflib.get_close_matches(str(spec), spellings, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    absent = [lib for lib in ("torchvision", "timm") if not any(n.startswith(f"{lib}:") for n in names)]
    install = f"; {' and '.join(absent)} not found, install tp-twoaxis[cli]" if absent else ""
    raise TwoAxisError(
        f"model: expected {FORMS}, got {spec!r}; {hint}available_models() and `tp-twoaxis models` list all{install}"
    )


def _refuse_pretrained(spec: str, pretrained: bool) -> None:
    if pretrained:
        raise TwoAxisError(
            f"{spec}: expected a torchvision or timm model with pretrained weights, none come with this one; "
            f"leave them out, or {LOAD}"
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
        # a download fails with an error of the system or of the client's own
        refused = isinstance(error, (TypeError, ValueError)) and not isinstance(error, OSError)
        if pretrained and not refused:
            step = f"without network access fetch {_published_weights(library, name)} elsewhere, then {LOAD}"
        else:
            step = "leave num_classes out with pretrained weights" if pretrained else "check num_classes"
        raise TwoAxisError(f"{library}:{name}: expected a model, {library} says {reason(error)}; {step}") from error
    assert isinstance(model, nn.Module)
    return model


def _published_weights(library: str, name: str) -> str:
    """Say where a library's weights are."""
    if library == "timm":
        settings = importlib.import_module("timm").get_pretrained_cfg(name)
        home = None if settings is None else settings.hf_hub_id
        return f"https://huggingface.co/{home} (model.safetensors)" if home else "the weights"
    weights = importlib.import_module("torchvision.models").get_model_weights(name)
    return str(weights.DEFAULT.url)


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
        try:
            model = factory(**options)
        except Exception as error:  # anybody's code
            raise TwoAxisError(
                f"{spec}: the factory raised {reason(error)}; correct it, or its surroundings"
            ) from error
    if not isinstance(model, nn.Module):
        raise TwoAxisError(
            f"{spec}: expected a torch.nn.Module, got {type(model).__name__}; return the model from the factory"
        )
    return model
