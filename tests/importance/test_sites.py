"""Scores of coupled channels: of what each producer writes, and of what the consumers read."""

import numpy as np
import pytest
import reference
import reference_scores as slow
import torch
import torch_pruning as tp
import torchvision
from baseline_cases import full_group, reorder, residual
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import HullImportance, LocalImportance, TwoAxisError, TwoAxisImportance, calibrate, prune_to_flops
from tp_twoaxis.dependency.groups import root_size
from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.scores.named_scores import SCORES, evaluate
from tp_twoaxis.statistics import recorder

LOADER = batches(images=64, batch_size=24)
X = torch.zeros(1, 3, 8, 8)
REDUCTIONS = {"mean": np.mean, "sum": np.sum, "max": np.max, "first": lambda values: values[0]}


class Concat(nn.Module):
    """[a, b, a] is read, then 16 pixels of each channel after a layer scale."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)
        self.join = nn.Conv2d(13, 6, 1)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.fc = nn.Linear(6 * 16, 5)

    def forward(self, x):
        a = self.a(x).relu()
        x = self.join(torch.cat([a, self.b(x), a], dim=1)) * self.scale
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


class Split(nn.Module):
    """One producer, two consumers of a part each; Torch-Pruning maps them rightly if it meets the left one first."""

    def __init__(self, left_first=True):
        super().__init__()
        self.left_first = left_first
        self.stem = nn.Conv2d(3, 8, 3)
        self.left, self.right = nn.Conv2d(5, 4, 1), nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        left, right = self.stem(x).relu().split([5, 3], dim=1)
        left, right = self.left(left), self.right(right)
        # it goes backwards through the sum
        return self.fc((right + left if self.left_first else left + right).mean((2, 3)))


class PreNorm(nn.Module):
    """A pre-norm block as timm writes it: position parameter, fused qkv, layer scale, MLP."""

    def __init__(self, width=6, heads=2):
        super().__init__()
        self.embed, self.position = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 4, width))
        self.num_heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.rand(width))
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 10), nn.Linear(10, width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        n, tokens, width = x.shape
        heads = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        mixed = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.proj(mixed) * self.scale
        return self.fc((x + self.down(nn.functional.gelu(self.up(self.norm2(x))))).mean(1))


def runs(number, length):
    return [list(range(length * k, length * (k + 1))) for k in range(number)]


def each(number):
    return runs(number, 1)


# network, the group's root layer, and for each consumer its features by root channel
CASES = {
    "residual, flattened": (residual, "first", {"second": each(6), "fc": runs(6, 4)}),
    "residual, depthwise": (conv_net, "conv1", {"conv2": each(16), "reduce": each(16)}),
    "depthwise root": (conv_net, "depthwise", {"conv2": each(16), "reduce": each(16)}),
    "concatenated twice": (Concat, "a", {"join": [[k, 9 + k] for k in range(4)]}),
    "concatenated once": (Concat, "b", {"join": [[4 + k] for k in range(5)]}),
    "scaled, flattened": (Concat, "join", {"fc": runs(6, 16)}),
    "split": (Split, "stem", {"left": each(5) + [[]] * 3, "right": [[]] * 5 + each(3)}),
    "pre-norm stream": (PreNorm, "embed", {"qkv": each(6), "up": each(6), "fc": each(6)}),
    "MLP": (PreNorm, "up", {"down": each(10)}),
}


def network(factory):
    torch.manual_seed(0)
    return factory().eval()


def statistics(net, **options):
    return calibrate(net, LOADER, **{"positions": "all", "consumers": True, "progress": False, **options})


def slow_score(name, rows):
    variance, active = rows.var(0), rows.var(0) > 0
    if name == "capture":
        values = slow.capture(variance)
    elif name == "variance":
        values = variance / np.mean(variance[active])
    else:
        rho = reference.correlation(rows)
        explained = [(slow.greedy_hull(rho, k, active, max_size=8)[1] or [0.0])[-1] for k in range(len(rho))]
        values = variance / np.mean(variance[active]) * (1.0 - 0.5 * np.array(explained))
    return np.where(active, values, values.min())


@pytest.mark.parametrize(
    ("case", "score"),
    # 96 features of 64 images: which peers explain one wholly is decided by rounding
    [(c, s) for c in CASES for s in ("capture", "variance", "hull") if (c, s) != ("scaled, flattened", "hull")],
)
def test_the_consumers_view_equals_the_slow_twin(case, score):
    factory, root, consumers = CASES[case]
    net = network(factory)
    rows = reference.received(net, [x for x, _ in LOADER], {name: net.get_submodule(name) for name in consumers})
    scores = {name: slow_score(score, reference.flat(rows[name])) for name in consumers}
    views = [
        [np.mean(scores[name][features[k]]) for name, features in consumers.items() if features[k]]
        for k in range(len(next(iter(consumers.values()))))
    ]
    group = full_group(net, root)
    for how in ("mean", "sum", "max"):
        importance = TwoAxisImportance(statistics(net), score, group_reduction=how, normalizer=None, site="consumer")
        np.testing.assert_allclose(importance(group), [REDUCTIONS[how](view) for view in views], rtol=1e-4, atol=1e-6)


def test_first_is_the_first_consumer_of_the_group():
    net = residual()
    importance = TwoAxisImportance(
        statistics(net), "capture", group_reduction="first", normalizer=None, site="consumer"
    )
    fc = importance.layer_scores("fc").reshape(6, 4).mean(1)
    got = importance(full_group(net, "first"))
    assert any(torch.allclose(got.double(), scores) for scores in (fc, importance.layer_scores("second")))
    with pytest.raises(TwoAxisError, match=r"group_reduction.*got 'last'"):
        TwoAxisImportance(statistics(net), "capture", group_reduction="last", site="consumer")(full_group(net, "first"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_producers_of_a_residual_stream_are_reduced(reduction):
    net = residual()
    stats = statistics(net)
    rows = reference.emitted(net, [x for x, _ in LOADER], {"first": net.first, "second": net.second})
    scores = [slow.capture(reference.flat(rows[name]).var(0)) for name in ("first", "second")]
    expected = [REDUCTIONS[reduction](pair) for pair in np.transpose(scores)]
    got = TwoAxisImportance(stats, "capture", group_reduction=reduction, normalizer=None)(full_group(net, "first"))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_only_the_consumer_sees_what_producers_cancel():
    class Cancelling(nn.Module):
        def __init__(self):
            super().__init__()
            self.plus, self.minus, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
            with torch.no_grad():
                self.minus.weight[2] = -self.plus.weight[2]

        def forward(self, x):
            return self.out(self.plus(x) + self.minus(x)).mean((2, 3))

    net = network(Cancelling)
    stats, group = statistics(net), full_group(net, "plus")
    assert TwoAxisImportance(stats, "capture")(group)[2] > 0.1
    at_consumer = TwoAxisImportance(stats, "capture", site="consumer")(group)
    assert at_consumer.argmin() == 2
    assert at_consumer[2] < 1e-6


def test_attention_is_scored_where_its_projection_reads():
    net = network(PreNorm)
    graph = tp.DependencyGraph().build_dependency(net, X, verbose=False)
    group = graph.get_pruning_group(net.proj, tp.prune_linear_in_channels, list(range(6)))
    rows = reference.received(net, [x for x, _ in LOADER], {"proj": net.proj})["proj"]
    got = TwoAxisImportance(statistics(net), "capture", normalizer=None, site="consumer")(group)
    np.testing.assert_allclose(got, slow.capture(reference.flat(rows).var(0)), rtol=1e-4)


def test_a_transformer_with_the_attention_module_is_scored_by_its_linear_layers():
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=5
    ).eval()
    torch.nn.init.normal_(net.heads.head.weight)
    stats = statistics(net)
    scored = {}
    for group in tp.DependencyGraph().build_dependency(net, X, verbose=False).get_all_groups():
        scored[root_size(group), group[0].dep.target.module] = TwoAxisImportance(stats, "capture", site="consumer")(
            group
        )
    assert [None if s is None else len(s) for s in scored.values()].count(None) == 1
    assert {len(s) for s in scored.values() if s is not None} == {8, 12}
    report = prune_to_flops(
        net,
        X,
        TwoAxisImportance(stats, "capture", site="consumer"),
        flops=0.7,
        repair="none",
        tolerance=0.1,
        progress=False,
    )
    assert report.achieved < 0.8
    assert net(X).shape == (1, 5)


@pytest.mark.parametrize("score", ["capture", "variance", "hull"])
@pytest.mark.parametrize("site", ["producer", "consumer"])
def test_permuting_channels_permutes_scores(score, site):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    one, other = residual(), reorder(residual(), order)
    torch.testing.assert_close(one(LOADER[0][0]), other(LOADER[0][0]), rtol=1e-4, atol=1e-5)
    plain, permuted = (
        TwoAxisImportance(statistics(net), score, site=site)(full_group(net, "second")) for net in (one, other)
    )
    torch.testing.assert_close(permuted, plain[order], rtol=1e-4, atol=1e-5)


def test_partial_groups_give_as_many_values_in_their_order():
    net = network(Split)
    importance = TwoAxisImportance(statistics(net), "capture", normalizer=None, site="consumer")
    whole = importance(full_group(net, "stem"))
    graph = tp.DependencyGraph().build_dependency(net, X, verbose=False)
    for chosen in ([6, 2, 5], [4, 1]):
        part = graph.get_pruning_group(net.stem, tp.prune_conv_out_channels, list(chosen))
        torch.testing.assert_close(importance(part), whole[chosen])


@pytest.mark.parametrize(
    ("cls", "options"),
    [(TwoAxisImportance, {"score": "capture"}), (LocalImportance, {"score": "capture"}), (HullImportance, {})],
)
def test_works_in_the_host_and_in_the_planner(cls, options):
    net = conv_net()
    importance = cls(statistics(net), site="consumer", **options)
    fresh = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "channel_groups": {}}
    # without ignored_layers: the classifier's outputs are declined and stay
    tp.pruner.BasePruner(net, X, importance=importance, pruning_ratio=0.5, global_pruning=True, **fresh).step()
    assert net.fc.out_features == 5
    assert net.conv1.out_channels < 16
    net = conv_net()
    importance = cls(statistics(net), site="consumer", **options)
    report = prune_to_flops(net, X, importance, flops=0.5, repair=(), tolerance=0.1, progress=False)
    assert report.achieved == pytest.approx(0.5, rel=0.1)


def test_outputs_that_nobody_reads_are_declined():
    net = residual()
    assert TwoAxisImportance(statistics(net), "capture", site="consumer")(full_group(net, "fc")) is None
    assert TwoAxisImportance(statistics(net))(full_group(net, "fc")) is not None


@pytest.mark.parametrize("layer", ["first", "second", "fc"])
def test_changed_producers_and_consumers_raise(layer):
    net = residual()
    importance = TwoAxisImportance(statistics(net), "capture", site="consumer")
    importance(full_group(net, "first"))
    net.get_submodule(layer).weight.data += 0.1  # leaves no trace in the version
    with pytest.raises(StaleStatisticsError, match=f"{layer}: its parameters or running statistics are not those"):
        importance(full_group(net, "first"))


def test_a_loader_records_inputs_anew():
    net = residual()
    stats = statistics(net)
    importance = TwoAxisImportance(stats, "variance", site="consumer", loader=LOADER)
    before = importance(full_group(net, "first"))
    with torch.no_grad():
        net.first.weight[2] *= 9.0
    after = importance(full_group(net, "first"))
    assert after[2] > 2 * before[2]
    assert importance.stats is not stats
    assert importance.stats.consumers


def test_sites_are_checked():
    net = residual()
    with pytest.raises(TwoAxisError, match="site: expected one of producer, consumer, got 'both'"):
        TwoAxisImportance(statistics(net), site="both")(full_group(net, "first"))


def test_statistics_without_inputs_say_how_to_get_them():
    net = residual()
    with pytest.raises(TwoAxisError, match=r"group of first.*\(second, fc\), got none for 6 of 6.*consumers=True\)$"):
        TwoAxisImportance(statistics(net, consumers=False), "capture", site="consumer")(full_group(net, "first"))


def test_channels_that_no_recorded_layer_reads_are_counted(monkeypatch):
    net = network(Split)
    with pytest.raises(TwoAxisError, match=r"group of stem.*got none for 3 of 8 channels; record them with layers="):
        TwoAxisImportance(statistics(net, layers=["stem", "left"]), "capture", site="consumer")(full_group(net, "stem"))
    monkeypatch.setattr(recorder, "WIDEST_INPUT", 20)
    net = residual()
    narrow = statistics(net)  # the flattening reader is too wide; the convolution is enough
    assert narrow["fc"].inputs is None
    got = TwoAxisImportance(narrow, "capture", site="consumer", normalizer=None)(full_group(net, "first"))
    expected = TwoAxisImportance(narrow, "capture", site="consumer").layer_scores("second")
    torch.testing.assert_close(got, expected.float())


def test_inputs_that_a_consumer_does_not_have_are_named():
    net = network(lambda: Split(left_first=False))
    with pytest.raises(TwoAxisError, match=r"group of stem.*inputs of Conv2d\(3, 4.*, got number 4 from Torch-Pruning"):
        TwoAxisImportance(statistics(net), "capture", site="consumer")(full_group(net, "stem"))


@pytest.mark.parametrize("score", [name for name, entry in SCORES.items() if entry.axis == "target"])
def test_target_scores_say_where_they_are_defined(score):
    net = residual()
    with pytest.raises(TwoAxisError, match=r"input of (second|fc): expected.*needs.*take site='producer'"):
        TwoAxisImportance(statistics(net), score, site="consumer")(full_group(net, "first"))


def test_a_score_of_weights_says_that_inputs_have_none():
    net = residual()
    with pytest.raises(TwoAxisError, match=r"needs weight norms.*or score='capture'"):
        TwoAxisImportance(statistics(net), "norm-local", site="consumer")(full_group(net, "first"))
    assert TwoAxisImportance(statistics(net), site="consumer")(full_group(net, "first")) is not None


def test_functions_see_the_inputs():
    net = residual()
    importance = TwoAxisImportance(statistics(net), lambda layer: layer.mean.abs(), site="consumer")
    read = importance.layer_statistics("fc")
    torch.testing.assert_close(importance.layer_scores("fc"), evaluate(lambda layer: layer.mean.abs(), read))
    assert read.num_channels == 24
    assert repr(TwoAxisImportance(statistics(net), "capture", site="consumer")).endswith(
        "normalizer='median', site='consumer')"
    )
