"""Pruning in steps: the target, the floors, one numbering and one repair for all steps, and no trace after an error."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import timm
import torch
import torch_pruning as tp
from cases import batches, conv_net
from pruning_cases import Gram, LateFailure, assert_unchanged, everything
from torch import nn

from tp_twoaxis import (
    HybridImportance,
    TwoAxisError,
    TwoAxisImportance,
    calibrate,
    load_pruned,
    prune_to_flops,
    save_pruned,
)
from tp_twoaxis.dependency.channel_masks import pruned_channels
from tp_twoaxis.dependency.flops import count_macs
from tp_twoaxis.dependency.graph import build_graph, group_key
from tp_twoaxis.dependency.removal import remove, removed_channels
from tp_twoaxis.dependency.validation import verified_groups
from tp_twoaxis.errors import UnreachableTargetError
from tp_twoaxis.importance.baselines.activation_criteria import VBPImportance
from tp_twoaxis.importance.baselines.gradient_criteria import TaylorBNImportance
from tp_twoaxis.models import cifar_resnet20_conv_shortcut, cifar_resnet20_option_a
from tp_twoaxis.pruning.checkpoint import read_header
from tp_twoaxis.pruning.iterate import step_shares
from tp_twoaxis.repair import REPAIRS, refits, repair_network
from tp_twoaxis.runtime import progress_bar
from tp_twoaxis.runtime.timing import timed
from tp_twoaxis.scores.named_scores import SCORES, cap_a, capture

NETS = {
    "conv_net": (lambda: conv_net(width=32), 8),
    "option_a": (cifar_resnet20_option_a, 16),
    "option_b": (cifar_resnet20_conv_shortcut, 16),
    "vit_tiny": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=5),
        16,
    ),
}


@functools.cache
def dense(name):
    make, _ = NETS[name]
    torch.manual_seed(0)
    return make().eval()


def build(name):
    size = NETS[name][1]
    return copy.deepcopy(dense(name)), torch.zeros(1, 3, size, size), batches(32, 16, size=size)


def prune(net, x, importance="capture", **options):
    options = {"repair": (), "steps": 3, "progress": False, **options}
    return prune_to_flops(net, x, importance, **options)


def replay(net, x, report):
    """Remove from a dense network, at once, what a report says; give the channels that each layer lost."""
    graph = build_graph(net, x)
    groups, _ = verified_groups(graph, net, x, [])
    everywhere = {group.name: sorted(group.kept + group.removed) for group in report.groups}
    assert everywhere == {group_key(group): sorted(group.channels) for group in groups}
    removed = {group.name: group.removed for group in report.groups}
    leaving = {group_key(group): np.isin(group.channels, removed[group_key(group)]) for group in groups}
    assert removed_channels(groups, leaving, net) == report.removed_channels
    masks = pruned_channels(groups, leaving, net)
    remove(graph, groups, leaving)
    return masks


def assert_same(net, other):
    values = other.state_dict()
    assert list(net.state_dict()) == list(values)
    for name, value in net.state_dict().items():
        assert torch.equal(value, values[name]), name


def test_shares_fall_by_the_same_factor():
    shares = step_shares(0.3, 4)
    assert shares[-1] == 0.3
    assert len(shares) == 4
    factors = np.array(shares) / np.array([1.0, *shares[:-1]])
    assert np.allclose(factors, factors[0])
    assert step_shares(0.37, 1) == [0.37]
    assert step_shares(1.0, 3) == [1.0] * 3


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("flops", [0.6, 0.3])
def test_the_target_is_met_and_one_removal_says_it_all(name, flops):
    net, x, data = build(name)
    report = prune(net, x, flops=flops, loader=data)
    assert report.steps == 3
    assert abs(report.achieved - flops) <= 0.01 * flops
    assert report.after.macs == count_macs(net, x).total
    assert report.before.macs == count_macs(dense(name), x).total
    at_once = copy.deepcopy(dense(name))
    replay(at_once, x, report)
    assert_same(net, at_once)
    images = torch.cat([images for images, _ in data])
    assert torch.equal(net(images), at_once(images))


@pytest.mark.parametrize(
    ("name", "repair"),
    [
        *(("option_b", repair) for repair in REPAIRS if refits([repair])),
        ("vit_tiny", "sequential"),
    ],
)
def test_the_last_repair_is_that_of_the_same_channels_removed_at_once(name, repair):
    net, x, data = build(name)
    stats = calibrate(net, data, consumers=True, progress=False)
    report = prune(net, x, flops=0.5, steps=2, repair=(repair, "bn"), loader=data, stats=stats, training_steps=3)
    at_once = copy.deepcopy(dense(name))
    masks = replay(at_once, x, report)
    repaired = repair_network(
        at_once, dense(name), masks, (repair, "bn"), loader=data, stats=stats, training_steps=3, progress=False
    )
    images = torch.cat([images for images, _ in data])
    torch.testing.assert_close(net(images), at_once(images), rtol=1e-4, atol=1e-5)
    assert [c.layer for c in report.consumers] == [c.layer for c in repaired.consumers]
    assert [c.kept for c in report.consumers] == [c.kept for c in repaired.consumers]
    channels = [[removed.channel for removed in c.removed] for c in report.consumers]
    assert channels == [[removed.channel for removed in c.removed] for c in repaired.consumers]


def test_later_steps_score_the_repaired_network():
    net, x, data = build("conv_net")
    seen = []

    def importance(group):
        layer = group[0].dep.target.module
        if layer.out_channels == net.conv1.out_channels:
            seen.append(net.conv2.weight.detach().clone())
        return torch.arange(len(group[0].idxs)).float()

    report = prune(net, x, importance, flops=0.4, steps=2, repair=("ridge",), loader=data)
    first, second = seen[0], seen[-1]
    assert torch.equal(first, dense("conv_net").conv2.weight)
    gone = len(first) - len(second)
    assert 0 < gone < len(report.removed_channels["conv1"])
    # the lowest numbers left; what they supplied is in those that stayed
    assert not torch.allclose(second, first[gone:, gone:])


@pytest.mark.parametrize("name", ["option_a", "option_b", "vit_tiny"])
def test_floors_and_rounding_are_of_the_dense_width(name):
    net, x, data = build(name)
    report = prune(net, x, flops=0.62, min_keep=0.7, round_to=2, steps=4, loader=data)
    assert abs(report.achieved - 0.62) <= 0.0062
    at_floor = 0
    for group in report.groups:
        width = len(group.kept) + len(group.removed)
        floor = max(1, math.ceil(0.7 * width))
        assert len(group.kept) >= floor
        assert len(group.kept) % 2 == 0 or not group.removed
        at_floor += len(group.kept) - floor < 2
    assert at_floor  # or this says nothing


@pytest.mark.parametrize("round_to", [None, 2])
@pytest.mark.parametrize("flops", [0.7, 0.4])
def test_scores_that_do_not_change_make_the_number_of_steps_irrelevant(flops, round_to):
    removed = []
    for steps in (1, 4):
        net, x, _ = build("option_b")
        torch.manual_seed(1)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.1, 1.0)
        importance = tp.importance.BNScaleImportance(normalizer=None)
        report = prune(net, x, importance, flops=flops, round_to=round_to, steps=steps)
        removed.append(report.removed_channels)
    assert removed[0] == removed[1]


def test_channels_as_the_budget():
    net, x, data = build("option_a")
    report = prune(net, x, flops=0.5, budget="channels", loader=data)
    kept, removed = (sum(len(getattr(g, what)) for g in report.groups) for what in ("kept", "removed"))
    assert report.achieved == pytest.approx(kept / (kept + removed))
    assert report.achieved == pytest.approx(0.5, abs=0.005)


def test_costs_that_no_group_explains_are_corrected_in_every_step():
    torch.manual_seed(0)
    net = Gram()
    report = prune(net, torch.zeros(1, 3, 8, 8), lambda group: torch.arange(len(group[0].idxs)).float(), flops=0.75)
    assert abs(report.achieved - 0.75) <= 0.0075


@pytest.mark.parametrize("consumer", [False, True])
def test_scores_are_told_what_earlier_steps_removed(consumer):
    net, x, data = build("conv_net")
    seen = {}

    def score(layer, removed=0.0):
        seen.setdefault(layer.name.removeprefix("input of "), []).append((removed, layer.num_channels))
        return layer.variance

    stats = calibrate(net, data, consumers=True, progress=False)
    importance = TwoAxisImportance(stats, score, site="consumer" if consumer else "producer")
    prune(net, x, importance, flops=0.3, loader=data, round_to=1)
    for name, recorded in seen.items():
        width = recorded[0][1]
        assert recorded[0][0] == 0.0
        assert len(recorded) == 3
        for share, channels in recorded:
            assert share == pytest.approx(1 - channels / width)
        shares = [share for share, _ in recorded]
        assert shares == sorted(shares), name
    assert max(recorded[-1][0] for recorded in seen.values()) > 0.2
    assert importance.stats is stats
    assert importance._removed == {}


def test_cap_a_is_annealed_unless_its_share_is_set_by_hand(monkeypatch):
    shares = []

    @functools.wraps(cap_a)
    def spy(layer, overlap=0.3, removed=0.0):
        shares.append(removed)
        return cap_a(layer, overlap, removed)

    monkeypatch.setitem(SCORES, "cap-a", SCORES["cap-a"].__class__(spy, "local", ""))
    net, x, data = build("conv_net")
    prune(net, x, "cap-a", flops=0.3, loader=data)
    per_step = len(shares) // 3
    means = [sum(shares[i * per_step : (i + 1) * per_step]) / per_step for i in range(3)]
    assert means[0] == 0.0 < means[1] < means[2]

    shares.clear()
    net, x, data = build("conv_net")
    by_hand = TwoAxisImportance(calibrate(net, data, progress=False), functools.partial(spy, removed=0.5))
    prune(net, x, by_hand, flops=0.3, loader=data)
    assert set(shares) == {0.5}


def test_statistics_serve_the_first_step_and_are_gathered_anew_alike():
    net, x, data = build("conv_net")
    stats = calibrate(net, data[:1], target="correct_logit", progress=False)
    seen = []

    def score(layer):
        seen.append((layer.num_images, layer.target, layer.num_channels))
        return capture(layer)

    prune(net, x, TwoAxisImportance(stats, score), flops=0.5, steps=2, loader=data)
    assert {images for images, _, _ in seen} == {16, 32}
    assert {target for _, target, _ in seen} == {"correct_logit"}
    assert [images for images, _, _ in seen] == sorted(images for images, _, _ in seen)


def test_an_importances_own_loader_comes_first():
    net, x, data = build("conv_net")
    own = TwoAxisImportance(calibrate(net, data, progress=False), loader=data)
    prune(net, x, own, flops=0.5, steps=2)
    assert own.stats["conv1"].num_channels == 32


@pytest.mark.parametrize(
    "name",
    [
        "l2",
        "random",
        "taylor",
        "taylor-bn",
        "taylor-group",
        "hessian",
        "host-hessian",
        "vbp",
        "hybrid",
        "hybrid(ranking='cap-a')",
    ],
)
def test_criteria_by_name(name):
    net, x, data = build("conv_net")
    report = prune(net, x, name, flops=0.4, steps=2, repair=("ridge", "bn"), loader=data)
    assert abs(report.achieved - 0.4) <= 0.004
    assert report.importance == name
    assert all(parameter.grad is None for parameter in net.parameters())


def test_objects_that_gather_are_copied():
    net, x, data = build("conv_net")
    importance = VBPImportance.calibrate(net, data, progress=False)
    before = importance.statistics
    report = prune(net, x, HybridImportance("l2", importance), flops=0.4, loader=data)
    assert abs(report.achieved - 0.4) <= 0.004
    assert importance.statistics is before


def test_weights_alone_need_no_images():
    net, x, _ = build("conv_net")
    report = prune(net, x, tp.importance.MagnitudeImportance(), flops=0.4)
    assert abs(report.achieved - 0.4) <= 0.004


def test_frozen_parameters_and_modes_come_back():
    net, x, data = build("option_b")
    net.train()
    net.conv1.weight.requires_grad_(False)
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    modes = [module.training for module in net.modules()]
    prune(net, x, "taylor-bn", flops=0.5, steps=2, repair=("bn",), loader=data)
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == frozen
    assert [module.training for module in net.modules()] == modes


def test_round_trip_through_a_file(tmp_path):
    net, x, data = build("option_b")
    report = prune(net, x, flops=0.4, repair=("sequential",), loader=data)
    path = tmp_path / "net.safetensors"
    save_pruned(net, path, report)
    again = load_pruned(path, cifar_resnet20_conv_shortcut)
    images = torch.cat([images for images, _ in data])
    assert torch.equal(again(images), net(images))
    assert json.loads(read_header(path)["report"])["steps"] == 3
    assert "in 3 steps" in str(report)


def test_the_step_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(progress_bar, "INTERVAL", 0.0)
    net, x, data = build("conv_net")
    prune(net, x, flops=0.6, steps=2, loader=data, progress=True)
    shown = capsys.readouterr().err
    assert "step 1 of 2" in shown
    assert "step 2 of 2" in shown


TAYLOR = tp.importance.TaylorImportance()


@pytest.mark.parametrize(
    ("importance", "options", "message"),
    [
        ("capture", {"steps": 0}, "steps: expected a whole number of at least 1, got 0"),
        ("capture", {"steps": 2.0}, "whole number"),
        ("capture", {"steps": True}, "whole number"),
        ("capture", {"loader": None}, r"steps=3: capture looks at .* expected loader"),
        ("taylor", {"loader": None}, "steps=3: taylor looks at"),
        ("capture", {"loader": iter(batches())}, r"more than once.*list\(loader\)"),
        (TAYLOR, {}, r"TaylorImportance reads .* by name"),
        (TaylorBNImportance(), {}, "TaylorBNImportance reads"),
        (tp.importance.OBDCImportance(), {}, "OBDCImportance reads"),
        (HybridImportance(TAYLOR, tp.importance.MagnitudeImportance()), {}, "TaylorImportance reads"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_removed(importance, options, message, monkeypatch):
    net, x, data = build("conv_net")
    stats = calibrate(net, data, progress=False)
    monkeypatch.setattr("tp_twoaxis.pruning.step.remove", None)
    before = everything(net)
    with pytest.raises(TwoAxisError, match=message):
        prune(net, x, importance, **{"stats": stats, "loader": data, **options})
    assert_unchanged(net, before)


@pytest.mark.parametrize("options", [{"flops": 0.005}, {"flops": 0.5, "min_keep": 0.9}])
def test_a_target_out_of_reach_is_found_before_anything_is_removed(options, monkeypatch):
    net, x, data = build("conv_net")
    monkeypatch.setattr("tp_twoaxis.pruning.step.remove", None)
    before = everything(net)
    with pytest.raises(UnreachableTargetError, match=f"^flops={options['flops']}: expected a target between"):
        prune(net, x, loader=data, steps=5, **options)
    assert_unchanged(net, before)


class ReadsGradients:
    """A user's criterion that this package cannot know."""

    def __call__(self, group):
        layer = group[0].dep.target.module
        return (layer.weight * layer.weight.grad).flatten(1).abs().sum(1)


class WorksOnce:
    """Iterates over its batches once, and breaks later."""

    def __init__(self, data):
        self.data, self.rounds = data, 0

    def __iter__(self):
        self.rounds += 1
        return iter(self.data if self.rounds == 1 else LateFailure(self.data))


@pytest.mark.parametrize(
    ("importance", "loader", "message"),
    [
        (
            ReadsGradients(),
            batches(),
            r"^step 2 of 3: ReadsGradients failed .*TypeError.* need loss\.backward",
        ),
        ("capture", WorksOnce(batches()), "^step 2 of 3: .*disk gone"),
    ],
)
def test_a_later_steps_failure_leaves_no_trace(importance, loader, message):
    net, x, data = build("conv_net")
    net.train()
    nn.functional.cross_entropy(net(data[0][0]), data[0][1]).backward()
    gradients = [parameter.grad for parameter in net.parameters()]
    before = everything(net)
    with pytest.raises(TwoAxisError, match=message):
        prune(net, x, importance, flops=0.5, loader=loader)
    assert_unchanged(net, before)
    assert all(p.grad is grad for p, grad in zip(net.parameters(), gradients, strict=True))


def test_seconds_add_up_over_the_steps():
    seconds = {}
    for _ in range(2):
        with timed(seconds, "a"):
            pass
    assert list(seconds) == ["a"]
    net, x, data = build("conv_net")
    report = prune(net, x, flops=0.5, steps=2, repair=("ridge", "bn"), loader=data)
    assert {"calibrate", "graph", "score", "plan", "remove", "count", "repair", "repair/ridge"} <= set(report.seconds)
