"""A model's state that always returns: train and eval modes, grad mode, random numbers, its structure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tp_twoaxis.errors import TwoAxisError


def unwrap(model: nn.Module) -> nn.Module:
    """Strip ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` wrappers, however nested.

    Raises:
        TwoAxisError: it is no module, or TorchScript.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrap(DataParallel(DataParallel(net))) is net
        True
    """
    if not isinstance(model, nn.Module):
        raise TwoAxisError(_no_module(model))
    if isinstance(model, torch.jit.ScriptModule):
        raise TwoAxisError(
            f"model: expected an eager module, got TorchScript ({model.original_name}), whose layers cannot be "
            "changed; pass the module that it was scripted or traced from"
        )
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif (compiled := model._modules.get("_orig_mod")) is not None:
            # known by its child: torch.compile's class is private, and importing it takes seconds
            model = compiled
        else:
            return model


def _no_module(model: object) -> str:
    """Say what stands in a model's place, and how a model comes of it."""
    way = "pass the network itself"
    if isinstance(model, str):
        way = f"build it: tp_twoaxis.models.build_model({model!r})"
    elif isinstance(model, type):
        return f"model: expected a torch.nn.Module, got the class {model.__name__}; make a network of it"
    elif isinstance(model, Mapping):
        way = "a state dict holds weights alone: build the network, and load them into it with load_state_dict"
    elif callable(model):
        way = "call the function that builds it"
    return f"model: expected a torch.nn.Module, got {type(model).__name__}; {way}"


def refuse_quantised(network: nn.Module) -> None:
    """Refuse a network with layers whose weights are packed integers, which cannot be cut or refitted.

    Raises:
        TwoAxisError: naming the first such layer.

    Example:
        >>> refuse_quantised(nn.Linear(2, 2))
    """
    for name, module in network.named_modules():
        if ".quantized" in type(module).__module__:
            raise TwoAxisError(
                f"model: expected layers with weights of floats, got the quantised {type(module).__name__} "
                f"{name or 'itself'}; prune first, and quantise what is left"
            )


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Run a block and give every sub-module its own training flag back, also when the block raises.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with preserve_modes(net):
        ...     _ = net.eval()
        >>> [module.training for module in net.modules()]
        [True, True, False]
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a block with the model in evaluation mode and without gradients.

    Afterwards every sub-module has its own training flag again (a frozen BatchNorm inside a training network
    stays frozen) and the grad mode is the caller's, also when the block raises.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with eval_mode(net):
        ...     net.training, torch.is_grad_enabled()
        (False, False)
        >>> [module.training for module in net.modules()]
        [True, True, False]
    """
    with preserve_modes(model), torch.no_grad():
        model.eval()
        yield


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    """Run a block with the model in training mode and with gradients.

    A model in evaluation mode is put into training mode as a whole. One that already is in training mode stays
    as the caller arranged it: a sub-module in evaluation mode, such as a frozen BatchNorm, stays in it.
    Afterwards every training flag and the grad mode are as before, also when the block raises.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).eval()
        >>> with train_mode(net):
        ...     [module.training for module in net.modules()]
        [True, True, True]
        >>> net.training
        False
    """
    with preserve_modes(model), torch.enable_grad():
        if not model.training:
            model.train()
        yield


@contextmanager
def fork_rng() -> Iterator[None]:
    """Run a block and put torch's random state back: the CPU's and, once CUDA is in use, every CUDA device's.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with fork_rng():
        ...     first = torch.rand(3)
        >>> torch.equal(first, torch.rand(3))
        True
    """
    # asking an unused CUDA for its state would initialise it and take its memory
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if in_use else range(0)
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        yield


@contextmanager
def eager_mode(model: nn.Module) -> Iterator[None]:
    """Run what was compiled inside a model as it was written: code traced without hooks never calls them.

    Example:
        >>> with eager_mode(nn.Linear(2, 2)):
        ...     torch.compiler.is_compiling()
        False
    """
    if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


_CONTAINERS = frozenset((dict, OrderedDict, list, set))


class ModelSnapshot:
    """A model's structure at one moment, to go back to after pruning.

    Takes time and memory of the order of the number of modules and parameters: tensors are remembered, not
    copied. :meth:`restore` brings back the same ``Parameter`` objects with their ``requires_grad``,
    ``grad`` and ``data``, buffers, sub-modules, hooks, training flags and all other attributes
    (``out_channels``, ``num_heads``, ...). It suits Torch-Pruning, which replaces parameters and running
    statistics by new tensors.

    Values written **in place** into a remembered tensor (an optimizer's step, ``nn.init``, BatchNorm in
    training mode) are not undone, nor are changes inside objects that an attribute refers to, other than
    plain dicts, lists and sets.

    Args:
        model: any module; wrappers may stay on.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> snapshot = ModelSnapshot(net)
        >>> net[0].weight, net[0].out_features = nn.Parameter(net[0].weight[:2].detach()), 2
        >>> snapshot.restore()
        >>> net[0], net[0].weight.shape
        (Linear(in_features=4, out_features=3, bias=True), torch.Size([3, 4]))
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, dict(module.__dict__)) for module in model.modules()]
        # contents beside references: hook handles hold these very containers, so they must stay the same
        containers = [v for _, values in self._modules for v in values.values() if type(v) in _CONTAINERS]
        self._contents = [(container, container.copy()) for container in containers if container]
        self._empty = [container for container in containers if not container]  # most are: a module's hooks
        # `.data` is a second handle on the same memory: it remembers shape and place at no cost
        self._parameters = [(p, p.data, p.requires_grad, p.grad) for p in model.parameters()]
        self._buffers = [(b, b.data) for b in model.buffers()]

    def restore(self) -> None:
        """Put the model back as it was; may be called again after further changes."""
        for container in self._empty:
            container.clear()
        for container, content in self._contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for module, values in self._modules:
            module.__dict__.clear()
            module.__dict__.update(values)
        for parameter, data, requires_grad, grad in self._parameters:
            _point_to(parameter, data)
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for buffer, data in self._buffers:
            _point_to(buffer, data)


def _point_to(tensor: Tensor, data: Tensor) -> None:
    """Undo an assignment to ``tensor.data``; leaves an unchanged tensor alone."""
    if (
        tensor.data_ptr() != data.data_ptr()
        or tensor.shape != data.shape
        or tensor.stride() != data.stride()
        or tensor.dtype != data.dtype
        or tensor.device != data.device
    ):
        tensor.data = data
