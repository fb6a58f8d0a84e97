"""What an error in pruning must not change, and inputs that provoke one."""

from __future__ import annotations

import torch
from torch import nn


def everything(net):
    """Whatever an error must not change."""
    return {
        "parameters": {n: (id(p), p.requires_grad, p.detach().clone()) for n, p in net.named_parameters()},
        "buffers": {n: (id(b), b.clone()) for n, b in net.named_buffers()},
        "training": [m.training for m in net.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()],
        "attributes": {
            n: {k: v for k, v in vars(m).items() if isinstance(v, (int, float, str, tuple))}
            for n, m in net.named_modules()
        },
        "rng": torch.get_rng_state(),
    }


def assert_unchanged(net, before):
    after = everything(net)
    for key in ("training", "hooks", "attributes"):
        assert after[key] == before[key]
    for key in ("parameters", "buffers"):
        assert list(after[key]) == list(before[key])
        for name, (*flags, value) in after[key].items():
            *old, expected = before[key][name]
            assert flags == old
            assert torch.equal(value, expected)
    assert torch.equal(after["rng"], before["rng"])


class LateFailure:
    """A loader that breaks after some batches."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        yield self.data[0]
        raise OSError("disk gone")


class Gram(nn.Module):
    """A product of features with themselves: no layer's MACs, so the cost model takes it for a constant."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.fc = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1), nn.Linear(64, 5)

    def forward(self, x):
        x = self.mix(self.conv(x).relu()).flatten(2)
        return self.fc((x @ (x.transpose(1, 2) @ x)).mean(2))
