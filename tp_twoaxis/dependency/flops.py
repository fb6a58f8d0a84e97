"""The one trusted counter of multiply-adds, and wall-clock latency.

A MAC is one multiply-add of a convolution, a linear layer, a matrix product or one of attention's two
products. Element-wise operations, normalisation, pooling and biases count nothing. Counted is what runs, by
``torch.utils.flop_counter``, so that attention is exact at any width; Torch-Pruning's and thop's rules per layer
type can be reported beside it (:mod:`~tp_twoaxis.dependency.other_counters`).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.model_state import ModelSnapshot, eval_mode, fork_rng, unwrap

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

ExampleInputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""One tensor, positional arguments, or keyword arguments of the model's forward."""


@dataclass(frozen=True)
class MacsCount:
    """What :func:`count_macs` found.

    Attributes:
        total: MACs of one example.
        by_module: MACs of one example inside each module and its children, by the name that
            ``named_modules()`` gives it; the root is ``""``. A module that does not run has 0, and so has
            ``out_proj`` of ``nn.MultiheadAttention``, whose product runs inside the attention module.
        params: number of parameters, tied ones once.
        outputs: shapes of all tensors that the model returned for the examples that were given; counts of batches of
            other sizes are equal all the same.
    """

    total: int
    by_module: dict[str, int]
    params: int
    outputs: list[tuple[int, ...]] = field(compare=False)


def count_macs(model: nn.Module, example_inputs: ExampleInputs) -> MacsCount:
    """Count the multiply-adds that a model executes for one example.

    The model runs once, in evaluation mode and without gradients; afterwards it, the random state and the
    backend flags are as before. Its own hooks fire. Models on the meta device are counted without computing.

    Args:
        model: any module; ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile`` are unwrapped.
        example_inputs: a tensor, positional or keyword arguments; dimension 0 of the first tensor is the
            batch, and counts are divided by it.

    Raises:
        TwoAxisError: there is no tensor or no example in ``example_inputs``, or the model does not do the
            same work for every example of the batch.

    Note:
        Fused recurrent kernels (``nn.LSTM``) and vector products (``aten::mv``, ``aten::dot``) have no rule
        in torch's counter and count 0.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
        >>> count = count_macs(net, torch.zeros(2, 3, 4, 4))
        >>> count.total == 3 * 8 * 9 * 16 + 128 * 10
        True
        >>> count.by_module
        {'': 4736, '0': 3456, '1': 0, '2': 0, '3': 1280}
    """
    model = unwrap(model)
    # it imports triton where there is one, which takes longer than all of this package
    from torch.utils.flop_counter import FlopCounterMode

    batch = count_examples(example_inputs)
    names = {module: name for name, module in model.named_modules()}
    flops = dict.fromkeys(names.values(), 0)
    snapshot = ModelSnapshot(model)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # torch's fused attention kernels and its inference fast path have no rule on every device and version
        torch.backends.mha.set_fastpath_enabled(False)
        with ExitStack() as stack:
            stack.enter_context(fork_rng())
            stack.enter_context(eval_mode(model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            for parameter in model.parameters():
                # the counter's module tracker fails on a parameter handed to a module while gradients are off
                parameter.requires_grad_(False)
            counter = stack.enter_context(FlopCounterMode(display=False))
            stack.enter_context(_attributing(counter, names, flops))
            returned = call(model, example_inputs)
            total = counter.get_total_flops()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        snapshot.restore()
    for name, count in {**flops, "": total}.items():
        if count % (2 * batch):
            raise TwoAxisError(
                f"{name or type(model).__name__}: expected the same work for each of {batch} examples, got "
                f"{count / 2:.0f} MACs in all, no multiple of {batch} - some work is done once a batch, or "
                "dimension 0 of the first tensor is not the batch; give example_inputs of batch size 1"
            )
    return MacsCount(
        total=total // 2 // batch,
        by_module={name: count // 2 // batch for name, count in flops.items()},
        params=sum(parameter.numel() for parameter in model.parameters()),
        outputs=[tuple(tensor.shape) for tensor in all_tensors(returned)],
    )


@contextmanager
def running_layers(model: nn.Module) -> Iterator[list[str]]:
    """Follow which modules run inside the block, so that an error can say where it happened.

    Yields:
        Names of the modules that are running, outermost first and without the model itself; after an exception
        in a forward pass, of those it left.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(2, 2)))
        >>> with running_layers(net) as running:
        ...     try:
        ...         net(torch.zeros(1, 4))
        ...     except RuntimeError:
        ...         running
        ['1', '1.0']
    """
    names = {module: name for name, module in model.named_modules()}
    running: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        if module is model:
            running.clear()  # a new attempt after one that failed
        elif module in names:
            running.append(names[module])

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if module is not model and module in names:
            running.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def inside(running: list[str], model: nn.Module) -> str:
    """Name the layer in which something happened, to follow the model's name: "" or " in layer1.0.conv1 (Conv2d)".

    Example:
        >>> inside(["0"], nn.Sequential(nn.ReLU()))
        ' in 0 (ReLU)'
    """
    return f" in {running[-1]} ({type(model.get_submodule(running[-1])).__name__})" if running else ""


@contextmanager
def _attributing(counter: FlopCounterMode, names: Mapping[nn.Module, str], flops: dict[str, int]) -> Iterator[None]:
    """Add to ``flops`` what the counter gained while each module ran.

    By module object, because the counter's own table is by class and child names: these collide between
    models and depend on the call order where a module is shared. Global hooks leave the model's alone.
    """
    running: list[tuple[nn.Module, int]] = []

    def enter(module: nn.Module, _: Any) -> None:
        if module in names:
            running.append((module, counter.get_total_flops()))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if module not in names:
            return
        _, before = running.pop()
        # a module that calls itself is counted by its outermost call
        if all(outer is not module for outer, _ in running):
            flops[names[module]] += counter.get_total_flops() - before

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_latency(
    model: nn.Module, example_inputs: ExampleInputs, batch_size: int, repeats: int = 10, warmup: int = 2
) -> float:
    """Median wall-clock time of a forward pass, in milliseconds a batch.

    Args:
        model: measured as it is, with ``torch.compile`` and other wrappers, in evaluation mode.
        example_inputs: as in :func:`count_macs`; its first example is repeated.
        batch_size: examples a batch.
        repeats: timed passes.
        warmup: passes before these that are not timed.

    Raises:
        TwoAxisError: a number is too small, or the model is on the meta device and cannot compute.

    Example:
        >>> measure_latency(nn.Linear(8, 4), torch.zeros(1, 8), batch_size=4) > 0
        True
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("repeats", repeats, 1),
        ("warmup", warmup, 0),
    ):
        if value < least:
            raise TwoAxisError(f"{name}: expected at least {least}, got {value}; raise it")
    inputs = _batch_of_first(example_inputs, batch_size)
    tensors = [*model.parameters(), *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))]
    if any(tensor.is_meta for tensor in tensors):
        raise TwoAxisError("expected a model and inputs that compute, got meta tensors; load them on a device")
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    times = []
    with fork_rng(), eval_mode(model):
        for _ in range(warmup + repeats):
            synchronize(devices)
            start = time.perf_counter()
            call(model, inputs)
            synchronize(devices)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[warmup:])


def synchronize(devices: set[torch.device]) -> None:
    """Wait until CUDA devices have done what they were given."""
    for device in devices:
        torch.cuda.synchronize(device)


def call_arguments(example_inputs: ExampleInputs) -> tuple[Any, ...] | dict[str, Any]:
    """Give the positional or the keyword arguments of a forward."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    # some models ask for the exact types, and so does Torch-Pruning
    return dict(example_inputs) if isinstance(example_inputs, Mapping) else tuple(example_inputs)


def call(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Run a model on what :data:`ExampleInputs` allows."""
    arguments = call_arguments(example_inputs)
    return model(**arguments) if isinstance(arguments, dict) else model(*arguments)


def all_tensors(value: Any) -> list[Tensor]:
    """Find the tensors of what a model returns: in tuples, lists, dicts and dataclasses, however nested.

    Example:
        >>> [t.item() for t in all_tensors({"a": torch.tensor(1), "b": (torch.tensor(2), None)})]
        [1, 2]
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, entry.name) for entry in dataclasses.fields(value)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [tensor for part in value for tensor in all_tensors(part)]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def count_examples(example_inputs: ExampleInputs) -> int:
    """Give the batch size: dimension 0 of the first tensor.

    Raises:
        TwoAxisError: there is no tensor, or no example in it.
    """
    first = next((leaf for leaf in tree_leaves(call_arguments(example_inputs)) if isinstance(leaf, Tensor)), None)
    if first is None or first.dim() == 0 or first.shape[0] == 0:
        got = "no tensor" if first is None else f"shape {list(first.shape)}"
        raise TwoAxisError(
            f"example_inputs: expected a first tensor [N, ...] with N >= 1 examples, got {got}; "
            "give for example torch.zeros(1, 3, 224, 224)"
        )
    return int(first.shape[0])


def _batch_of_first(example_inputs: ExampleInputs, batch_size: int) -> tuple[Any, ...] | dict[str, Any]:
    """Repeat the first example in every tensor that has the batch dimension."""
    given = count_examples(example_inputs)

    def repeat(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == given:
            return torch.cat([leaf[:1]] * batch_size)  # unlike repeat(), cat keeps channels_last
        return leaf

    repeated: tuple[Any, ...] | dict[str, Any] = tree_map(repeat, call_arguments(example_inputs))
    return repeated
