"""Every criterion by name ranks groups, and says what it lacks."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch_pruning as tp
from cases import batches, conv_net
from torch import nn
from torch.nn import functional as F

from tp_twoaxis import TwoAxisError, TwoAxisImportance, calibrate, prune_to_flops
from tp_twoaxis.importance import CRITERIA, find_criterion, make_importance
from tp_twoaxis.importance.baselines.weight_criteria import RandomImportance
from tp_twoaxis.importance.pruning_state import Need
from tp_twoaxis.scores.named_scores import SCORES
from tp_twoaxis.statistics.gradients import accumulate_gradients


@pytest.fixture(scope="module")
def stats():
    return calibrate(conv_net(), batches(), gradients=True, consumers=True, progress=False)


def group_of(net, layer="conv1"):
    graph = tp.DependencyGraph().build_dependency(net, torch.zeros(1, 3, 8, 8))
    module = net.get_submodule(layer)
    return graph.get_pruning_group(module, tp.prune_conv_out_channels, list(range(module.out_channels)))


@pytest.mark.parametrize("name", CRITERIA)
def test_every_name_prunes(name, stats):
    net = conv_net()
    importance = make_importance(name, stats=stats, model=net, loader=batches(), progress=False)
    # a convolution without a BatchNorm, and behind it a flattening layer that Torch-Pruning's class stumbles over
    unfit = ["reduce"] if name in ("network-slimming", "host-activation") else []
    report = prune_to_flops(
        net, torch.zeros(1, 3, 8, 8), importance, flops=0.6, repair=(), ignored_layers=unfit, progress=False
    )
    assert report.achieved == pytest.approx(0.6, rel=0.1)
    assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 5)


def test_names_cover_all_scores():
    assert set(SCORES) < set(CRITERIA)
    assert {name for name, entry in CRITERIA.items() if entry.needs == ("statistics",)} == set(SCORES)
    assert find_criterion("taylor").needs == ("labels",)


def test_needs_come_alone_or_together():
    needing = {need: {name for name, entry in CRITERIA.items() if need in entry.needs} for need in get_args(Need)}
    assert needing["statistics"] == {*SCORES, "anticipating", "cap-qgw", "hybrid"}
    assert needing["gradients"] == {"cap-qgw"}
    assert needing["consumers"] == {"anticipating"}
    assert {"taylor", "hybrid"} <= needing["labels"]


@pytest.mark.parametrize("name", ["cap-qgw", "hybrid"])
def test_everything_needed_is_gathered(name):
    net = conv_net()
    made = make_importance(name, model=net, loader=batches(), progress=False)
    assert made.stats.num_images == 48
    assert made.stats.has_gradients == (name == "cap-qgw")
    assert (net.conv1.weight.grad is not None) == (name == "hybrid")
    report = prune_to_flops(
        conv_net(), torch.zeros(1, 3, 8, 8), name, flops=0.6, loader=batches(), repair=(), progress=False
    )
    assert report.achieved == pytest.approx(0.6, rel=0.1)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("cap-qgw", {}, r"gradients=True\), or model=... and loader=... with labels, got neither"),
        ("hybrid", {"stats": True}, "expected model=... and loader=... with labels"),
        (
            "cap-qgw",
            {"stats": True},
            r"with gradients, got some without; gather them with calibrate\(model, loa",
        ),
        ("cap-qgw", {"model": conv_net(), "loader": [batches()[0][0]]}, "needs labels and batch 0 has none"),
        ("hybrid", {"model": conv_net(), "loader": [batches()[0][0]]}, "expected labels, batch 0 has none"),
    ],
)
def test_what_a_criterion_needs_is_said(name, given, message):
    if "stats" in given:
        given = given | {"stats": calibrate(conv_net(), batches(), progress=False)}
    with pytest.raises(TwoAxisError, match=message):
        make_importance(name, progress=False, **given)


def test_scores_are_the_two_axis_importances(stats):
    group = group_of(conv_net())
    made = make_importance("capture", stats=stats)(group)
    assert torch.equal(made, TwoAxisImportance(stats, "capture")(group))


def test_magnitudes_are_those_of_torch_pruning():
    group = group_of(conv_net())
    assert torch.equal(make_importance("l1")(group), tp.importance.MagnitudeImportance(p=1)(group))
    assert torch.equal(make_importance("l2")(group), tp.importance.MagnitudeImportance(p=2)(group))


def test_calibrates_when_there_are_no_statistics(stats):
    group = group_of(conv_net())
    made = make_importance("task-mi", model=conv_net(), loader=batches(), progress=False)
    assert torch.equal(made(group), TwoAxisImportance(stats, "task-mi")(group))


@pytest.mark.parametrize("name", ["capture", "taylor"])
def test_what_is_missing_is_said(name):
    with pytest.raises(TwoAxisError, match="expected"):
        make_importance(name, model=conv_net())


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(TwoAxisError, match=r"capture.*module:factory.*, got 'tailor'; did you mean 'taylor'"):
        make_importance("tailor")


def test_random_is_fixed_by_its_seed_alone():
    first, second = group_of(conv_net(), "conv1"), group_of(conv_net(), "depthwise")
    state = torch.get_rng_state()
    one = RandomImportance(seed=1)
    a, b = one(first), one(second)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(RandomImportance(seed=1)(second), b)
    assert torch.equal(one(first), a)
    assert not torch.equal(RandomImportance(seed=2)(first), a)
    assert not torch.equal(a[: len(b)], b[: len(a)])
    assert float(torch.cat([a, b]).min()) >= 0.0
    assert float(torch.cat([a, b]).max()) < 1.0


def test_gradients_are_those_of_the_mean_loss_in_any_batches():
    images, labels = (torch.cat(parts) for parts in zip(*batches(images=40), strict=True))
    net = conv_net()
    F.cross_entropy(net(images), labels).backward()
    wanted = [p.grad.clone() for p in net.parameters()]
    net.train()
    used = accumulate_gradients(net, zip(images.split(16), labels.split(16), strict=True), progress=False)
    assert used == 40
    assert net.training
    for parameter, gradient in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert torch.equal(net.bn1.running_mean, conv_net().bn1.running_mean)
    assert accumulate_gradients(net, batches(images=40), max_images=20, progress=False) == 20


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([torch.zeros(2, 3, 8, 8)], "labels, batch 0 has none"),
        ([], "got none"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([0, 9]))], "class indices"),
    ],
)
def test_failed_gradients_leave_none(loader, message):
    net = conv_net()
    with pytest.raises(TwoAxisError, match=message):
        accumulate_gradients(net, loader, progress=False)
    assert all(p.grad is None for p in net.parameters())


def test_frozen_models_have_no_gradients():
    with pytest.raises(TwoAxisError, match="requires_grad_"):
        accumulate_gradients(nn.Linear(2, 2).requires_grad_(False), [], progress=False)
