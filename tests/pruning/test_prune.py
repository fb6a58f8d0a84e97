"""prune_to_flops end to end: targets met, the right channels gone, and no trace after an error."""

import copy
import gc
import json
import weakref

import pytest
import timm
import torch
import torch_pruning as tp
import torchvision
from cases import batches, conv_net
from pruning_cases import Gram, LateFailure, assert_unchanged, everything
from torch import nn

from tp_twoaxis import TwoAxisError, TwoAxisImportance, calibrate, load_pruned, prune_to_flops, save_pruned
from tp_twoaxis.dependency import other_counters
from tp_twoaxis.dependency.flops import count_macs
from tp_twoaxis.dependency.removal import GroupReport
from tp_twoaxis.errors import StaleStatisticsError, UnreachableTargetError
from tp_twoaxis.models import cifar_resnet20_conv_shortcut, cifar_resnet20_option_a
from tp_twoaxis.pruning.pruning_report import PruningReport, Size

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def vgg():
    layers = torchvision.models.vgg.make_layers([32, "M", 64, "M", 128, 128, "M", 256, "M"], batch_norm=True)
    return nn.Sequential(layers, nn.Flatten(), nn.Linear(256 * 4, 64), nn.ReLU(), nn.Linear(64, 5))


NETS = {
    "conv_net": (lambda: conv_net(width=64), 8),
    "option_a": (cifar_resnet20_option_a, 16),
    "option_b": (cifar_resnet20_conv_shortcut, 16),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.5), 32),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), 32),
    "vgg": (vgg, 32),
    "convnext": (lambda: timm.models.convnext.ConvNeXt(num_classes=5, depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)), 32),
    "torchvision_convnext": (
        lambda: torchvision.models.ConvNeXt(
            [
                torchvision.models.convnext.CNBlockConfig(24, 48, 1),
                torchvision.models.convnext.CNBlockConfig(48, None, 1),
            ],
            num_classes=5,
        ),
        32,
    ),
    "vit": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=5), 32),
    "deit_tiny": (
        lambda: timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=5, depth=3),
        64,
    ),
}


class Random(tp.importance.Importance):
    """Reproducible scores that do not look at anything."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, group):
        return torch.rand(len(group[0].idxs), generator=self.generator)


def build(name):
    torch.manual_seed(0)
    make, size = NETS[name]
    return make().eval(), torch.randn(2, 3, size, size)[:1]


def prune(net, x=X, importance=None, **options):
    options = {"repair": (), "progress": False, **options}
    return prune_to_flops(net, x, importance or Random(), **options)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("flops", [0.7, 0.35])
def test_targets_are_met_and_the_network_trains(name, flops):
    net, x = build(name)
    dense = count_macs(net, x)
    report = prune(net, x, flops=flops)
    assert count_macs(net, x).total == report.after.macs
    assert report.before.macs == dense.total
    assert report.achieved == pytest.approx(report.after.macs / dense.total)
    assert abs(report.achieved - flops) <= 0.01 * flops
    assert report.after.params == sum(p.numel() for p in net.parameters()) < dense.params
    for group in report.groups:
        assert len(group.kept) >= 0.1 * (len(group.kept) + len(group.removed))
    net.train()
    net(torch.cat([x, x + 1])).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert {int(n) for n in net(torch.cat([x, x])).shape} == {2, count_outputs(net)}


def count_outputs(net):
    return [m for m in net.modules() if isinstance(m, nn.Linear)][-1].out_features


@pytest.mark.parametrize("name", ["conv_net", "option_a", "option_b", "vgg", "resnet18", "mobilenet_v2"])
def test_removal_is_silencing(name):
    """A removed channel's consumers get exactly what they would get if it had been 0 there."""
    net, x = build(name)
    for module in net.modules():  # BN that maps 0 to 0, so that silencing at the producer reaches every consumer
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.bias)
            nn.init.zeros_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    dense = copy.deepcopy(net)
    report = prune(net, x, flops=0.5)
    assert report.removed_channels
    for layer, channels in report.removed_channels.items():
        module = dense.get_submodule(layer)
        with torch.no_grad():
            module.weight[channels] = 0
            if module.bias is not None:
                module.bias[channels] = 0
    torch.testing.assert_close(net(x), dense(x), rtol=1e-3, atol=1e-4)


def test_report_lists_the_channels_that_survive_and_they_are_the_highest():
    net, dense = conv_net(), conv_net()
    stats = calibrate(dense, batches(), progress=False)
    report = prune(net, importance="capture", stats=stats, flops=0.5)
    scores = TwoAxisImportance(stats, "capture")
    graph = tp.DependencyGraph().build_dependency(dense, X)
    threshold = []
    for group in graph.get_all_groups(ignored_layers=[dense.fc]):
        entry = next(g for g in report.groups if g.name == graph._module2name[group[0].dep.target.module])
        values = scores(group)
        assert sorted(entry.kept + entry.removed) == list(range(len(values)))
        if entry.removed:
            assert values[entry.removed].max() <= values[entry.kept].min()
            threshold.append((values[entry.removed].max(), values[entry.kept].min()))
    assert threshold
    removed = report.removed_channels
    for layer, reads in (("conv1", None), ("conv2", "conv1"), ("depthwise", None), ("reduce", "depthwise")):
        module, old = net.get_submodule(layer), dense.get_submodule(layer).weight
        kept = [k for k in range(old.shape[0]) if k not in removed.get(layer, [])]
        inputs = [k for k in range(old.shape[1]) if k not in (removed.get(reads, []) if reads else [])]
        assert torch.equal(module.weight, old[kept][:, inputs])
    pixels = [4 * k + i for k in range(8) if k not in removed.get("reduce", []) for i in range(4)]
    assert torch.equal(net.fc.weight, dense.fc.weight[:, pixels])
    assert removed["conv1"] == removed["conv2"] == removed["depthwise"]


def test_option_a_weights_match_the_report_in_every_stage():
    net, x = build("option_a")
    dense = copy.deepcopy(net)
    report = prune(net, x, flops=0.4)
    rewritten = 0
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            removed = set(report.removed_channels.get(name, []))
            old = dense.get_submodule(name)
            kept = [k for k in range(old.out_channels) if k not in removed]
            assert module.out_channels == len(kept)
            bn = name.replace("conv", "bn")
            dense_bn = dense.get_submodule(bn)
            # a marker that belongs to the channel: its BN's weight
            assert torch.equal(net.get_submodule(bn).weight, dense_bn.weight[kept])
            rewritten += bool(removed)
    assert rewritten > 10


def test_importance_by_name_from_a_loader_and_wrapped():
    by_stats, by_loader, wrapped = conv_net(), conv_net(), nn.DataParallel(conv_net())
    data = batches()
    first = prune(by_stats, importance="task-mi", stats=calibrate(by_stats, data, progress=False))
    second = prune(by_loader, importance="task-mi", loader=data)
    third = prune(wrapped, importance="task-mi", loader=data)
    assert first.removed_channels == second.removed_channels == third.removed_channels
    assert first.importance == "task-mi"
    assert torch.equal(wrapped.module(X), by_stats(X))
    assert "calibrate" in second.seconds


def test_label_free_calibration_is_said():
    net = conv_net()
    report = prune(net, importance="task-mi", loader=[x for x, _ in batches()])
    assert any("predicted margin" in note for note in report.notes)


HOSTS = {
    "magnitude": tp.importance.GroupMagnitudeImportance,
    "lamp": tp.importance.LAMPImportance,
    "random": tp.importance.RandomImportance,
    "fpgm": tp.importance.FPGMImportance,
    "taylor": tp.importance.GroupTaylorImportance,
}


@pytest.mark.parametrize("name", HOSTS)
def test_torch_prunings_importances(name):
    net = conv_net()
    if name == "taylor":
        net(X).square().sum().backward()
    report = prune(net, importance=HOSTS[name](), flops=0.6)
    assert abs(report.achieved - 0.6) < 0.006
    assert report.importance == HOSTS[name].__name__
    net(X)


def test_bn_scale_declines_groups_without_bn():
    net = conv_net()
    report = prune(net, importance=tp.importance.BNScaleImportance(), flops=0.6)
    assert any("reduce: BNScaleImportance gave no scores" in note for note in report.notes)
    assert net.reduce.out_channels == 8
    assert net.conv1.out_channels < 16


def failing(kind):
    def score(group):
        n = len(group[0].idxs)
        if kind == "raises":
            raise KeyError("inside")
        return {
            "short": torch.ones(n - 1),
            "long": torch.ones(n + 8),
            "matrix": torch.ones(n, 1),
            "nan": torch.full((n,), torch.nan),
            "inf": torch.full((n,), torch.inf),
            "numpy": torch.ones(n).numpy(),
        }[kind]

    return score


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (failing("raises"), r"failed on the group of .* \(KeyError"),
        (failing("short"), "expected a tensor of .* scores"),
        (failing("long"), "expected a tensor of .* scores"),
        (failing("matrix"), "expected a tensor of .* scores"),
        (failing("numpy"), "got ndarray"),
        (failing("nan"), "finite scores"),
        (failing("inf"), "finite scores"),
        (tp.importance.GroupTaylorImportance(), r"loss\.backward\(\) before"),
        (lambda group: None, "range.*gave no scores"),
        ("captur", "did you mean 'capture'"),
        (3, "importance: expected a Torch-Pruning importance or a criterion's name, got int"),
    ],
)
def test_failing_importances_leave_no_trace(importance, message):
    net = conv_net().train()
    net.bn1.eval()
    net.conv2.weight.requires_grad_(False)
    before = everything(net)
    with pytest.raises(TwoAxisError, match=message):
        prune(net, importance=importance, loader=batches())
    assert_unchanged(net, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"flops": 0.01}, UnreachableTargetError, "flops=0.01: expected a target between"),
        ({"flops": 0.5, "min_keep": 0.95}, UnreachableTargetError, "min_keep=0.95"),
        ({"flops": 0.5, "ignored_layers": ["conv1", "reduce"]}, UnreachableTargetError, "between 1.000 and 1"),
        ({"flops": 1.5}, TwoAxisError, "share of MACs to keep"),
        ({"repair": ("bn",)}, TwoAxisError, "pass loader"),
        ({"repair": ("bn",), "loader": LateFailure(batches())}, TwoAxisError, "batch 1 raised OSError: disk gone"),
        ({"repair": ("bn",), "loader": []}, TwoAxisError, "at least 2 images"),
        ({"repair": "glue", "loader": batches()}, TwoAxisError, "repair: expected one of"),
        ({"ignored_layers": ["conv9"]}, TwoAxisError, "no layer 'conv9'"),
        ({"ignored_layers": [nn.Conv2d(3, 3, 1)]}, TwoAxisError, "Conv2d is not part of this model"),
        ({"importance": "capture"}, TwoAxisError, r"expected stats=calibrate\(model, loader\)"),
        ({"x": torch.randn(1, 4, 8, 8)}, TwoAxisError, "does not run on example_inputs"),
    ],
)
def test_bad_requests_leave_no_trace(options, error, message):
    net = conv_net().train()
    before = everything(net)
    with pytest.raises(error, match=message):
        prune(net, **options)
    assert_unchanged(net, before)


class Hardcoded(nn.Module):
    """Its forward holds a width."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.conv(x).reshape(len(x), 16, -1).mean(2))


class GroupedUp(nn.Module):
    """Torch-Pruning cannot prune a grouped transposed convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.fc = nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2, groups=2), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.up(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(("make", "where"), [(Hardcoded, "in fc"), (GroupedUp, "Torch-Pruning could not remove")])
def test_networks_that_torch_pruning_breaks_come_back(make, where):
    torch.manual_seed(0)
    net = make()
    before = everything(net)
    expected = net(X)
    with pytest.raises(TwoAxisError, match=rf"stays whole, because the network does not go on .*{where}"):
        prune(net, importance=lambda group: torch.arange(len(group[0].idxs)).float(), flops=0.6, tolerance=0.2)
    assert_unchanged(net, before)
    assert torch.equal(net(X), expected)


class Auxiliary(nn.Module):
    """A head that runs in training only."""

    def __init__(self):
        super().__init__()
        self.conv, self.aux, self.fc = nn.Conv2d(3, 16, 1), nn.Linear(16, 5), nn.Linear(16, 5)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.fc(x) + self.aux(x) if self.training else self.fc(x)


def test_what_layers_that_run_in_training_only_read_stays_whole():
    with pytest.raises(TwoAxisError, match=r"conv: stays whole, because aux reads it in training mode"):
        prune(Auxiliary(), flops=0.6)


def test_layers_that_did_not_run_are_named():
    net = Auxiliary()
    net.spare = nn.Linear(16, 5)
    net.forward = lambda x: net.fc(net.conv(x).mean((2, 3)))
    report = prune(net, flops=0.6)
    assert any(note.startswith("aux, spare did not run on example_inputs") for note in report.notes)


def test_a_cost_that_the_model_cannot_attribute_is_corrected_by_measuring():
    torch.manual_seed(0)
    net = Gram()
    report = prune(net, importance=lambda group: torch.arange(len(group[0].idxs)).float(), flops=0.75)
    assert abs(report.achieved - 0.75) <= 0.0075
    assert count_macs(net, X).total == report.after.macs
    assert not report.notes


def test_a_target_that_is_missed_is_reported_as_it_is(monkeypatch):
    monkeypatch.setattr("tp_twoaxis.pruning.step.TRIES", 1)
    torch.manual_seed(0)
    net = Gram()
    report = prune(net, torch.randn(1, 3, 8, 8), lambda group: torch.arange(len(group[0].idxs)).float(), flops=0.75)
    assert abs(report.achieved - 0.75) > 0.0075
    assert any("cannot attribute" in note for note in report.notes)
    assert count_macs(net, X).total == report.after.macs
    assert net.mix.out_channels == 64 - len(report.removed_channels["mix"])


def test_stale_statistics_leave_no_trace():
    net = conv_net()
    stats = calibrate(net, batches(16), progress=False)
    prune(net, importance="capture", stats=stats, flops=0.7)
    before = everything(net)
    with pytest.raises(StaleStatisticsError):
        prune(net, importance="capture", stats=stats, flops=0.7)
    assert_unchanged(net, before)
    prune(net, importance=TwoAxisImportance(stats, loader=batches(16)), flops=0.7)
    assert net.conv1.out_channels < 16


def test_frozen_parameters_modes_and_outer_grad_mode():
    net = conv_net().train()
    net.bn2.eval()
    frozen = {"conv1.weight", "bn1.bias", "reduce.weight", "fc.bias"}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in frozen)
    modes = [m.training for m in net.modules()]
    with torch.no_grad():
        report = prune(net, flops=0.5)
    assert abs(report.achieved - 0.5) <= 0.005
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == frozen
    assert [m.training for m in net.modules()] == modes
    everything_frozen = conv_net().requires_grad_(False)
    assert abs(prune(everything_frozen, flops=0.5).achieved - 0.5) <= 0.005
    assert not any(p.requires_grad for p in everything_frozen.parameters())


def test_random_state_is_the_callers():
    net = conv_net()
    state = torch.get_rng_state()
    prune(net, repair=("bn",), loader=batches())
    assert torch.equal(torch.get_rng_state(), state)


def test_min_keep_and_round_to():
    net, x = build("option_b")
    report = prune(net, x, flops=0.5, min_keep=0.5)
    assert all(len(g.kept) >= len(g.removed) for g in report.groups)
    net, x = build("resnet18")
    report = prune(net, x, flops=0.5, round_to=8)
    assert all(len(g.kept) % 8 == 0 for g in report.groups)
    assert abs(report.achieved - 0.5) <= 0.005


def test_ignored_layers_by_name_and_module():
    by_name, by_module = conv_net(), conv_net()
    prune(by_name, flops=0.97, ignored_layers=["conv1"])
    prune(by_module, flops=0.97, ignored_layers=[by_module.conv1])
    assert by_name.conv1.out_channels == by_module.conv1.out_channels == 16
    assert by_name.reduce.out_channels == by_module.reduce.out_channels < 8


def test_flops_one_removes_nothing():
    net = conv_net()
    expected = net(X)
    report = prune(net, flops=1.0)
    assert report.achieved == 1.0
    assert report.removed_channels == {}
    assert torch.equal(net(X), expected)


def test_example_inputs_as_tuple_and_dict():
    reports = [prune(conv_net(), x, flops=0.6) for x in (X, (X,), {"x": X})]
    assert reports[0].removed_channels == reports[1].removed_channels == reports[2].removed_channels


def test_repair_brings_bn_to_the_pruned_networks_statistics():
    repaired, cut, data = conv_net(), conv_net(), batches(48, 48)
    report = prune(repaired, repair=("bn",), loader=data)
    assert report.repair == ["bn"]
    assert prune(cut).repair == []
    seen = repaired.conv1(data[0][0])
    torch.testing.assert_close(repaired.bn1.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(cut.bn1.running_mean, seen.mean((0, 2, 3)), atol=1e-3)
    assert torch.equal(repaired.conv1.weight, cut.conv1.weight)


def test_report_json_text_and_latency():
    net = conv_net()
    report = prune(net, latency=True, repair=("bn",), loader=batches(16))
    data = json.loads(report.to_json())
    data["before"], data["after"] = Size(**data["before"]), Size(**data["after"])
    data["groups"] = [GroupReport(**group) for group in data["groups"]]
    data["latency_ms"] = {key: tuple(value) for key, value in data["latency_ms"].items()}
    assert PruningReport(**data) == report
    assert set(report.latency_ms) == {"batch 1", "batch 64"}
    assert all(before > 0 and after > 0 for before, after in report.latency_ms.values())
    assert "kept 5" in str(report) or "kept 4" in str(report)
    assert {"count", "graph", "score", "plan", "remove", "repair"} <= set(report.seconds)


def test_other_counters_run_when_they_are_asked_for(monkeypatch):
    asked = []
    for name in ("tp_macs", "thop_macs"):

        def count(net, x, name=name):
            asked.append(name)
            return getattr(other_counters, name)(net, x)

        monkeypatch.setattr(f"tp_twoaxis.pruning.prune.{name}", count)
    report = prune(conv_net(), flops=0.6)
    assert not asked
    assert {report.before.tp_macs, report.before.thop_macs, report.after.tp_macs, report.after.thop_macs} == {None}
    net = conv_net()
    dense = other_counters.tp_macs(net, X), other_counters.thop_macs(net, X)
    report = prune(net, flops=0.6, steps=2, other_counters=True)
    assert sorted(asked) == ["thop_macs"] * 2 + ["tp_macs"] * 2  # once before and once after, whatever the steps
    assert (report.before.tp_macs, report.before.thop_macs) == dense
    assert (report.after.tp_macs, report.after.thop_macs) == (
        other_counters.tp_macs(net, X),
        other_counters.thop_macs(net, X),
    )


def test_a_report_holds_no_part_of_the_network():
    net = conv_net()
    parts = [weakref.ref(part) for part in (net, *net.modules(), *net.parameters())]
    report = prune(net, flops=0.6, other_counters=True)
    del net
    gc.collect()
    assert report.after.macs < report.before.macs
    assert not any(part() is not None for part in parts)


@pytest.mark.parametrize("counter", ["tp_macs", "thop_macs"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_counter_that_fails_leaves_no_trace(monkeypatch, counter, call):
    calls = []

    def fail(net, x):
        calls.append(counter)
        if len(calls) == call:
            raise RuntimeError("it has no rule")
        return 1

    monkeypatch.setattr(f"tp_twoaxis.pruning.prune.{counter}", fail)
    net = conv_net()
    before = everything(net)
    with pytest.raises(RuntimeError, match="it has no rule"):
        prune(net, flops=0.6, other_counters=True)
    assert_unchanged(net, before)


def test_the_network_runs_five_times(monkeypatch):
    """Counted and its outputs noted, traced, marked twice, and counted again once it is pruned."""
    net, runs = conv_net(), []
    net.register_forward_hook(lambda module, _, output: runs.append(net.conv1.out_channels))
    report = prune(net, flops=0.6)
    assert report.after.macs < report.before.macs
    assert len(runs) == 5
    assert runs[:4] == [16] * 4
    assert runs[4] < 16


def test_saved_with_its_report(tmp_path):
    net = conv_net()
    report = prune(net, flops=0.6)
    save_pruned(net, tmp_path / "net.safetensors", report)
    loaded = load_pruned(tmp_path / "net.safetensors", conv_net)
    assert torch.equal(loaded(X), net(X))
    assert loaded.conv1.out_channels == net.conv1.out_channels


def test_pruning_twice_multiplies():
    net, x = build("option_b")
    dense = count_macs(net, x).total
    prune(net, x, flops=0.7)
    prune(net, x, flops=0.7)
    assert count_macs(net, x).total / dense == pytest.approx(0.49, rel=0.02)


def test_a_network_without_parameters():
    with pytest.raises(TwoAxisError, match="no parameters"):
        prune(nn.ReLU())


def test_a_budget_of_channels():
    net = conv_net(width=64)
    report = prune(net, importance=Random(), flops=0.5, budget="channels")
    kept = sum(len(group.kept) for group in report.groups)
    total = kept + sum(len(group.removed) for group in report.groups)
    assert report.achieved == kept / total == pytest.approx(0.5, abs=0.01)
    assert report.after.macs < 0.5 * report.before.macs  # both sides of a layer shrink
    assert "50.00% of the channels" in str(report)
    with pytest.raises(TwoAxisError, match="macs, channels"):
        prune(conv_net(), importance=Random(), budget="layers")
