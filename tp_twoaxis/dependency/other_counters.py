"""Torch-Pruning's and thop's counts of multiply-adds, to compare with tables that were made by them.

Both write attributes, buffers and hooks into the model that they count, so Torch-Pruning counts a copy of it. Here the
model itself is counted and a snapshot takes back what was written: no tensor is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch_pruning as tp
from torch import nn

from tp_twoaxis.dependency.flops import ExampleInputs, call_arguments, count_examples
from tp_twoaxis.runtime.model_state import ModelSnapshot, fork_rng, unwrap


def tp_macs(model: nn.Module, example_inputs: ExampleInputs) -> int:
    """MACs of one example by Torch-Pruning's counter, for comparison with its tables.

    It counts biases, activations, normalisation and pooling too, and is wrong for pruned attention (-3.8 %
    on a ViT-B/16 of half the heads' width). The model runs once, and is afterwards as before.

    Example:
        >>> import torch
        >>> tp_macs(nn.Linear(8, 4), torch.zeros(2, 8))  # the bias is added once a batch: + 4 / 2
        34
    """
    with _lent(model) as lent:
        macs: float = tp.utils.count_ops_and_params(lent, call_arguments(example_inputs))[0]
    return round(macs)


def thop_macs(model: nn.Module, example_inputs: ExampleInputs) -> int | None:
    """MACs of one example by ultralytics-thop, else by thop, or None where neither is installed.

    Both install the module ``thop``, and the one that was installed last is imported. thop has not changed since 2022:
    it misses attention, and counts a transposed convolution as a convolution of the larger map. Ultralytics' fork
    counts both as they run. The model runs once, and is afterwards as before.

    Example:
        >>> import torch
        >>> thop_macs(nn.Linear(8, 4), torch.zeros(2, 8)) in (32, None)
        True
    """
    if find_spec("thop") is None:
        return None
    import thop

    arguments = call_arguments(example_inputs)
    with _lent(model) as lent:
        if isinstance(arguments, dict):  # it passes positional ones only
            lent.keywords, arguments = arguments, ()
        macs: float = thop.profile(lent, inputs=arguments, verbose=False)[0]
    return round(macs / count_examples(example_inputs))


class _Lent(nn.Module):
    """A model before a counter that would copy it first: a copy of this is the same object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.keywords: dict[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs, **self.keywords)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Lent:
        return self


@contextmanager
def _lent(model: nn.Module) -> Iterator[_Lent]:
    """Lend a model to a counter: afterwards it, and the random state, are as before."""
    model = unwrap(model)
    snapshot = ModelSnapshot(model)
    try:
        with fork_rng():
            yield _Lent(model)
    finally:
        snapshot.restore()
