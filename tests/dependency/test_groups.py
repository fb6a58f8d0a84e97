"""Groups read back: roles, roots that repeat, are offset or absent; reductions against a loop."""

import torch
import torch_pruning as tp
import torchvision
from torch import nn

from tp_twoaxis.dependency.groups import members, model_of, module_names, root_size


def group_of(net, x, root, idxs=None, handler=tp.prune_conv_out_channels):
    graph = tp.DependencyGraph().build_dependency(net, x, verbose=False)
    layer = net.get_submodule(root)
    idxs = list(range(layer.weight.shape[0])) if idxs is None else idxs
    return graph.get_pruning_group(layer, handler, idxs)


class Concat(nn.Module):
    """Reads conv a twice and conv b once: [a, b, a]."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)
        self.join = nn.Conv2d(13, 6, 1)

    def forward(self, x):
        a = self.a(x)
        return self.join(torch.cat([a, self.b(x), a], dim=1))


class Attention(nn.Module):
    """Hand-written attention with one fused layer, as timm writes it."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, tokens, width))


class Chunked(nn.Module):
    """A gated unit: the first half of fc1 times the second."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(8, 4)

    def forward(self, x):
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(a * b.sigmoid())


class Scaled(nn.Module):
    """A bare parameter along the channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x):
        return self.out(self.conv(x) * self.scale)


def test_flatten_repeats_each_root_sixteen_times():
    net = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(), nn.Linear(5 * 16, 2))
    parts = list(members(group_of(net, torch.randn(1, 3, 4, 4), "0")))
    consumer = next(p for p in parts if p.module is net[2])
    assert consumer.roots.tolist() == [k for k in range(5) for _ in range(16)]
    assert consumer.channels.tolist() == list(range(80))
    assert consumer.is_consumer
    assert not consumer.is_producer


def test_concat_reads_roots_twice_and_offsets_others():
    net = Concat()
    x = torch.randn(1, 3, 4, 4)
    consumer = next(p for p in members(group_of(net, x, "a")) if p.module is net.join)
    assert dict(zip(consumer.channels.tolist(), consumer.roots.tolist(), strict=True)) == {
        **{k: k for k in range(4)},
        **{9 + k: k for k in range(4)},
    }
    consumer = next(p for p in members(group_of(net, x, "b", [1, 4])) if p.module is net.join)
    assert dict(zip(consumer.channels.tolist(), consumer.roots.tolist(), strict=True)) == {5: 0, 8: 1}


def test_fused_qkv_repeats_roots_three_times_when_rerooted_at_the_projection():
    net = nn.Sequential(Attention())
    graph = tp.DependencyGraph().build_dependency(net, torch.randn(2, 5, 12))
    group = graph.get_pruning_group(net[0].proj, tp.prune_linear_in_channels, list(range(12)))
    producer = next(p for p in members(group) if p.module is net[0].qkv)
    assert root_size(group) == 12
    assert producer.roots.bincount(minlength=12).tolist() == [3] * 12
    assert ((producer.channels % 12) == producer.roots).all()


def test_chunk_offsets():
    net = Chunked()
    group = group_of(net, torch.randn(2, 6), "fc2", list(range(8)), tp.prune_linear_in_channels)
    producer = next(p for p in members(group) if p.module is net.fc1)
    assert sorted(producer.channels.tolist()) == list(range(16))
    assert producer.roots.bincount(minlength=8).tolist() == [2] * 8
    assert ((producer.channels % 8) == producer.roots).all()


def test_partial_groups_number_roots_by_position():
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 4, 1))
    idxs = [9, 2, 6]
    group = group_of(net, torch.randn(1, 3, 4, 4), "0", idxs)
    assert root_size(group) == 3
    for part in members(group):
        assert part.channels[part.roots.argsort()].tolist() == [9, 2, 6]
    assert list(group[0].idxs) == idxs == [9, 2, 6]


def test_depthwise_roots_both_read_and_write():
    net = torchvision.models.mobilenetv2.InvertedResidual(8, 8, 1, 2)
    group = group_of(net, torch.randn(1, 8, 8, 8), "conv.1.0", handler=tp.prune_depthwise_conv_out_channels)
    roles = {p.module: (p.is_producer, p.is_consumer) for p in members(group) if isinstance(p.module, nn.Conv2d)}
    assert roles == {net.conv[0][0]: (True, False), net.conv[1][0]: (True, True), net.conv[2]: (False, True)}


def test_parameters_are_left_out():
    net = Scaled()
    group = group_of(net, torch.randn(1, 3, 4, 4), "conv")
    assert any(item.dep.target.module is net.scale for item in group)
    own = set(net.modules())
    assert {p.module for p in members(group)} & own == {net.conv, net.out}
    assert not any(isinstance(p.module, nn.Parameter) for p in members(group))
    assert model_of(group) is net


def test_modules_are_named_as_the_unwrapped_model_names_them():
    net, x = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(6, 4, 1))), torch.randn(1, 3, 4, 4)
    for model in (net, nn.DataParallel(net)):
        graph = tp.DependencyGraph().build_dependency(model, x, verbose=False)
        names = module_names(graph.get_pruning_group(net[0], tp.prune_conv_out_channels, [0]))
        assert {names[module]: module for module in net.modules()} == dict(net.named_modules())
