"""Sources of channels: ResNet, VGG and MobileNet shapes, concatenations, padding, norms; compared with single marks."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torchvision
from cases import conv_net
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from tp_twoaxis.dependency.channel_sources import channel_sources
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.models import build_model
from tp_twoaxis.runtime.layers import channel_layers, out_channels_of

IMAGE = torch.randn(1, 3, 32, 32)


def described(model, image=IMAGE):
    return {
        consumer: {source.layer: source.channels.tolist() for source in sources}
        for consumer, sources in channel_sources(model, image).items()
    }


def one_by_one(model, image):
    """Slow twin: mark one output channel of one layer after the other, in the network as it is."""
    found = {name: {} for name in channel_layers(model)}
    layers = channel_layers(model)
    for name, layer in layers.items():
        for channel in range(out_channels_of(layer)):

            def mark(_, __, output, channel=channel):
                output = output.clone()
                output[:, channel] = torch.nan
                return output

            def read(consumer, producer=name, channel=channel):
                def hook(_, inputs):
                    axis = (0, 2, 3) if inputs[0].ndim == 4 else (0,)
                    marked = inputs[0].isnan().any(dim=axis)
                    row = found[consumer].setdefault(producer, [-1] * len(marked))
                    for i in marked.nonzero()[:, 0].tolist():
                        row[i] = channel
                    return (inputs[0].nan_to_num(0.0),)

                return hook

            handles = [other.register_forward_pre_hook(read(key)) for key, other in layers.items()]
            handles.append(layer.register_forward_hook(mark))
            with torch.no_grad():
                model(image)
            for handle in handles:
                handle.remove()
    return {
        consumer: {producer: row for producer, row in rows.items() if max(row) >= 0} for consumer, rows in found.items()
    }


class Concatenated(nn.Module):
    """Two branches side by side, swapped halves, a padded shortcut, a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 1)
        self.both = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.wide = nn.Conv2d(12, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        y = torch.cat([F.relu(self.right(x)), F.hardswish(self.left(x))], 1)
        z = self.both(torch.cat([y[:, 3:], y[:, :3]], 1))
        z = F.pad(y, (0, 0, 0, 0, 3, 3)) + torch.cat([z, z], 1)
        return self.head(F.adaptive_avg_pool2d(F.max_pool2d(self.wide(z), 2), 1).flatten(1))


def test_concatenations_and_padding():
    net = Concatenated().eval()
    found = described(net)
    assert found["left"] == found["right"] == {}
    assert found["both"] == {"left": [1, 2, 3, -1, -1, 0], "right": [-1, -1, -1, 0, 1, -1]}
    assert found["wide"] == {
        "left": [-1] * 5 + [0, 1, 2, 3] + [-1] * 3,
        "right": [-1] * 3 + [0, 1] + [-1] * 7,
        "both": [0, 1, 2, 3, 4, 5] * 2,
    }
    assert found["head"] == {"wide": [0, 1, 2, 3, 4]}
    assert found == one_by_one(net, IMAGE)


@pytest.mark.parametrize("name", ["cifar_resnet20_option_a", "cifar_resnet20_conv_shortcut"])
def test_residual_sums_have_the_layers_before_them(name):
    net = build_model(name)
    found = described(net)
    assert list(found["layer1.1.conv1"]) == ["conv1", "layer1.0.conv2"]
    assert list(found["layer1.1.conv2"]) == ["layer1.1.conv1"]
    same = list(range(16))
    assert found["layer1.2.conv1"] == {"conv1": same, "layer1.0.conv2": same, "layer1.1.conv2": same}
    if name.endswith("option_a"):
        # the narrow stream is in the middle of the wide one
        assert found["layer2.1.conv1"]["conv1"] == [-1] * 8 + same + [-1] * 8
        assert found["layer2.1.conv1"]["layer2.0.conv2"] == list(range(32))
    else:
        assert list(found["layer2.1.conv1"]) == ["layer2.0.conv2", "layer2.0.downsample.0"]


def test_vgg_and_mobilenet():
    vgg = torchvision.models.vgg11_bn(num_classes=5)
    found = described(vgg)
    convolutions = [name for name, layer in vgg.named_modules() if isinstance(layer, nn.Conv2d)]
    for before, after in itertools.pairwise(convolutions):
        width = vgg.get_submodule(before).out_channels
        assert found[after] == {before: list(range(width))}
    mobile = torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=5)
    found = described(mobile)
    # expansion -> depthwise -> projection, and a shortcut around them
    assert list(found["features.3.conv.1.0"]) == ["features.3.conv.0.0"]
    assert list(found["features.3.conv.2"]) == ["features.3.conv.1.0"]
    assert list(found["features.4.conv.0.0"]) == ["features.2.conv.2", "features.3.conv.2"]


def test_norms_over_channels_and_linear_layers():
    net = nn.Sequential(*ConvNeXt([CNBlockConfig(8, 16, 2)], num_classes=5).features[:2])
    found = described(net)
    assert list(found["1.0.block.0"]) == ["0.0"]
    assert list(found["1.0.block.3"]) == ["1.0.block.0"]
    assert list(found["1.1.block.0"]) == ["0.0", "1.0.block.5"]


def test_the_model_comes_back_as_it_was():
    net = conv_net().train()
    before = copy.deepcopy(net.state_dict())
    found = described(net, torch.randn(2, 3, 8, 8))
    assert found["depthwise"] == {name: list(range(16)) for name in ("conv1", "conv2")}
    assert found["reduce"] == {"depthwise": list(range(16))}
    assert found["fc"] == {"reduce": [channel for channel in range(8) for _ in range(4)]}  # four positions of each
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(module.training and "forward" not in vars(module) for module in net.modules())


def test_a_model_that_does_not_run_is_refused():
    with pytest.raises(TwoAxisError, match=r"could not be followed.*any size, and pass NaN on"):
        channel_sources(conv_net(), torch.randn(1, 4, 8, 8))
