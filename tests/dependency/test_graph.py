"""Which groups may be pruned, what each costs, and that the cost model equals the counter on pruned networks."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from cases import conv_net
from torch import nn

from tp_twoaxis import TwoAxisError
from tp_twoaxis.dependency.flops import count_macs
from tp_twoaxis.dependency.graph import build_graph, cost_model, group_key, prunable_groups
from tp_twoaxis.dependency.removal import refresh_widths, remove
from tp_twoaxis.models import cifar_resnet20_conv_shortcut, cifar_resnet20_option_a
from tp_twoaxis.pruning.plan import make_plan
from tp_twoaxis.pruning.portions import ScoredGroup
from tp_twoaxis.runtime.model_state import unwrap


class Mixed(nn.Module):
    """Concatenation of [a, b, a], a grouped and a transposed convolution, GroupNorm, flatten."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.join, self.norm = nn.Conv2d(28, 16, 1), nn.GroupNorm(4, 16)
        self.grouped, self.up = nn.Conv2d(16, 24, 3, groups=4), nn.ConvTranspose2d(24, 10, 2, 2)
        self.fc = nn.Sequential(nn.Linear(10 * 16, 20), nn.ReLU(), nn.Linear(20, 5))

    def forward(self, x):
        a = self.a(x).relu()
        x = self.norm(self.join(torch.cat([a, self.b(x).relu(), a], dim=1)))
        x = nn.functional.adaptive_avg_pool2d(self.up(self.grouped(x).relu()), 4)
        return self.fc(x.flatten(1))


def vit():
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5)


def tiny_deit():
    return timm.models.vision_transformer.VisionTransformer(32, 8, num_classes=5, embed_dim=24, depth=2, num_heads=3)


NETS = {
    "conv_net": (conv_net, 8),
    "mixed": (Mixed, 8),
    "option_a": (cifar_resnet20_option_a, 16),
    "option_b": (cifar_resnet20_conv_shortcut, 16),
    "mobilenet": (lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.35), 32),
    "vgg": (
        lambda: nn.Sequential(
            torchvision.models.vgg.make_layers([16, "M", 32, "M", 64, 64, "M"], batch_norm=True),
            nn.Flatten(),
            nn.Linear(64 * 4, 5),
        ),
        16,
    ),
    "resnext": (
        lambda: torchvision.models.ResNet(
            torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 5, groups=8, width_per_group=8
        ),
        32,
    ),
    "vit": (vit, 32),
    "deit": (tiny_deit, 32),
}


def traced(name, ignored=()):
    torch.manual_seed(0)
    make, size = NETS[name]
    net, x = make().eval(), torch.randn(1, 3, size, size)
    graph = build_graph(net, x)
    groups, notes = prunable_groups(graph, net, [net.get_submodule(n) for n in ignored])
    return net, x, graph, groups, notes


def names_of(groups):
    return {group_key(group) for group in groups}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("flops", [0.75, 0.4])
def test_prediction_equals_the_counter(name, flops):
    net, x, graph, groups, _ = traced(name)
    dense = count_macs(net, x)
    cost = cost_model(groups, net, dense)
    assert cost.dense == pytest.approx(dense.total)
    rng = np.random.default_rng(1)
    scored = [ScoredGroup(group_key(g), rng.random(len(g.channels)), g.blocks, g.run) for g in groups]
    plan = make_plan(scored, cost, flops=flops, tolerance=0.3)
    remove(graph, groups, plan.removed)
    refresh_widths(net)
    assert count_macs(net, x).total == pytest.approx(plan.macs, abs=0.5)


@pytest.mark.parametrize("name", NETS)
def test_groups_are_disjoint_and_leave_the_output_alone(name):
    net, x, _, groups, _ = traced(name)
    seen = {}
    for group in groups:
        for part in group.parts:
            if part.is_producer and isinstance(part.module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
                channels = set(part.channels.tolist())
                assert channels.isdisjoint(seen.setdefault(part.module, set()))
                seen[part.module] |= channels
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    assert last.out_features == net(x).shape[1]
    assert last not in seen
    assert len(names_of(groups)) == len(groups)


def test_option_a_groups_cover_every_channel():
    net, _, _, groups, _ = traced("option_a")
    covered = {}
    for group in groups:
        for part in group.parts:
            if part.is_producer:
                covered.setdefault(part.module, set()).update(part.channels.tolist())
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert covered[module] == set(range(module.out_channels))
    partial = [group for group in groups if len(group.channels) < len(group.group[0].idxs)]
    assert sorted(len(group.channels) for group in partial) == [16, 32]


def test_ignored_layers_and_containers():
    everything = names_of(traced("option_b")[3])
    kept = names_of(traced("option_b", ["layer1.0.conv1", "layer2"])[3])
    assert "layer1.0.conv1" not in kept
    assert kept < everything
    assert not any(name.startswith("layer2") for name in kept)
    assert names_of(traced("conv_net", ["fc"])[3]) == names_of(traced("conv_net")[3])  # an output anyway


def test_blocks_of_grouped_layers():
    groups = {group_key(g): g for g in traced("mixed")[3]}
    by_layer = {}
    for group in groups.values():
        for part in group.parts:
            if part.is_producer:
                by_layer[part.module] = group.blocks
    net_blocks = {type(m).__name__ + str(m.out_channels): b for m, b in by_layer.items() if hasattr(m, "out_channels")}
    assert net_blocks == {"Conv2d8": 1, "Conv2d12": 1, "Conv2d16": 4, "Conv2d24": 4, "ConvTranspose2d10": 1}


def test_attention_loses_whole_heads_or_the_same_share_of_each():
    _, _, _, groups, notes = traced("deit")
    assert notes == []
    assert {g.name: (g.run, len(g.channels)) for g in groups if g.run > 1} == {
        "blocks.0.attn": (8, 24),
        "blocks.1.attn": (8, 24),
    }
    _, _, _, groups, notes = traced("vit")
    assert notes == []
    assert sorted(group.blocks for group in groups) == [1, 1, 4]


def test_tracing_restores_flags_modes_and_says_why_it_failed():
    net = conv_net().train()
    net.conv1.weight.requires_grad_(False)
    net.bn1.eval()
    flags, modes = [p.requires_grad for p in net.parameters()], [m.training for m in net.modules()]
    with torch.no_grad():
        build_graph(net, torch.randn(1, 3, 8, 8))
    with pytest.raises(
        TwoAxisError, match=r"could not trace ConvNet in conv1 \(Conv2d\): Runtime.*check example_inputs"
    ):
        build_graph(net, torch.randn(1, 4, 8, 8))
    assert [p.requires_grad for p in net.parameters()] == flags
    assert [m.training for m in net.modules()] == modes


class Named(nn.Module):
    """Returns a word beside its logits."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        return {"logits": self.fc(self.conv(x).mean((2, 3))), "name": "net"}


def test_what_torch_pruning_cannot_follow_has_a_reason():
    with pytest.raises(TwoAxisError, match=r"could not trace Named: AttributeError: 'str'.*returns tensors"):
        build_graph(Named(), torch.randn(1, 3, 8, 8))
    with pytest.raises(TwoAxisError, match=r"could not trace ShuffleNetV2 in \S+ \(.*ZeroDivisionError"):
        build_graph(torchvision.models.shufflenet_v2_x0_5(), torch.randn(1, 3, 64, 64))
    with pytest.raises(TwoAxisError, match="eager module, got TorchScript"):
        unwrap(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)))


def test_heads_of_multihead_attention_keep_the_channels_they_were_trained_with():
    net, x, graph, groups, _ = traced("vit")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    stream = next(group for group in groups if group.blocks == 4)
    size = len(stream.channels)
    cost = cost_model(groups, net, count_macs(net, x))
    scored = [ScoredGroup(group_key(stream), np.random.default_rng(0).random(size), stream.blocks)]
    plan = make_plan(scored, cost, flops=0.6, tolerance=0.5)
    remove(graph, groups, plan.removed)
    kept = np.flatnonzero(~plan.removed[group_key(stream)])
    heads = kept.reshape(4, -1) // (size // 4)
    assert (heads == np.arange(4)[:, None]).all()  # after the new cut into four, each holds what was its own
    attention = net.encoder.layers[0].self_attention
    assert 4 < attention.embed_dim == len(kept) < size
    queries = before["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"][:size]
    assert torch.equal(attention.in_proj_weight[: len(kept)], queries[kept][:, kept])


def test_a_group_with_channels_that_do_not_exist_stays_whole():
    torch.manual_seed(0)
    net = timm.models.mlp_mixer.MlpMixer(num_classes=5, img_size=32, patch_size=8, embed_dim=24, num_blocks=2).eval()
    groups, notes = prunable_groups(build_graph(net, torch.randn(1, 3, 32, 32)), net, [])
    assert any("counts more channels than there are in blocks.1.mlp_tokens.fc2" in note for note in notes)
    assert names_of(groups) >= {"blocks.0.mlp_channels.fc1"}
