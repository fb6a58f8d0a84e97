"""Models by name for the command line, the benchmark and the examples, and safe loading of weights.

Built in are the CIFAR ResNets of He et al. 2016 (section 4.2) and the larger networks of
:mod:`tp_twoaxis.cifar_models`; torchvision's and timm's models and any
``module:factory`` are reached by name. Both libraries are imported only when a name needs them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tp_twoaxis.cifar_models import cifar_mobilenet_v2, cifar_resnet18, cifar_vgg16_bn
from tp_twoaxis.errors import FileFormatError, TwoAxisError, listing
from tp_twoaxis.files import refuse_pickle

FORMS = (
    "a built-in name, a torchvision classification model (`resnet50` or `torchvision:resnet50`), "
    "a timm model (`timm:deit_tiny_patch16_224`) or `module:factory`"
)


class ZeroChannels(nn.InstanceNorm2d):
    """Channels of zeros ``[N, num_features, H, W]`` to go with ``[N, any, H, W]``, whose values are unused.

    The class is an instance norm only by type: the host counts and removes the channels of norm layers, so
    that it can prune these zeros as well. It has no parameters and no buffers.

    Example:
        >>> ZeroChannels(8)(torch.ones(2, 16, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the zeros in the input's dtype, on its device."""
        shape = (input.shape[0], self.num_features, *input.shape[2:])
        # The host follows autograd: a product with a grad_fn, but none that leads back to the input.
        leaf = torch.zeros(shape, dtype=input.dtype, device=input.device, requires_grad=torch.is_grad_enabled())
        return leaf * 1


class PadShortcut(nn.Module):
    """Option A of He et al. 2016: every second pixel, with zero channels in front and behind.

    ``[N, C, H, W] -> [N, C + 2 * pad, ceil(H / 2), ceil(W / 2)]``, no parameters, no multiplications.

    Written with ``F.pad`` or with plain zeros in ``torch.cat``, Torch-Pruning 1.6.1 takes the padding for an
    element-wise operation and couples channel i of the narrow stream with channel i of the wide one instead
    of i + pad: pruning from the narrow stream runs but removes the wrong channels, pruning from the wide one
    breaks the forward pass. With :class:`ZeroChannels` the host knows the width of all three parts of the
    concatenation and maps every channel exactly; the dense output is the same.
    """

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.front = ZeroChannels(pad)
        self.back = ZeroChannels(pad)

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and widen."""
        x = x[:, :, ::2, ::2]
        return torch.cat([self.front(x), x, self.back(x)], dim=1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, ``[N, C_in, H, W] -> [N, C_out, H / stride, W / stride]``."""

    def __init__(self, in_channels: int, channels: int, shortcut: Literal["pad", "conv"]) -> None:
        super().__init__()
        widens = in_channels != channels
        stride = 2 if widens else 1
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if widens and shortcut == "pad":
            self.downsample = PadShortcut((channels - in_channels) // 2)
        elif widens:
            convolution = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Residual branch plus shortcut, then ReLU."""
        out = F.relu(self.bn1(self.conv1(x)))
        # The host walks back along the last operand first and so meets the stem before any wider stage: with
        # option A its residual group is then rooted at 16 channels that every stage shares.
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class CifarResNet(nn.Module):
    """CIFAR ResNet of He et al. 2016: stages of 16, 32 and 64 channels, ``[N, 3, H, W] -> [N, classes]``.

    Args:
        depth: 6n + 2 with n blocks a stage: 20, 32, 44, 56, 110.
        num_classes: outputs of the head.
        shortcut: ``"pad"`` is option A (parameter-free, head called ``linear``), ``"conv"`` is option B
            (1x1 convolution + BN where the shape changes, head called ``fc``); the two heads' names are those
            of the published checkpoints of either kind.

    Every channel group that Torch-Pruning 1.6.1 finds in either kind prunes to a working network whose output
    equals the dense one's with these channels silenced. With ``"pad"`` the three residual streams form one
    group of 16 channels (channel i of stage 1 is channel 8 + i of stage 2 and 24 + i of stage 3); what the
    wider stages add around them is coupled to zeros only and is reached by asking the host for a group at a
    later stage's convolution.

    Raises:
        TwoAxisError: if the depth is not 6n + 2 or the shortcut is unknown.

    Example:
        >>> CifarResNet(depth=20, shortcut="pad")(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, shortcut: Literal["pad", "conv"] = "conv") -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise TwoAxisError(f"expected a depth of 6n + 2 (20, 32, 44, 56, 110), got {depth}; choose one of these")
        if shortcut not in ("pad", "conv"):
            raise TwoAxisError(f"expected shortcut 'pad' or 'conv', got {shortcut!r}; choose one of the two")
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        for stage, (before, channels) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            widths = [before] + [channels] * (blocks - 1)
            self.add_module(f"layer{stage}", nn.Sequential(*(BasicBlock(w, channels, shortcut) for w in widths)))
        self.head_name = "linear" if shortcut == "pad" else "fc"
        self.add_module(self.head_name, nn.Linear(64, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(stage)(x)
        logits: Tensor = self.get_submodule(self.head_name)(x.mean(dim=(2, 3)))
        return logits

    def unprunable_layers(self) -> list[nn.Module]:
        """Layers whose outputs must all stay: only the head, whose outputs are the classes."""
        return [self.get_submodule(self.head_name)]


def cifar_resnet20_option_a(num_classes: int = 10) -> CifarResNet:
    """ResNet-20 with parameter-free shortcuts, 269,722 parameters with BN.

    Example:
        >>> sum(p.numel() for p in cifar_resnet20_option_a().parameters())
        269722
    """
    return CifarResNet(20, num_classes, "pad")


def cifar_resnet20_conv_shortcut(num_classes: int = 10) -> CifarResNet:
    """ResNet-20 with 1x1-convolution shortcuts, 272,474 parameters with BN.

    Example:
        >>> sum(p.numel() for p in cifar_resnet20_conv_shortcut().parameters())
        272474
    """
    return CifarResNet(20, num_classes, "conv")


def cifar_resnet56_option_a(num_classes: int = 10) -> CifarResNet:
    """ResNet-56 with parameter-free shortcuts."""
    return CifarResNet(56, num_classes, "pad")


def cifar_resnet56_conv_shortcut(num_classes: int = 10) -> CifarResNet:
    """ResNet-56 with 1x1-convolution shortcuts."""
    return CifarResNet(56, num_classes, "conv")


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
        The model in training mode, as its maker returns it.

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
    for candidate in [library] if colon else ["torchvision", "timm"]:
        wanted = name if colon else spec
        if candidate == "torchvision" and wanted in _library_names("torchvision"):
            return _from_library("torchvision", wanted, num_classes, pretrained)
        # timm's names may carry a tag of the weights, as in resnet50.a1_in1k
        if candidate == "timm" and wanted.partition(".")[0] in _library_names("timm"):
            return _from_library("timm", wanted, num_classes, pretrained)
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
    module_name, _, attribute = spec.partition(":")
    folder = os.getcwd()
    sys.path.insert(0, folder)  # a console script does not have the working directory on its path
    try:
        try:
            module = importlib.import_module(module_name)
        except (ImportError, ValueError, TypeError) as error:  # the latter two for names such as "" and ".x"
            raise TwoAxisError(
                f"model: expected {FORMS}, got {spec!r}, and importing {module_name!r} says: {error}; "
                f"run from the folder that holds it or install it"
            ) from error
        factory = getattr(module, attribute, None)
        if not callable(factory):
            near = difflib.get_close_matches(attribute, [n for n in dir(module) if callable(getattr(module, n))])
            hint = f"did you mean {', '.join(near)}?" if near else "check the spelling"
            raise TwoAxisError(f"{spec}: expected a callable, {module_name} has no {attribute!r}; {hint}")
        options = {}
        if num_classes is not None:
            parameters = inspect.signature(factory).parameters.values()
            if not any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters):
                raise TwoAxisError(f"{spec}: the factory has no num_classes, got {num_classes}; leave it out")
            options["num_classes"] = num_classes
        model = factory(**options)
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
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
