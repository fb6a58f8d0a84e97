"""Whole heads leave: the right channels of every layer, the module's own numbers; nothing where it is not certain."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tp_twoaxis import TwoAxisError, TwoAxisImportance, calibrate, load_pruned, prune_to_flops, save_pruned
from tp_twoaxis.dependency.channel_masks import pruned_channels
from tp_twoaxis.dependency.flops import count_macs
from tp_twoaxis.dependency.graph import build_graph, cost_model, group_key
from tp_twoaxis.dependency.removal import remove
from tp_twoaxis.dependency.validation import verified_groups
from tp_twoaxis.repair import REPAIRS, refits, repair_network

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WIDTH, HEADS, DIM = 24, 3, 8
VIT = timm.models.vision_transformer.VisionTransformer


class SelfAttention(nn.Module):
    """Separate query, key and value whose code reads the number of heads and their width from attributes."""

    def __init__(self, kind="attributes"):
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = HEADS, DIM, WIDTH
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.kind = kind
        if kind == "bias":
            self.position_bias = nn.Parameter(torch.zeros(HEADS, 1, 1))

    def forward(self, x):
        def split(y):
            if self.kind == "interleaved":  # channel c belongs to head c modulo the number of heads
                return y.view(*y.shape[:2], -1, self.num_attention_heads).permute(0, 3, 1, 2)
            return y.view(*y.shape[:2], self.num_attention_heads, -1).transpose(1, 2)

        width = DIM if self.kind == "constant" else self.attention_head_size
        scores = split(self.query(x)) @ split(self.key(x)).transpose(2, 3) / width**0.5
        if self.kind == "bias":
            scores = scores + self.position_bias
        x = (scores.softmax(-1) @ split(self.value(x))).transpose(1, 2)
        if self.kind == "interleaved":
            x = x.transpose(2, 3)
        return self.dense(x.reshape(*x.shape[:2], WIDTH if self.kind == "fixed" else self.all_head_size))


class Net(nn.Module):
    def __init__(self, kind="attributes"):
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, WIDTH, 4, 4), SelfAttention(kind)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(self.norm(x))).mean(1))


class Eager(VIT):
    """Attention spelled out instead of the fused kernel."""

    def __init__(self):
        super().__init__(16, 4, num_classes=5, embed_dim=WIDTH, depth=2, num_heads=HEADS, qk_norm=True)
        for block in self.blocks:
            block.attn.fused_attn = False


def hugging_face(implementation):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, num_labels=5, num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=HEADS,
        intermediate_size=48, attn_implementation=implementation,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


NETS = {
    "timm": lambda: VIT(16, 4, num_classes=5, embed_dim=WIDTH, depth=2, num_heads=HEADS, init_values=0.5),
    "timm eager with norms of queries and keys": Eager,
    "transformers": lambda: hugging_face("sdpa"),
    "transformers eager": lambda: hugging_face("eager"),
    "separate": Net,
}


def build(make):
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return net


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("name", NETS)
def test_a_head_that_leaves_is_a_head_that_nobody_reads(name):
    net = build(NETS[name])
    dense = copy.deepcopy(net)
    graph = build_graph(net, X)
    groups, notes = verified_groups(graph, net, X, [])
    groups = [group for group in groups if group.attention]
    assert notes == []
    assert len(groups) == (1 if name == "separate" else 2)
    removed = {group_key(g): np.arange(WIDTH) // DIM == i for i, g in enumerate(groups)}
    cost = cost_model(groups, net, count_macs(net, X))
    names = {module: n for n, module in net.named_modules()}
    projections = [names[group.group[0].dep.target.module] for group in groups]
    remove(graph, groups, removed)
    for group, projection in zip(groups, projections, strict=True):
        with torch.no_grad():
            dense.get_submodule(projection).weight[:, torch.from_numpy(removed[group_key(group)])] = 0.0
        assert net.get_submodule(projection).in_features == WIDTH - DIM
    with torch.no_grad():
        torch.testing.assert_close(logits(net(X)), logits(dense(X)), rtol=1e-5, atol=1e-6)
    assert count_macs(net, X).total == pytest.approx(cost.macs(removed))


@pytest.mark.parametrize("name", NETS)
def test_pruned_saved_loaded_and_pruned_again(name, tmp_path):
    net = build(NETS[name])
    scores = torch.cat([torch.arange(DIM) * 0.01 + head for head in (2.0, 0.0, 4.0)])

    def middle_head_first(group):
        size = len(group[0].idxs)
        return (
            scores[:size] if size <= WIDTH and "proj" in group[0].dep.target.name.lower() else torch.arange(size) + 9.0
        )

    def prune(flops):
        options = {"repair": (), "progress": False, "tolerance": 0.2}
        return prune_to_flops(net, X[:1], middle_head_first, flops=flops, **options)

    report = prune(0.9)
    attention = [
        group for group in report.groups if group.removed and len(group.kept) % DIM == 0 and "att" in group.name
    ]
    if name != "separate":  # its projection has another name, so that its heads score as everything else
        assert attention
        for group in attention:
            assert group.removed == list(range(DIM, 2 * DIM))
    prune(0.7)
    path = tmp_path / "net.safetensors"
    save_pruned(net, path)
    with torch.no_grad():
        assert torch.equal(logits(load_pruned(path, NETS[name])(X)), logits(net(X)))
    logits(net.train()(X)).square().sum().backward()


def test_a_head_is_scored_by_its_values():
    net = build(NETS["timm"])
    stats = calibrate(net, [X], progress=False)
    importance = TwoAxisImportance(stats, normalizer=None)
    groups, _ = verified_groups(build_graph(net, X), net, X, [])
    group = next(group for group in groups if group.name == "blocks.1.attn")
    expected = importance.layer_scores("blocks.1.attn.qkv")[2 * WIDTH :]
    torch.testing.assert_close(importance(group.scored), expected.float())
    assert group.run == DIM


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("bias", "attention keeps its heads and their width (attention)"),
        ("fixed", "attention: keeps its heads, its code does not run with one less (RuntimeError: shape"),
        ("interleaved", "attention: stays whole, because Torch-Pruning maps it to the wrong inputs of attention.dense"),
    ],
)
def test_heads_that_are_not_understood_stay(kind, note):
    net = build(lambda: Net(kind))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    parameters = list(map(id, net.parameters()))
    groups, notes = verified_groups(build_graph(net, X), net, X, [])
    assert not any(group.attention for group in groups)
    assert any(found.startswith(note) for found in notes), notes
    assert list(map(id, net.parameters())) == parameters
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.attention.num_attention_heads == HEADS


def test_an_ignored_attention_keeps_its_heads():
    net = build(NETS["timm"])
    groups, _ = verified_groups(build_graph(net, X), net, X, [net.blocks[0].attn])
    assert [group.name for group in groups if group.attention] == ["blocks.1.attn"]


def test_the_kernels_agree_on_a_pruned_module():
    net = build(NETS["timm"])
    prune_to_flops(net, X[:1], "l2", flops=0.5, repair=(), progress=False)
    attention = net.blocks[0].attn
    tokens = torch.randn(1, 5, attention.qkv.in_features)
    fused = attention(tokens)
    attention.fused_attn = False
    torch.testing.assert_close(attention(tokens), fused)
    assert attention.attn_dim == attention.num_heads * attention.head_dim == attention.proj.in_features


NARROWED = [name for name in NETS if "norms" not in name]


def narrowed(make, strength=3.0):
    """A network whose attention is far from uniform, its dense copy, and other channels of every head to leave."""
    net = build(make).double()
    for module in net.modules():
        for name in ("qkv", "query", "q_proj"):
            if isinstance(layer := getattr(module, name, None), nn.Linear):
                with torch.no_grad():
                    layer.weight.mul_(strength)
    groups, notes = verified_groups(build_graph(net, X.double()), net, X.double(), [], "head-dims")
    groups = [group for group in groups if group.attention]
    assert notes == []
    leaving = np.zeros(WIDTH, dtype=bool)
    leaving[[1, 3, DIM + 2, DIM + 7, 2 * DIM, 2 * DIM + 1]] = True
    return net, groups, {group_key(group): leaving for group in groups}


def silence(net, groups, removed):
    """A copy with zeros for what leaves, and products of queries and keys divided as those of narrower heads."""
    dense = copy.deepcopy(net)
    layers = {module: dense.get_submodule(name) for name, module in net.named_modules()}
    with torch.no_grad():
        for group in groups:
            mask = torch.from_numpy(removed[group_key(group)])
            for part in group.parts:
                channels = part.channels[mask[part.roots]]
                if part.is_producer and isinstance(part.module, nn.Linear):
                    layers[part.module].weight[channels], layers[part.module].bias[channels] = 0.0, 0.0
            query = group.attention.query
            for parameter in layers[query.module].parameters():
                parameter[query.channels] *= (WIDTH / int((~mask).sum())) ** 0.5
    return dense


@pytest.mark.parametrize("name", NARROWED)
def test_a_channel_that_leaves_its_head_is_a_channel_at_zero(name):
    net, groups, removed = narrowed(NETS[name])
    assert len(groups) == (1 if name == "separate" else 2)
    dense, untouched = silence(net, groups, removed), copy.deepcopy(net)
    cost = cost_model(groups, net, count_macs(net, X.double()))
    assert all(group.blocks == HEADS and group.run == 1 and not group.aligned for group in groups)
    graph = build_graph(net, X.double())
    remove(graph, groups, removed)
    with torch.no_grad():
        torch.testing.assert_close(logits(net(X.double())), logits(dense(X.double())), rtol=1e-9, atol=1e-10)
        assert (logits(net(X.double())) - logits(untouched(X.double()))).abs().max() > 1e-3
    assert count_macs(net, X.double()).total == pytest.approx(cost.macs(removed))
    for group in groups:
        attention = group.attention.module
        counts = [v for n in ("num_heads", "num_attention_heads") if isinstance(v := getattr(attention, n, None), int)]
        widths = [v for n in ("head_dim", "attention_head_size") if isinstance(v := getattr(attention, n, None), int)]
        assert counts == [HEADS]
        assert widths == [DIM - 2]


@pytest.mark.parametrize("name", NARROWED)
def test_narrowed_saved_and_loaded(name, tmp_path):
    net = build(NETS[name])
    report = prune_to_flops(net, X[:1], "l2", flops=0.7, attention="head-dims", repair=(), progress=False)
    losing = [group for group in report.groups if group.removed and group.name.endswith(("attn", "attention"))]
    assert losing
    for group in losing:
        lost = np.bincount(np.array(group.removed) // DIM, minlength=HEADS)
        assert len(set(lost.tolist())) == 1
    save_pruned(net, tmp_path / "net.safetensors")
    loaded = load_pruned(tmp_path / "net.safetensors", NETS[name])
    with torch.no_grad():
        assert torch.equal(logits(loaded(X)), logits(net(X)))
    if name == "timm":  # the fused kernel takes the temperature from the width, the other one from an attribute
        for block in loaded.blocks:
            assert block.attn.scale == pytest.approx(block.attn.head_dim**-0.5)
            block.attn.fused_attn = False
        with torch.no_grad():
            torch.testing.assert_close(logits(loaded(X)), logits(net(X)))
    logits(net.train()(X)).square().sum().backward()


def test_heads_lose_channels_of_their_own():
    net = build(NETS["timm"])
    places = torch.tensor([3, 1, 6])  # of the lowest in each head

    def importance(group):
        scores = torch.arange(len(group[0].idxs)) % DIM + 100.0
        if "attn.proj" in group[0].dep.target.name:
            scores[torch.arange(HEADS) * DIM + places] = 0.0
        return scores

    report = prune_to_flops(
        net, X[:1], importance, flops=0.96, attention="head-dims", repair=(), tolerance=0.02,
        progress=False,
    )  # fmt: skip
    group = next(group for group in report.groups if group.name == "blocks.1.attn")
    assert group.removed == [3, DIM + 1, 2 * DIM + 6]


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (
            lambda: Net("constant"),
            "attention: keeps its heads as wide as they are, its code does not work with narrower ones (attention "
            "comes out otherwise)",
        ),
        (Eager, "attention keeps its heads and their width (blocks.1.attn, blocks.0.attn)"),
    ],
)
def test_heads_whose_temperature_or_norm_would_change_keep_their_width(make, note):
    net = build(make)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    groups, notes = verified_groups(build_graph(net, X), net, X, [], "head-dims")
    assert not any(group.attention for group in groups)
    assert note in notes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("repair", [name for name in REPAIRS if refits([name]) and not REPAIRS[name].trains])
def test_repair_of_narrowed_heads_is_exact_where_values_depend_on_each_other(repair):
    net, groups, removed = narrowed(NETS["timm"])
    lost = torch.from_numpy(next(iter(removed.values())))
    with torch.no_grad():
        for block in net.blocks:  # no queries; values that leave are a kept one of their head's, or constant
            qkv = block.attn.qkv
            qkv.weight[:WIDTH], qkv.bias[:WIDTH] = 0.0, 0.0
            for channel in lost.nonzero()[:, 0].tolist():
                source = 2 * WIDTH + channel // DIM * DIM + 4
                qkv.weight[2 * WIDTH + channel] = 0.0 if repair == "bias" else 2.0 * qkv.weight[source]
                qkv.bias[2 * WIDTH + channel] = 0.5
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    dense, graph = copy.deepcopy(net), build_graph(net, X.double())
    masks = pruned_channels(groups, removed, net)
    remove(graph, groups, removed)
    report = repair_network(net, dense, masks, (repair,), loader=[images], ridge=1e-12, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(net(X.double()), dense(X.double()), rtol=1e-5, atol=1e-5)
    for consumer in report.consumers:
        assert consumer.measured == pytest.approx(0.0, abs=1e-6)


def test_narrowed_in_steps_with_repair():
    net = build(NETS["timm"])
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    dense = copy.deepcopy(net)
    report = prune_to_flops(
        net, X[:1], "capture", flops=0.6, steps=2, attention="head-dims", repair=("sequential",), loader=[images],
        progress=False,
    )  # fmt: skip
    assert report.achieved == pytest.approx(0.6, abs=0.006)
    narrower = [block.attn.head_dim for block in net.blocks]
    assert min(narrower) < DIM
    errors = {c.layer: c.in_network for c in report.consumers}
    assert max(errors.values()) < 1.0
    for new, old in zip(net.blocks, dense.blocks, strict=True):
        assert new.attn.num_heads == old.attn.num_heads


def test_unknown_ways_to_prune_attention():
    with pytest.raises(TwoAxisError, match="attention: expected one of heads, head-dims, got 'dims'"):
        prune_to_flops(build(Net), X, "l2", attention="dims", repair=())
