"""A clock that layers move on: what a forward pass takes is a function of the layers' widths, not of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tp_twoaxis.dependency import latency


def blocks_of_eight(width: int) -> float:
    """A kernel that works on eight channels at a time, and half as fast again where some are left over."""
    return 8 * -(-width // 8) * (1.5 if width % 8 else 1.0)


class FakeClock:
    """Seconds that pass while layers run.

    Args:
        width_cost: of either side of a layer.
        overhead: seconds of each call of a module that is no layer and has no layers in it.
        speed: seconds of a second: called at every layer, so that a machine may slow down or be unsteady.
    """

    def __init__(self, width_cost=blocks_of_eight, overhead=0.0, speed=lambda: 1.0):
        self.time, self.width_cost, self.overhead, self.speed = 0.0, width_cost, overhead, speed

    def now(self, devices: set[torch.device]) -> float:
        return self.time

    def seconds(self, layer: nn.Module, outputs: torch.Tensor) -> float:
        if isinstance(layer, nn.Conv2d):
            positions, taps = outputs[0, 0].numel(), layer.weight[0, 0].numel()
            read = 1.0 if layer.groups > 1 else self.width_cost(layer.in_channels)
            return 1e-7 * len(outputs) * positions * taps * self.width_cost(layer.out_channels) * read
        if isinstance(layer, nn.Linear):
            return 1e-7 * self.width_cost(layer.in_features) * self.width_cost(layer.out_features)
        return 0.0 if any(True for _ in layer.children()) else self.overhead

    def advance(self, layer, _, outputs):
        self.time += self.speed() * self.seconds(layer, outputs)


@contextmanager
def fake_time(monkeypatch, **options) -> Iterator[FakeClock]:
    """Let latencies be read from a clock that layers move on."""
    clock = FakeClock(**options)
    monkeypatch.setattr(latency, "clock", clock.now)
    handle = register_module_forward_hook(clock.advance)
    try:
        yield clock
    finally:
        handle.remove()


def chain(*widths: int) -> nn.Sequential:
    """Convolutions of these widths with rectifiers, and a head of eight classes: [n, 8, 6, 6] -> [n, 8]."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for read, written in zip((8, *widths), widths, strict=False):
        layers += [nn.Conv2d(read, written, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 8)).eval()


CHAIN_INPUT = torch.zeros(2, 8, 6, 6)


def true_seconds(clock: FakeClock, network: nn.Module, inputs: torch.Tensor = CHAIN_INPUT) -> float:
    """Run a network once and say what the clock says of it."""
    before = clock.time
    with torch.no_grad():
        network(inputs)
    return clock.time - before
