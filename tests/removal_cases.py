"""Networks of many families, small, with what must come of them when channels are removed.

``right``: channels leave, and the outputs are those of the oracle. ``runs``: channels leave and the shapes stay, but an
operation over channels that is no layer (a mean, attention's scale) makes the oracle's outputs others. ``whole``: no
channel may leave, with a note. ``refused``: an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import timm
import torch
import torchvision.models as tv
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

timm_model = timm.create_model


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and what must come of it.

    Attributes:
        make: builds the network.
        shapes: of its inputs, or one shape.
        outcome: see above.
        note: part of a note that must be there, or of the error.
        clean: whether there must be no note.
        flops: share of the MACs to keep.
    """

    make: object
    shapes: tuple = (2, 3, 16, 16)
    outcome: str = "right"
    note: str = ""
    clean: bool = False
    flops: float = 0.75
    options: dict = field(default_factory=dict)

    def inputs(self):
        generator = torch.Generator().manual_seed(1)

        def draw(shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        if isinstance(self.shapes, dict):
            return {name: draw(shape) for name, shape in self.shapes.items()}
        several = isinstance(self.shapes[0], tuple)
        return tuple(map(draw, self.shapes)) if several else draw(self.shapes)

    def network(self):
        """Build it with weights, statistics and scales that leave no channel silent."""
        torch.manual_seed(0)
        net = self.make().double().eval()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
            for module in net.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean.uniform_(-0.2, 0.2)
                    module.running_var.uniform_(0.5, 1.5)
        return net


def block(i, o, k=3, s=1, act=nn.ReLU):
    return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), act())


class Net(nn.Module):
    """A network given by its layers and its forward."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._own_forward = forward

    def forward(self, *args, **kwargs):
        return self._own_forward(self, *args, **kwargs)


def pooled(x):
    return x.mean((2, 3))


# outputs that are read again
def embedding():
    def forward(net, x):
        feature = pooled(net.mix(net.body(x)))
        return {"embedding": feature, "scores": net.head(feature)}

    return Net(forward, body=block(3, 16), mix=block(16, 24), head=nn.Linear(24, 5))


def cascade():
    def forward(net, x):
        x = pooled(net.body(x))
        first = net.first(x)
        second = net.second(torch.cat([x, first], 1))
        return first, net.third(torch.cat([first, second], 1)), second

    return Net(
        forward, body=block(3, 24), first=nn.Linear(24, 6), second=nn.Linear(30, 9), third=nn.Linear(15, 12)
    )  # fmt: skip


class Pose(nn.Module):
    """Refinement stages that read their predecessors' heatmaps and fields; those of every stage are outputs."""

    def __init__(self, maps=7, width=16, stages=3):
        super().__init__()
        self.trunk = nn.Sequential(block(3, width), block(width, width))
        self.stages = nn.ModuleList(
            nn.Sequential(block(width + (maps if i else 0), 20), nn.Conv2d(20, maps, 1)) for i in range(stages)
        )

    def forward(self, x):
        x, maps = self.trunk(x), []
        for stage in self.stages:
            maps.append(stage(torch.cat([x, maps[-1]], 1) if maps else x))
        return maps


class Pyramid(nn.Module):
    """Lateral and top-down sums; every level is an output and goes through one shared head."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.c3 = block(3, 12), block(12, 20, s=2), block(20, 28, s=2)
        self.laterals = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in (12, 20, 28))
        self.head = nn.Sequential(block(16, 18), nn.Conv2d(18, 6, 1))

    def forward(self, x):
        levels = [self.c1(x)]
        for stage in (self.c2, self.c3):
            levels.append(stage(levels[-1]))
        top, out = None, []
        for lateral, level in zip(list(self.laterals)[::-1], levels[::-1], strict=True):
            here = lateral(level)
            top = here if top is None else here + F.interpolate(top, size=here.shape[-2:], mode="nearest")
            out.append(self.head(top))
        return out


# recurrent layers
def sequence_reader(kind, height):
    """Text from images: a column of a map is a step; with height 1 a channel is an input of the recurrent layer."""

    def forward(net, x):
        x = net.b(net.a(x))  # [n, 12, height, w]
        x = x.squeeze(2).transpose(1, 2) if height == 1 else x.permute(0, 3, 1, 2).flatten(2)
        return net.out(net.rnn(x)[0])

    return Net(
        forward,
        a=block(1, 16, s=(2, 1)),
        b=nn.Sequential(nn.Conv2d(16, 12, (4 // height, 1), (4 // height, 1)), nn.ReLU()),
        rnn=kind(12 * height, 10, batch_first=True, bidirectional=True),
        out=nn.Linear(20, 6),
    )


def cells():
    def forward(net, x):
        state = torch.zeros(len(x), 7, dtype=x.dtype)
        for column in net.a(x).mean(2).unbind(2):
            state = net.cell(column, state)
        return net.out(state)

    return Net(forward, a=block(1, 16), cell=nn.GRUCell(16, 7), out=nn.Linear(7, 4))


# vectors that become maps, and halves that become one
class Generator(nn.Module):
    """Noise to image: a vector is viewed as a map of 12 channels; reads: the width from itself or from the code."""

    def __init__(self, order="channels first", reads="itself"):
        super().__init__()
        self.order, self.reads = order, reads
        self.noise, self.project = nn.Linear(6, 20), nn.Linear(20, 12 * 4)
        self.up = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.ConvTranspose2d(12, 18, 4, 2, 1, bias=False))
        self.image = nn.Sequential(nn.BatchNorm2d(18), nn.ReLU(), nn.ConvTranspose2d(18, 3, 4, 2, 1), nn.Tanh())

    def forward(self, z):
        x = self.project(self.noise(z).relu())
        if self.order == "channels last":
            x = x.view(len(x), 2, 2, -1).permute(0, 3, 1, 2)
        else:
            x = x.view(len(x), -1 if self.reads == "itself" else 12, 2, 2)
        return self.image(self.up(x))


def gated(halves):
    """A gated unit: one half of a layer's channels times the other."""

    def forward(net, x):
        a, b = halves(net.both(net.stem(x)))
        return net.out(pooled(net.next(a * b.sigmoid())))

    return Net(
        forward, stem=block(3, 12), both=nn.Conv2d(12, 32, 3, padding=1), next=nn.Conv2d(16, 10, 1),
        out=nn.Linear(10, 5),
    )  # fmt: skip


class Stacked(nn.Module):
    """YOLO's block: halves of a convolution, one through bottlenecks, all stages concatenated."""

    def __init__(self, how, width=16):
        super().__init__()
        self.how, self.half = how, width // 2
        self.stem, self.enter = block(3, 12, act=nn.SiLU), block(12, width, 1, act=nn.SiLU)
        self.inner = nn.ModuleList(block(self.half, self.half, act=nn.SiLU) for _ in range(2))
        self.leave, self.box = block(self.half * 4, 20, 1, act=nn.SiLU), nn.Conv2d(20, 7, 1)

    def forward(self, x):
        x = self.enter(self.stem(x))
        parts = list(x.chunk(2, 1) if self.how == "chunk" else x.split((self.half, self.half), 1))
        for inner in self.inner:
            parts.append(inner(parts[-1]))
        return self.box(self.leave(torch.cat(parts, 1)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.d1, self.d2, self.d3 = block(3, 8), block(8, 16, s=2), block(16, 24, s=2)
        self.u2, self.u1 = nn.ConvTranspose2d(24, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.m2, self.m1, self.out = block(32, 16), block(16, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        a = self.d1(x)
        b = self.d2(a)
        x = self.m2(torch.cat([self.u2(self.d3(b)), b], 1))
        return self.out(self.m1(torch.cat([a, self.u1(x)], 1)))


# weights that are not those that are stored
class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1), mode="replicate"))


class FanIn(nn.Conv2d):
    """The gain of equalised learning rates: weights are divided by the root of the fan-in as it is now."""

    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight[0].numel() ** 0.5, self.bias, self.stride, self.padding)


def convolutions(wrap, kind=nn.Conv2d, padding=1):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), wrap(kind(16, 20, 3, padding=padding)), nn.ReLU(), nn.Conv2d(20, 12, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def old_weight_norm(layer):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


# inputs, training heads, gates, parameters along channels
def two_inputs(by_name=False):
    def forward(net, image, other):
        return net.out(pooled(net.body(image)) * pooled(net.body(other)) + net.extra(pooled(other)))

    return Net(forward, body=nn.Sequential(block(3, 12), block(12, 16)), extra=nn.Linear(3, 16), out=nn.Linear(16, 4))


def auxiliary_head():
    def forward(net, x):
        x = net.a(x)
        y = net.out(pooled(net.b(x)))
        return {"out": y, "aux": net.aux(x)} if net.training else {"out": y}

    return Net(forward, a=block(3, 16), b=block(16, 24), aux=nn.Conv2d(16, 5, 1), out=nn.Linear(24, 5))


def channel_gates(width, count):
    def forward(net, x):
        x = net.stem(x)
        for conv, gate in zip(net.convs, net.gates, strict=True):
            y = conv(x)
            x = x + y * gate(y.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()[:, :, None, None]
        return net.out(pooled(x))

    convs = nn.ModuleList(block(width, width, 1) for _ in range(count))
    gates = nn.ModuleList(nn.Conv1d(1, 1, 3, padding=1) for _ in range(count))
    return Net(forward, stem=block(3, width), convs=convs, gates=gates, out=nn.Linear(width, 5))


def slopes(count):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.PReLU(count), nn.Conv2d(16, 12, 3), nn.PReLU(), nn.Conv2d(12, 4, 1)
    )  # fmt: skip


class Scaled(nn.Module):
    """A parameter or buffer along channels."""

    def __init__(self, kind, shape=(1, 16, 1, 1)):
        super().__init__()
        self.a, self.b, self.out = block(3, 16), block(16, 12), nn.Conv2d(12, 4, 1)
        values = torch.rand(shape) + 0.5
        if kind == "buffer":
            self.register_buffer("scale", values)
        else:
            self.scale = nn.Parameter(values)

    def forward(self, x):
        return self.out(self.b(self.a(x) * self.scale))


class HandNorm(nn.Module):
    """A norm over channels spelled out, without a layer."""

    def forward(self, x):
        return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-6).sqrt()


def bilinear_pooling():
    def forward(net, x):
        x = net.body(x).flatten(2)
        return net.out((x @ x.transpose(1, 2)).flatten(1))

    return Net(forward, body=nn.Sequential(block(3, 12), block(12, 16)), out=nn.Linear(256, 5))


def group_norms():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=4), nn.InstanceNorm2d(24),
        nn.ReLU(), nn.Conv2d(24, 5, 1),
    )  # fmt: skip


def standardised_resnet():
    layers = {"conv_layer": timm.layers.StdConv2d, "norm_layer": timm.layers.BatchNormAct2d}
    return timm.models.ResNetV2([1, 1], [32, 64], num_classes=5, stem_chs=16, **layers)


B, N, CONVNEXT = tv.resnet.BasicBlock, tv.resnet.Bottleneck, tv.convnext.CNBlockConfig
SMALL, MAP = (2, 3, 32, 32), (2, 3, 64, 64)
CASES = {
    "embedding beside scores": Case(embedding, note="mix.0: stays whole, because its channels are outputs", flops=0.9),
    "cascade": Case(cascade, note="first: stays whole, because its channels are outputs"),
    "pose": Case(Pose, note="stays whole, because its channels are outputs"),
    "feature pyramid": Case(Pyramid, clean=True),
    "LSTM behind a flattened column": Case(lambda: sequence_reader(nn.LSTM, 2), (2, 1, 8, 12), note="inputs of rnn"),
    "GRU behind a flattened column": Case(lambda: sequence_reader(nn.GRU, 2), (2, 1, 8, 12), note="inputs of rnn"),
    "RNN behind a flattened column": Case(lambda: sequence_reader(nn.RNN, 2), (2, 1, 8, 12), note="inputs of rnn"),
    "LSTM that reads channels": Case(lambda: sequence_reader(nn.LSTM, 1), (2, 1, 8, 12), clean=True),
    "GRU that reads channels": Case(lambda: sequence_reader(nn.GRU, 1), (2, 1, 8, 12), clean=True),
    "GRU cell": Case(cells, (2, 1, 8, 6), clean=True),
    "generator": Case(Generator, (2, 6), clean=True),
    "generator, width in its code": Case(lambda: Generator(reads="code"), (2, 6), note="does not go on with fewer"),
    "generator, channels last": Case(lambda: Generator("channels last"), (2, 6), note="up.2 (inputs): stays whole"),
    "gated by chunk": Case(lambda: gated(lambda x: x.chunk(2, 1)), clean=True),
    "gated by split": Case(lambda: gated(lambda x: x.split(16, 1)), note="next (inputs): stays whole"),
    "detection by chunk": Case(lambda: Stacked("chunk")),
    "detection by split": Case(lambda: Stacked("split")),
    "U-Net": Case(UNet, clean=True),
    "pads in its forward": Case(lambda: convolutions(lambda x: x, Padded, 0), clean=True),
    "equalised gain": Case(lambda: convolutions(lambda x: x, FanIn), note="0: stays whole, because the weights that 2"),
    "weight norm": Case(
        lambda: convolutions(parametrizations.weight_norm), note="remove_parametrizations(layer, 'weight')", flops=0.95
    ),
    "weight norm by hook": Case(lambda: convolutions(old_weight_norm), note="remove_weight_norm(layer)", flops=0.9),
    "spectral norm": Case(
        lambda: convolutions(parametrizations.spectral_norm), note="remove_parametrizations(layer, 'weight')", flops=0.9
    ),
    "two inputs": Case(two_inputs, (SMALL, SMALL), clean=True),
    "two inputs by name": Case(two_inputs, {"other": SMALL, "image": SMALL}, clean=True),
    "head in training only": Case(auxiliary_head, note="a.0: stays whole, because aux reads it in training mode"),
    "channel gates": Case(lambda: channel_gates(192, 5), outcome="whole", note="stem.0: stays whole"),
    "one slope": Case(lambda: slopes(1), clean=True),
    "a slope a channel": Case(lambda: slopes(16), clean=True),
    "parameter along channels": Case(lambda: Scaled("parameter"), clean=True),
    "parameter along channels and places": Case(lambda: Scaled("parameter", (1, 16, 16, 16)), note="a.0: stays whole"),
    "buffer along channels": Case(lambda: Scaled("buffer"), note="scale [1, 16, 1, 1] may hold its width"),
    "norm by hand": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), HandNorm(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1)),
        outcome="runs",
        clean=True,
    ),
    "bilinear pooling": Case(bilinear_pooling, note="stay whole"),
    "group and instance norms": Case(group_norms, clean=True),
    "torchvision resnet": Case(lambda: tv.ResNet(B, [1, 1, 1, 1], 5), SMALL, clean=True),
    "torchvision resnext": Case(lambda: tv.ResNet(N, [1, 1, 1, 1], 5, groups=8, width_per_group=8), SMALL, clean=True),
    "torchvision mobilenet_v2": Case(lambda: tv.mobilenet_v2(num_classes=5, width_mult=0.35), SMALL, clean=True),
    "torchvision mobilenet_v3": Case(lambda: tv.mobilenet_v3_small(num_classes=5), SMALL, clean=True),
    "torchvision squeezenet": Case(lambda: tv.squeezenet1_1(num_classes=5), SMALL, clean=True),
    "torchvision densenet": Case(lambda: tv.DenseNet(8, (2, 2), 16, num_classes=5), SMALL, clean=True),
    "torchvision vgg": Case(
        lambda: nn.Sequential(tv.vgg.make_layers([16, "M", 32, "M"], True), nn.Flatten(), nn.Linear(32 * 16, 5)),
        clean=True,
    ),
    "torchvision mnasnet": Case(lambda: tv.mnasnet0_5(num_classes=5), SMALL, clean=True),
    "torchvision regnet": Case(lambda: tv.regnet_y_400mf(num_classes=5), SMALL, clean=True),
    "torchvision convnext": Case(
        lambda: tv.ConvNeXt(
            [tv.convnext.CNBlockConfig(16, 32, 1), tv.convnext.CNBlockConfig(32, None, 1)], num_classes=5
        ),
        SMALL,
        clean=True,
    ),
    "torchvision vit": Case(
        lambda: tv.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5), SMALL, outcome="runs", clean=True
    ),
    "torchvision swin": Case(
        lambda: tv.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5), MAP, note="stay whole"
    ),
    "torchvision shufflenet": Case(
        lambda: tv.shufflenet_v2_x0_5(num_classes=5),
        MAP,
        outcome="refused",
        note="trace ShuffleNetV2 in stage",
    ),
    "torchvision lraspp": Case(
        lambda: tv.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4),
        MAP,
        clean=True,
    ),
    "timm mobilenetv3": Case(lambda: timm_model("mobilenetv3_small_050", num_classes=5), SMALL, clean=True),
    "timm mobilenetv3 with padding of its own": Case(
        lambda: timm_model("tf_mobilenetv3_small_minimal_100", num_classes=5), SMALL, clean=True
    ),
    "timm features": Case(
        lambda: timm_model("mobilenetv3_small_050", features_only=True), MAP, note="its channels are outputs"
    ),
    "timm resnet-t": Case(lambda: timm_model("resnet10t", num_classes=5), SMALL, clean=True),
    "timm ecaresnet": Case(lambda: timm_model("ecaresnet26t", num_classes=5), SMALL, note="one channel of layer4.1.se"),
    "timm dla": Case(lambda: timm_model("dla46_c", num_classes=5), SMALL, clean=True),
    "timm regnet": Case(lambda: timm_model("regnetx_002", num_classes=5), SMALL, clean=True),
    "timm vit": Case(
        lambda: timm.models.VisionTransformer(32, 8, num_classes=5, embed_dim=24, depth=2, num_heads=3),
        SMALL,
        clean=True,
    ),
    "timm mixer": Case(
        lambda: timm.models.MlpMixer(num_classes=5, img_size=32, patch_size=8, embed_dim=24, num_blocks=2),
        SMALL,
        note="counts more channels than there are",
    ),
    "timm poolformer": Case(
        lambda: timm.models.metaformer.MetaFormer(
            num_classes=5, depths=(1, 1), dims=(16, 32), norm_layers=timm.layers.GroupNorm1
        ),
        SMALL,
        clean=True,
    ),
    "timm convnextv2": Case(
        lambda: timm.models.ConvNeXt(num_classes=5, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), use_grn=True),
        SMALL,
        outcome="runs",
        clean=True,
    ),
    "timm swin": Case(
        lambda: timm.models.SwinTransformer(
            32, 2, num_classes=5, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4
        ),
        SMALL,
        note="stays whole",
    ),
    "timm resnetv2 with standardised weights": Case(
        standardised_resnet,
        SMALL,
        note="in place of this StdConv2d",
        outcome="whole",
    ),
}
