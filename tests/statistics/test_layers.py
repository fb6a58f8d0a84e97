"""Which layers have channels, their weights by channel, their fingerprints, their outputs as rows."""

import numpy as np
import pytest
import reference
import torch
from cases import conv_net
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.statistics.layers import (
    channel_layers,
    channel_weight,
    channels_last_view,
    fingerprint,
    num_channels,
)

CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3),
    nn.Conv1d(4, 6, 2, groups=2),
    nn.Conv2d(4, 6, (3, 2)),
    nn.Conv2d(4, 8, 3, groups=4),
    nn.Conv2d(4, 4, 3, groups=4),
    nn.Conv3d(2, 4, 2, groups=2),
    nn.ConvTranspose1d(4, 6, 3),
    nn.ConvTranspose1d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(4, 6, (3, 2)),
    nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2),
    nn.ConvTranspose2d(4, 4, 2, groups=4),
    nn.ConvTranspose3d(4, 6, 2, groups=2),
]


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 3)


# which layers


def test_all_layers_in_the_models_order():
    assert list(channel_layers(conv_net())) == ["conv1", "conv2", "depthwise", "reduce", "fc"]


def test_attention_is_listed_and_its_output_projection_is_not():
    net = nn.Sequential(Attentive(), nn.Linear(3, 3))
    assert list(channel_layers(net)) == ["0.attention", "0.fc", "1"]
    assert channel_layers(net)["0.attention"] is net[0].attention
    with pytest.raises(TwoAxisError, match="writes no channels of its own"):
        channel_layers(net, ["0.attention.out_proj"])


def test_names_choose_and_the_models_order_stays():
    assert list(channel_layers(conv_net(), ["fc", "conv1"])) == ["conv1", "fc"]
    assert list(channel_layers(conv_net(), iter(["fc"]))) == ["fc"]


def test_a_layer_may_be_the_model_itself():
    assert list(channel_layers(nn.Linear(2, 3))) == [""]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("conv1", r"expected a list of layer names, got the string 'conv1'; pass \['conv1'\]"),
        (["conv3"], "the model has no layer 'conv3'; near it: conv"),
        (["conv1", "zzz"], "the model has no layer 'zzz'; near it: conv1, conv2, depthwise"),
        (["bn1"], "'bn1' is a BatchNorm2d, which writes no channels of its own; choose .* such as conv1"),
        ([], "expected at least one layer name, got none"),
    ],
)
def test_names_that_do_not_fit(names, message):
    with pytest.raises(TwoAxisError, match=message):
        channel_layers(conv_net(), names)


# weights


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_channel_weight_is_what_one_hot_inputs_show(layer):
    """Feed every input number alone: what output channel k answers are its weights."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    # one position in, or one position out: every answer is one weight
    size = [1] * len(layer.kernel_size) if transposed else layer.kernel_size
    inputs = torch.eye(layer.in_channels * int(np.prod(size))).view(-1, layer.in_channels, *size)
    with torch.no_grad():
        answers = (layer(inputs) - layer.bias.view(-1, *[1] * len(size))).movedim(1, 0).reshape(layer.out_channels, -1)
    weight = channel_weight(layer)
    assert weight.shape == (num_channels(layer), layer.in_channels // layer.groups * int(np.prod(layer.kernel_size)))
    torch.testing.assert_close(answers.sort(1).values.square().sum(1), weight.square().sum(1))
    # inputs of other groups answer zero; what is left comes in the order (input, tap)
    own = answers.view(layer.out_channels, layer.groups, -1)
    group = torch.arange(layer.out_channels) // (layer.out_channels // layer.groups)
    torch.testing.assert_close(own[torch.arange(layer.out_channels), group], weight)


def test_channel_weight_of_linear_and_attention():
    linear, attention = nn.Linear(3, 5), nn.MultiheadAttention(8, 2)
    assert torch.equal(channel_weight(linear), linear.weight)
    assert torch.equal(channel_weight(attention), attention.out_proj.weight)
    assert (num_channels(linear), num_channels(attention)) == (5, 8)
    assert not channel_weight(linear).requires_grad


# fingerprints


def test_fingerprint_notices_a_change_of_any_parameter():
    layer = nn.Conv2d(4, 6, 3)
    before = fingerprint(layer)
    for parameter in (layer.weight, layer.bias):
        with torch.no_grad():
            parameter.view(-1)[-1].mul_(1 + 1e-6)
        assert fingerprint(layer) != before
        before = fingerprint(layer)
    assert fingerprint(layer.double()) != before
    attention = nn.MultiheadAttention(8, 2)
    before = fingerprint(attention)
    with torch.no_grad():
        attention.in_proj_weight[0, 0] += 1
    assert fingerprint(attention) != before


def test_fingerprint_covers_the_shape_and_tells_zeros_apart():
    same_bytes = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False), nn.Linear(12, 1, bias=False)
    for layer in same_bytes:
        nn.init.zeros_(layer.weight)
    assert len({fingerprint(layer) for layer in same_bytes}) == 3
    half, brain = nn.Linear(4, 4).half(), nn.Linear(4, 4).bfloat16()
    for layer in (half, brain):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    assert fingerprint(half) != fingerprint(brain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fingerprint_ignores_memory_format_gradient_and_mode(dtype):
    layer = nn.Conv2d(4, 6, 3).to(dtype)
    before = fingerprint(layer)
    assert len(before) == 32
    layer.to(memory_format=torch.channels_last).eval()
    layer.weight.grad = torch.ones_like(layer.weight)
    layer.requires_grad_(False)
    assert fingerprint(layer) == before
    again = nn.Conv2d(4, 6, 3).to(dtype)
    again.load_state_dict(layer.state_dict())
    assert fingerprint(again) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fingerprint_ignores_the_device():
    layer = nn.Conv2d(4, 6, 3)
    before = fingerprint(layer)
    assert fingerprint(layer.cuda()) == before


# outputs


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 1), (2, 3, 5)),
        (nn.Conv2d(3, 4, 1), (2, 3, 5, 6)),
        (nn.Conv3d(3, 4, 1), (2, 3, 2, 3, 4)),
        (nn.ConvTranspose2d(3, 4, 2), (2, 3, 5, 6)),
        (nn.Linear(3, 4), (2, 3)),
        (nn.Linear(3, 4), (2, 5, 3)),
        (nn.Linear(3, 4), (2, 5, 6, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_view_is_the_rows_without_a_copy(layer, shape, channels_last):
    x = torch.randn(shape)
    if channels_last and x.ndim == 4:
        x, layer = x.to(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)
    with torch.no_grad():
        output = layer(x)
    view = channels_last_view(output, layer, 2, "layer")
    np.testing.assert_array_equal(view.numpy(), reference.rows_of(output.double().numpy(), layer))
    assert view.data_ptr() == output.data_ptr()


@pytest.mark.parametrize("batch_first", [True, False])
def test_view_of_attention(batch_first):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    output = torch.randn((2, 5, 8) if batch_first else (5, 2, 8))
    view = channels_last_view(output, attention, 2, "attention")
    np.testing.assert_array_equal(view.numpy(), reference.rows_of(output.double().numpy(), attention))


def test_view_puts_windows_of_an_image_together():
    output = torch.arange(6 * 2 * 3.0).view(6, 2, 3)  # two images, three windows each
    view = channels_last_view(output, nn.Linear(3, 3), 2, "layer")
    assert view.shape == (2, 6, 3)
    assert torch.equal(view[1, :2], output[3])


def test_view_of_one_unbatched_image():
    assert channels_last_view(torch.zeros(4, 5, 6), nn.Conv2d(3, 4, 1), 1, "conv").shape == (1, 30, 4)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(3, 4), (4,)), (nn.Linear(3, 4), (5, 4)), (nn.Conv2d(3, 4, 1), (3, 4, 2, 2))]
)
def test_view_refuses_another_leading_dimension(layer, shape):
    with pytest.raises(TwoAxisError, match=r"stem: expected .* the batch \(2 images\), got .*leave the layer out"):
        channels_last_view(torch.zeros(shape), layer, 2, "stem")
