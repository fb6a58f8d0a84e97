"""Shapes by attributes are those that torch builds, and a stale attribute is found."""

import pytest
import torch
from torch import nn

from tp_twoaxis.runtime.tensor_shapes import described_shapes, misshapen

LAYERS = [
    nn.Conv1d(4, 6, 3),
    nn.Conv2d(4, 6, (3, 5), groups=2, bias=False),
    nn.Conv3d(4, 4, 1, groups=4),
    nn.ConvTranspose2d(4, 6, 3, groups=2),
    nn.Linear(5, 3),
    nn.BatchNorm2d(7),
    nn.BatchNorm1d(7, affine=False),
    nn.InstanceNorm2d(5, affine=True, track_running_stats=True),
    nn.GroupNorm(2, 6),
    nn.LayerNorm([3, 4]),
    nn.RMSNorm(5),
    nn.Embedding(11, 4),
    nn.EmbeddingBag(11, 4),
    nn.PReLU(),
    nn.PReLU(6),
    nn.MultiheadAttention(8, 2, add_bias_kv=True),
    nn.MultiheadAttention(8, 2, kdim=5, vdim=3, bias=False),
    nn.RNN(3, 4, num_layers=2),
    nn.GRU(3, 4, bidirectional=True, num_layers=2),
    nn.LSTM(3, 4, bidirectional=True, num_layers=2, proj_size=2),
    nn.LSTM(3, 4, bias=False),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_tensor_of_torch_s_layers_is_described(layer):
    own = {**layer._parameters, **layer._buffers}
    tensors = {name: tuple(t.shape) for name, t in own.items() if t is not None and name != "num_batches_tracked"}
    assert tensors.items() <= described_shapes(layer).items()
    assert misshapen(layer) is None


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_stale_width_is_found(layer):
    stale = type("Stale", (type(layer),), {})
    for name in ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim", "embed_dim",
                 "hidden_size", "num_parameters"):  # fmt: skip
        if name in vars(layer) and any(t is not None for t in {**layer._parameters, **layer._buffers}.values()):
            changed = stale.__new__(stale)
            changed.__dict__.update(vars(layer))
            setattr(changed, name, getattr(layer, name) + 1)
            assert "of shape" in misshapen(changed)


def test_attributes_that_describe_nothing():
    layer = nn.Conv2d(4, 4, 1)
    layer.groups = 0
    assert misshapen(layer).startswith("attributes that describe a Conv2d")
    layer = nn.LayerNorm(4)
    layer.normalized_shape = 4
    assert misshapen(layer).startswith("attributes that describe a LayerNorm")


def test_other_modules_are_not_described():
    assert described_shapes(nn.ReLU()) == {}
    assert misshapen(nn.ParameterList([torch.zeros(3)])) is None
    assert misshapen(nn.LazyLinear(3)) is None
