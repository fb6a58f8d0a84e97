"""How far a pruned network's features and outputs are from the dense network's, as a loss to train by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tp_twoaxis.dependency.flops import all_tensors
from tp_twoaxis.repair.repair_task import RepairTask
from tp_twoaxis.runtime.batches import Batch
from tp_twoaxis.runtime.forward import ForwardPass, forward_pass
from tp_twoaxis.runtime.inputs import Inputs
from tp_twoaxis.runtime.kernels import first_input
from tp_twoaxis.runtime.layers import channel_axis, channel_layers, select_channels

# weight of the class probabilities' divergence beside the mean relative error of the features, and its temperature
OUTPUT_WEIGHT, TEMPERATURE = 0.1, 2.0
_OUTPUT = ""  # stands for a layer's name; no layer has it


class _Call(NamedTuple):
    """What a layer reads at one of its calls in a pass, or one of the model's outputs."""

    layer: str
    number: int


class _Seen(NamedTuple):
    """A tensor, and its version when it was seen: what writes into it in place raises that."""

    tensor: Tensor
    version: int


class _Pair(NamedTuple):
    """A tensor of the network and its counterpart in the dense one, and the dimension of their channels."""

    own: Tensor
    dense: Tensor
    axis: int


@contextmanager
def feature_distance(task: RepairTask) -> Iterator[FeatureDistance]:
    """Hook both networks of a repair for the time of a block; see :class:`FeatureDistance`."""
    with (
        forward_pass(task.dense, (), what="distill") as teacher,
        forward_pass(task.network, (), what="distill", gradients=True) as student,
    ):
        yield FeatureDistance(task, teacher, student)


class FeatureDistance:
    """The loss of training without labels, made by :func:`feature_distance`.

    The mean over features of ``sum_c E (x_c - d_c)^2 / sum_c Var d_c``, where x is what a layer reads in the network, d
    what it reads in the dense network at the channels that stay, and expectation and variance go over images and
    positions; the model's outputs are features too. A tensor that several layers read counts once. For outputs that are
    class logits, [n, K], a tenth of the Kullback-Leibler divergence of their probabilities at temperature 2 comes on
    top (Hinton et al. 2015). Call it with inputs for the loss of a batch, with gradients.
    """

    def __init__(self, task: RepairTask, teacher: ForwardPass, student: ForwardPass) -> None:
        assert task.images is not None
        self._images = task.images
        self._teacher, self._student = teacher, student
        self._dense: dict[_Call, _Seen] = {}
        self._own: dict[_Call, _Seen] = {}
        self._power: dict[_Call, float] = {}
        self._layers = channel_layers(task.dense)
        self._kept = {name: ~task.masks[name].inputs for name in self._layers}
        for name, layer in channel_layers(task.network).items():
            teacher.hook(self._layers[name], _collect(self._dense, name), before=True, with_kwargs=True)
            student.hook(layer, _collect(self._own, name), before=True, with_kwargs=True)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Run a batch through both networks; returns a scalar."""
        pairs = self._pairs(inputs)
        if not self._power:
            self._power = _power(pairs)
        return self._loss(pairs)

    @torch.no_grad()
    def held_out(self) -> float | None:
        """The loss on the images that are held out; None if there are none.

        The first call fixes the variances that errors are relative to.
        """
        batches = self._images.held_out_batches
        if batches and not self._power:
            powers = [_power(self._pairs(batch)) for batch in batches]
            self._power = {call: sum(power[call] for power in powers) / len(powers) for call in powers[0]}
        losses = [float(self(batch)) * len(batch) for batch in batches]
        return sum(losses) / sum(map(len, batches)) if batches else None

    def _pairs(self, inputs: Inputs) -> dict[_Call, _Pair]:
        """Run both networks, and match what their layers read and what they return."""
        batch, pairs = Batch(0, inputs, None), dict[_Call, _Pair]()
        self._dense.clear()
        self._own.clear()
        with torch.no_grad():
            wanted = self._teacher(batch)
        returned = self._student(batch)
        taken: set[int] = set()
        for call, (dense, version) in self._dense.items():
            own = self._own[call].tensor
            if id(dense) in taken or dense._version != version or own._version != self._own[call].version:
                continue
            taken.add(id(dense))
            layer = self._layers[call.layer]
            pairs[call] = _Pair(own, select_channels(dense, layer, self._kept[call.layer]), channel_axis(layer))
        for number, (own, dense) in enumerate(zip(all_tensors(returned), all_tensors(wanted), strict=True)):
            pairs[_Call(_OUTPUT, number)] = _Pair(own, dense, min(1, own.ndim - 1))
        return {call: pair for call, pair in pairs.items() if _comparable(pair)}

    def _loss(self, pairs: dict[_Call, _Pair]) -> Tensor:
        errors, divergences = [], []
        for call, (own, dense, axis) in pairs.items():
            if power := self._power.get(call, 0.0):
                errors.append((own - dense).square().sum() * (own.shape[axis] / (own.numel() * power)))
            if call.layer == _OUTPUT and own.ndim == 2 and own.shape[1] > 1:
                mine, theirs = ((tensor / TEMPERATURE).log_softmax(1) for tensor in (own, dense))
                divergences.append(F.kl_div(mine, theirs, log_target=True, reduction="batchmean"))
        return torch.stack(errors).mean() + OUTPUT_WEIGHT * sum(divergences)


def _collect(into: dict[_Call, _Seen], name: str) -> Callable[..., None]:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x, number = first_input(inputs, named), 0
        while _Call(name, number) in into:
            number += 1
        into[_Call(name, number)] = _Seen(x, x._version)

    return hook


def _comparable(pair: _Pair) -> bool:
    own, dense, _ = pair
    return own.ndim > 0 and own.is_floating_point() and own.shape == dense.shape and dense.numel() > 0


def _power(pairs: dict[_Call, _Pair]) -> dict[_Call, float]:
    """Sum each dense tensor's variances over its channels; 0 where it is constant."""
    powers = {}
    for call, (_, dense, axis) in pairs.items():
        rows = dense.movedim(axis, -1).flatten(0, -2).double()
        powers[call] = float(rows.var(0, correction=0).sum())
    return powers
