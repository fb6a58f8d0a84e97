"""The importances inside Torch-Pruning's own pruners, and every way they must refuse."""

import pytest
import torch
import torch_pruning as tp
import torchvision
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import HullImportance, LocalImportance, TargetImportance, TwoAxisError, TwoAxisImportance, calibrate
from tp_twoaxis.dependency.groups import members, root_size
from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.importance.normalize import normalize
from tp_twoaxis.runtime import fingerprints
from tp_twoaxis.runtime.layers import CHANNEL_LAYERS
from tp_twoaxis.scores.named_scores import evaluate, find_score

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(7))
CLASSES = (TwoAxisImportance, LocalImportance, TargetImportance, HullImportance)


def statistics(net, images=48):
    return calibrate(net, batches(images), progress=False)


def options():
    """Fresh dicts: Torch-Pruning's defaults are shared by all pruners of a process."""
    return {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "channel_groups": {}}


def pruner_of(kind, net, importance, **arguments):
    arguments = {"pruning_ratio": 0.5, "ignored_layers": [net.fc], **options(), **arguments}
    return getattr(tp.pruner, kind)(net, X, importance=importance, **arguments)


def groups_of(net, x=X):
    graph = tp.DependencyGraph().build_dependency(net, x, verbose=False)
    return graph, list(graph.get_all_groups(ignored_layers=[net.fc]))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", ["BasePruner", "MetaPruner", "GroupNormPruner", "BNScalePruner"])
def test_works_in_the_hosts_pruners(kind, cls):
    net = conv_net()
    pruner_of(kind, net, cls(statistics(net))).step()
    assert (net.conv1.out_channels, net.reduce.out_channels) == (8, 4)
    assert net(X).shape == (1, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"global_pruning": True},
        {"global_pruning": True, "isomorphic": True},
        {"round_to": 4},
        {"global_pruning": True, "round_to": 2},
        {"max_pruning_ratio": 0.3},
    ],
)
def test_works_with_the_hosts_options(arguments):
    net = conv_net()
    before = sum(p.numel() for p in net.parameters())
    pruner_of("BasePruner", net, TwoAxisImportance(statistics(net)), **arguments).step()
    assert sum(p.numel() for p in net.parameters()) < before
    assert net.conv1.out_channels % arguments.get("round_to", 1) == 0
    net(X).sum().backward()


def test_works_with_a_ratio_per_layer():
    net = conv_net()
    stats = statistics(net)
    ratios = {net.reduce: 0.25}
    pruner_of("BasePruner", net, LocalImportance(stats), pruning_ratio=0.0, pruning_ratio_dict=ratios).step()
    assert (net.conv1.out_channels, net.reduce.out_channels) == (16, 6)


def test_the_lowest_channels_leave():
    net = conv_net()
    stats = statistics(net)
    weight = net.reduce.weight.detach().clone()
    keep = sorted(stats["reduce"].variance.topk(4).indices.tolist())
    _, groups = groups_of(net)
    stays = sorted(TwoAxisImportance(stats)(groups[0]).topk(8).indices.tolist())
    pruner_of("BasePruner", net, LocalImportance(stats, score="variance")).step()
    assert net.reduce.weight.shape == (4, 8, 1, 1)
    assert len(stays) == 8
    kept_rows = [
        k
        for k in range(8)
        if any(set(r.tolist()) <= set(weight[k].flatten().tolist()) for r in net.reduce.weight.flatten(1))
    ]
    assert kept_rows == keep


def test_second_step_raises_before_it_removes():
    net = conv_net()
    pruner = pruner_of("BasePruner", net, TwoAxisImportance(statistics(net)), iterative_steps=2)
    pruner.step()
    assert net.conv1.out_channels == 12
    shapes = [p.shape for p in net.parameters()]
    with pytest.raises(StaleStatisticsError, match=r"channels.*loader=.*to recalibrate between steps"):
        pruner.step()
    assert [p.shape for p in net.parameters()] == shapes


def test_a_loader_recalibrates_between_steps():
    net = conv_net()
    importance = TwoAxisImportance(statistics(net), loader=batches(), score="task-mi")
    first = importance.stats
    pruner = pruner_of("BasePruner", net, importance, iterative_steps=2)
    pruner.step()
    assert importance.stats is first
    pruner.step()
    assert (net.conv1.out_channels, net.reduce.out_channels) == (8, 4)
    assert importance.stats is not first
    assert importance.stats["conv1"].num_channels == 12
    assert importance.stats.target == first.target
    assert list(importance.stats) == list(first)


@pytest.mark.parametrize("layer", ["conv1", "reduce", "fc"])
def test_training_after_calibration_raises(layer):
    net = conv_net()
    importance = TwoAxisImportance(statistics(net))
    _, groups = groups_of(net)
    for group in groups:
        importance(group)
    with torch.no_grad():
        net.get_submodule(layer).weight.add_(0.01)
    with pytest.raises(StaleStatisticsError, match=f"{layer}.*calibrate\\(\\) again"):
        importance(groups[0])


def test_the_weights_of_a_group_are_hashed_once_when_it_is_ranked(monkeypatch):
    net = conv_net()
    importance, hashed = TwoAxisImportance(statistics(net), "capture"), []
    digest = fingerprints._digest
    monkeypatch.setattr(fingerprints, "_digest", lambda tensors: hashed.append(1) or digest(tensors))
    _, (first, *others) = groups_of(net)
    importance(first)
    hashed.clear()  # a first call knows no layer yet
    for group in (first, *others):
        importance(group)
    own = sum(m.is_producer and isinstance(m.module, CHANNEL_LAYERS) for g in (first, *others) for m in members(g))
    assert len(hashed) == own
    hashed.clear()
    for group in (first, *others):
        importance.constant_channels(group)
    assert not hashed
    net.conv1.weight.data.mul_(2.0)  # leaves no trace but the values
    with pytest.raises(StaleStatisticsError, match="conv1"):
        importance(next(g for g in (first, *others) if any(m.module is net.conv1 for m in members(g))))


def test_an_optimizer_step_raises():
    net = conv_net()
    importance = TwoAxisImportance(statistics(net))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(X).square().sum().backward()
    optimizer.step()
    with pytest.raises(StaleStatisticsError):
        importance(groups_of(net)[1][0])


def test_statistics_of_another_model_raise():
    _, groups = groups_of(conv_net())
    with pytest.raises(StaleStatisticsError):
        TwoAxisImportance(statistics(conv_net(seed=1)))(groups[0])
    with pytest.raises(StaleStatisticsError, match=r"8 channels.*the layer has 16 channels"):
        TwoAxisImportance(statistics(conv_net(width=8)))(groups[0])
    other = calibrate(torchvision.models.resnet18(num_classes=5), batches(8), progress=False)
    with pytest.raises(TwoAxisError):
        TwoAxisImportance(other)(groups[0])


@pytest.mark.parametrize("reduction", ["mean", "sum", "max", "first"])
@pytest.mark.parametrize("normalizer", ["mean", None])
def test_importance_is_the_reduced_score_of_all_writers(reduction, normalizer):
    net = conv_net()
    stats = statistics(net)
    for group in groups_of(net)[1]:
        table = [[] for _ in range(root_size(group))]
        for part in members(group):
            if part.is_producer and isinstance(part.module, nn.Conv2d):
                name = next(n for n, m in net.named_modules() if m is part.module)
                scores = evaluate(find_score("capture"), stats[name])
                for channel, root in zip(part.channels.tolist(), part.roots.tolist(), strict=True):
                    table[root].append(float(scores[channel]))
        how = {"mean": lambda v: sum(v) / len(v), "sum": sum, "max": max, "first": lambda v: v[0]}[reduction]
        expected = normalize(torch.tensor([how(v) for v in table], dtype=torch.float64), normalizer).float()
        got = TwoAxisImportance(stats, "capture", group_reduction=reduction, normalizer=normalizer)(group)
        torch.testing.assert_close(got, expected)
        assert got.dtype == torch.float32


@pytest.mark.parametrize("cls", CLASSES)
def test_partial_groups_give_as_many_values_and_keep_the_order(cls):
    net = conv_net()
    importance = cls(statistics(net), normalizer=None)
    graph, groups = groups_of(net)
    whole = {group[0].dep.target.module: importance(group) for group in groups}
    for layer in (net.conv1, net.reduce):
        idxs = [6, 2, 5]
        group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, idxs)
        got = importance(group)
        assert idxs == [6, 2, 5]
        assert list(group[0].idxs) == idxs
        root = next(m for m in whole if whole[m].shape[0] == (16 if layer is net.conv1 else 8))
        torch.testing.assert_close(got, whole[root][idxs])


class Concat(nn.Module):
    """Repeated roots: [a, b, a] is read, then a flatten of 16 pixels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)
        self.join = nn.Conv2d(13, 6, 1)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.fc = nn.Linear(6 * 16, 5)

    def forward(self, x):
        a = self.a(x)
        x = self.join(torch.cat([a, self.b(x), a], dim=1)) * self.scale
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


def test_repeated_roots_and_bare_parameters():
    torch.manual_seed(0)
    net = Concat()
    stats = statistics(net)
    for cls in CLASSES:
        for group in groups_of(net)[1]:
            values = cls(stats)(group)
            assert values.shape == (root_size(group),)
            assert torch.isfinite(values).all()
    pruner_of("BasePruner", net, HullImportance(stats), unwrapped_parameters=[(net.scale, 0)]).step()
    assert [net.a.out_channels, net.b.out_channels, net.join.out_channels] == [2, 2, 3]
    assert net.scale.shape == (3, 1, 1)
    assert net(X).shape == (1, 5)


class Transformer(nn.Module):
    """One hand-written attention block on patches."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp, self.back = nn.Linear(width, 24), nn.Linear(24, width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, -1))
        return self.fc((x + self.back(self.mlp(x).relu())).mean(1))


def test_attention_rerooted_at_the_projection():
    torch.manual_seed(0)
    net = Transformer()
    importance = TwoAxisImportance(statistics(net))
    heads = {net.qkv: 3}
    pruner = pruner_of("BasePruner", net, importance, num_heads=heads, prune_head_dims=True)
    pruner.step()
    assert net.qkv.weight.shape == (18, 6)
    assert net.proj.weight.shape == (6, 6)
    assert net(X).shape == (1, 5)


def test_depthwise_root():
    torch.manual_seed(0)
    block = torchvision.models.mobilenetv2.InvertedResidual(8, 8, 1, 4)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    stats = statistics(net.eval())
    graph = tp.DependencyGraph().build_dependency(net, X)
    group = graph.get_pruning_group(block.conv[1][0], tp.prune_depthwise_conv_out_channels, list(range(32)))
    got = TwoAxisImportance(stats, "capture", normalizer=None)(group)
    capture = find_score("capture")
    writers = ("1.conv.0.0", "1.conv.1.0")
    expected = sum(evaluate(capture, stats[name]) for name in writers) / 2
    torch.testing.assert_close(got, expected.float())


def test_uncalibrated_groups_are_named():
    net = conv_net()
    stats = calibrate(net, batches(16), layers=["reduce"], progress=False)
    groups = groups_of(net)[1]
    wide = next(g for g in groups if root_size(g) == 16)
    with pytest.raises(TwoAxisError, match=r"none of the layers.*was calibrated \(.*conv1.*calibrate with them"):
        TwoAxisImportance(stats)(wide)


def test_some_calibrated_writers_are_enough():
    net = conv_net()
    stats = calibrate(net, batches(16), layers=["conv2"], progress=False)
    wide = next(g for g in groups_of(net)[1] if root_size(g) == 16)
    expected = evaluate(find_score("capture"), stats["conv2"])
    torch.testing.assert_close(TwoAxisImportance(stats, "capture", normalizer=None)(wide), expected.float())


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (lambda s: LocalImportance(s, score="task-mi"), r"capture, .*\(local axis\), got 'task-mi'"),
        (lambda s: TargetImportance(s, score="hull"), r"task-mi, .*\(target axis\), got 'hull'"),
        (lambda s: TwoAxisImportance(s, score="captur"), "did you mean 'capture'"),
        (lambda s: TwoAxisImportance(s, score=lambda layer: layer.variance[1:]), r"channels, got \[\d+\]"),
        (lambda s: TwoAxisImportance(s, score=lambda layer: layer.variance / 0), "not finite"),
        (lambda s: TwoAxisImportance(s, group_reduction="prod"), "group_reduction.*got 'prod'"),
        (lambda s: TwoAxisImportance(s, normalizer="best"), "normalizer.*got 'best'"),
        (lambda s: TwoAxisImportance(s, normalizer=lambda v: v[:2]), r"finite scores, got shape \[2\]"),
        (lambda s: TwoAxisImportance(s, "low-overlap", normalizer="mean"), "at least 0.*use 'softmax', 'stan"),
    ],
)
def test_refusals(importance, message):
    net = conv_net()
    with pytest.raises(TwoAxisError, match=message):
        importance(statistics(net, 16))(groups_of(net)[1][0])


def test_target_scores_need_a_target():
    net = conv_net()
    stats = calibrate(net, batches(16), target=None, progress=False)
    with pytest.raises(TwoAxisError, match="was not recorded"):
        TargetImportance(stats)(groups_of(net)[1][0])


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_hull_strength_is_checked(strength):
    with pytest.raises(TwoAxisError, match="strength"):
        HullImportance(None, strength=strength)


def test_statistics_of_a_wrapped_model_fit():
    net = conv_net()
    wrapped = TwoAxisImportance(calibrate(nn.DataParallel(net), batches(16), progress=False))
    bare = TwoAxisImportance(calibrate(net, batches(16), progress=False))
    group = groups_of(net)[1][0]
    assert torch.equal(wrapped(group), bare(group))


def test_repr_names_the_score():
    stats = statistics(conv_net())
    assert repr(TargetImportance(stats)) == "TargetImportance(score='task-mi', normalizer='median')"
    chosen = repr(LocalImportance(stats, "composite-local"))
    assert chosen == "LocalImportance(score='composite-local', normalizer='median', allocation='capture')"
    plain = repr(LocalImportance(stats, "composite-local", normalizer="softmax"))
    assert plain == "LocalImportance(score='composite-local', normalizer='softmax')"
    assert "hull" not in repr(LocalImportance(stats))
