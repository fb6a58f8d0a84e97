"""Which layers have channels, their widths, axes and weights, their outputs as rows."""

import numpy as np
import pytest
import reference
import torch
from cases import conv_net
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.runtime.layers import (
    blocks_of,
    broadcast_channels,
    channel_axis,
    channel_layers,
    channel_weight,
    flatten_positions,
    in_channels_of,
    out_channels_of,
    select_channels,
    weight_blocks,
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


def transposed(layer):
    return isinstance(layer, nn.modules.conv._ConvTransposeNd)


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
    # one position in, or one position out: every answer is one weight
    size = [1] * len(layer.kernel_size) if transposed(layer) else layer.kernel_size
    inputs = torch.eye(layer.in_channels * int(np.prod(size))).view(-1, layer.in_channels, *size)
    with torch.no_grad():
        answers = (layer(inputs) - layer.bias.view(-1, *[1] * len(size))).movedim(1, 0).reshape(layer.out_channels, -1)
    weight = channel_weight(layer)
    assert weight.shape == (out_channels_of(layer), layer.in_channels // layer.groups * int(np.prod(layer.kernel_size)))
    torch.testing.assert_close(answers.sort(1).values.square().sum(1), weight.square().sum(1))
    # inputs of other groups answer zero; what is left comes in the order (input, tap)
    own = answers.view(layer.out_channels, layer.groups, -1)
    group = torch.arange(layer.out_channels) // (layer.out_channels // layer.groups)
    torch.testing.assert_close(own[torch.arange(layer.out_channels), group], weight)


def test_channel_weight_of_linear_and_attention():
    linear, attention = nn.Linear(3, 5), nn.MultiheadAttention(8, 2)
    assert torch.equal(channel_weight(linear), linear.weight)
    assert torch.equal(channel_weight(attention), attention.out_proj.weight)
    assert (out_channels_of(linear), out_channels_of(attention)) == (5, 8)
    assert not channel_weight(linear).requires_grad


# widths, axes, blocks


def inputs_of(layer, images=2):
    """Batches that the layer takes, a single image of a convolution among them."""
    if isinstance(layer, nn.MultiheadAttention):
        return [torch.randn(images, 5, layer.embed_dim)]
    if isinstance(layer, nn.Linear):
        return [torch.randn(*lead, layer.in_features) for lead in ((images,), (images, 5), (images, 5, 6))]
    shape = (layer.in_channels, *[4, 5, 6][: len(layer.kernel_size)])
    return [torch.randn(images, *shape), torch.randn(shape)]


def run(layer, x):
    with torch.no_grad():
        return layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)


OTHERS = [nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.MultiheadAttention(8, 2, batch_first=True)]


@pytest.mark.parametrize("layer", [*CONVOLUTIONS, *OTHERS], ids=str)
def test_widths_are_the_sizes_of_the_channel_axis(layer):
    for x in inputs_of(layer):
        output = run(layer, x)
        assert x.shape[channel_axis(layer)] == in_channels_of(layer)
        assert output.shape[channel_axis(layer)] == out_channels_of(layer)


@pytest.mark.parametrize("layer", [*CONVOLUTIONS, *OTHERS], ids=str)
def test_selected_channels_are_those_of_each_position(layer):
    for x in inputs_of(layer):
        axis = channel_axis(layer)
        output = run(layer, x)
        for tensor in (x, output, *(t.movedim(axis, -1).contiguous().movedim(-1, axis) for t in (x, output))):
            kept = torch.arange(tensor.shape[axis]) % 3 != 1
            selected = select_channels(tensor, layer, kept)
            expected = np.compress(kept.numpy(), tensor.numpy(), axis=axis)
            np.testing.assert_array_equal(selected.numpy(), expected)
            assert select_channels(tensor, layer, torch.ones_like(kept)) is tensor


@pytest.mark.parametrize("layer", [*CONVOLUTIONS, *OTHERS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_broadcast_channels_multiply_channel_by_channel(layer, dtype):
    for x in inputs_of(layer):
        for tensor in (x.to(dtype), run(layer, x).to(dtype)):
            axis = channel_axis(layer)
            factors = torch.arange(1.0, tensor.shape[axis] + 1, dtype=torch.float64)
            product = tensor * broadcast_channels(factors, tensor, layer)
            assert (product.shape, product.dtype) == (tensor.shape, dtype)
            for channel, factor in enumerate(factors.tolist()):
                one, other = (t.select(axis, channel) for t in (product, tensor))
                assert torch.equal(one, other * factor)


@pytest.mark.parametrize("layer", [layer for layer in CONVOLUTIONS if not transposed(layer)], ids=str)
def test_weight_blocks_of_convolutions_are_their_groups(layer):
    """One position out: every block maps the inputs of its group to its outputs."""
    x = torch.randn(2, layer.in_channels, *layer.kernel_size)
    weight = weight_blocks(layer)
    blocks, outputs, inputs, taps = weight.shape
    assert (blocks, outputs * blocks, inputs * blocks) == (layer.groups, layer.out_channels, layer.in_channels)
    assert taps == int(np.prod(layer.kernel_size))
    assert blocks == blocks_of(layer)
    answers = torch.einsum("boit,nbit->nbo", weight, x.view(2, blocks, inputs, taps)).flatten(1) + layer.bias
    torch.testing.assert_close(answers.detach(), run(layer, x).flatten(1))
    assert not weight.requires_grad
    assert weight.data_ptr() == layer.weight.data_ptr()


def test_weight_blocks_of_a_linear_layer():
    layer = nn.Linear(4, 6)
    assert torch.equal(weight_blocks(layer), layer.weight[None, :, :, None])
    assert blocks_of(layer) == blocks_of(nn.MultiheadAttention(8, 2)) == 1


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
    view = flatten_positions(output, layer, 2, "layer")
    np.testing.assert_array_equal(view.numpy(), reference.rows_of(output.double().numpy(), layer))
    assert view.data_ptr() == output.data_ptr()


@pytest.mark.parametrize("batch_first", [True, False])
def test_view_of_attention(batch_first):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    output = torch.randn((2, 5, 8) if batch_first else (5, 2, 8))
    view = flatten_positions(output, attention, 2, "attention")
    np.testing.assert_array_equal(view.numpy(), reference.rows_of(output.double().numpy(), attention))


def test_view_puts_windows_of_an_image_together():
    output = torch.arange(6 * 2 * 3.0).view(6, 2, 3)  # two images, three windows each
    view = flatten_positions(output, nn.Linear(3, 3), 2, "layer")
    assert view.shape == (2, 6, 3)
    assert torch.equal(view[1, :2], output[3])


def test_view_of_one_unbatched_image():
    assert flatten_positions(torch.zeros(4, 5, 6), nn.Conv2d(3, 4, 1), 1, "conv").shape == (1, 30, 4)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(3, 4), (4,)), (nn.Linear(3, 4), (5, 4)), (nn.Conv2d(3, 4, 1), (3, 4, 2, 2))]
)
def test_view_refuses_another_leading_dimension(layer, shape):
    with pytest.raises(TwoAxisError, match=r"stem: expected .* the batch \(2 images\), got .*leave the layer out"):
        flatten_positions(torch.zeros(shape), layer, 2, "stem")


@pytest.mark.parametrize("layer", [layer for layer in CONVOLUTIONS if transposed(layer)], ids=str)
def test_weight_blocks_of_transposed_convolutions_are_their_groups(layer):
    """One position in: every block maps the inputs of its group to its outputs, one position for each tap."""
    layer.stride = (1,) * len(layer.kernel_size)
    x = torch.randn(2, layer.in_channels, *[1] * len(layer.kernel_size))
    weight = weight_blocks(layer)
    blocks, outputs, inputs, _ = weight.shape
    assert (blocks, outputs * blocks, inputs * blocks) == (layer.groups, layer.out_channels, layer.in_channels)
    answers = torch.einsum("boit,nbi->nbot", weight, x.view(2, blocks, inputs)).flatten(1, 2) + layer.bias[:, None]
    torch.testing.assert_close(answers.detach(), run(layer, x).flatten(2))


def test_weight_blocks_of_attention_are_those_of_its_output_projection():
    layer = nn.MultiheadAttention(8, 2)
    assert torch.equal(weight_blocks(layer), layer.out_proj.weight[None, :, :, None])
