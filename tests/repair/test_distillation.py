"""Training without labels: its loss by the formula, what it may change, and when it is undone."""

import copy

import pytest
import torch
from cases import batches, conv_net
from repair_cases import remove_channels
from torch import nn

from tp_twoaxis import prune_to_flops
from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.repair import distillation
from tp_twoaxis.repair.distillation import mix
from tp_twoaxis.repair.feature_distance import feature_distance
from tp_twoaxis.repair.images import RepairImages
from tp_twoaxis.repair.repair_task import RepairTask

X = torch.zeros(1, 3, 8, 8)


def broken(net=None, removed=None, x=X):
    net = conv_net() if net is None else net
    dense, masks = remove_channels(net, x, removed or {"conv1": [1, 4, 9], "reduce": [2]})
    return net, dense, masks


def task_of(net, dense, masks, loader, **options):
    return RepairTask(net, dense, masks, RepairImages(loader, None, False, **options))


def inputs_of(net, x):
    """What each layer reads, and the logits."""
    read = {}
    layers = {name: m for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    handles = [
        m.register_forward_pre_hook(lambda _, inputs, name=name: read.__setitem__(name, inputs[0]))
        for name, m in layers.items()
    ]
    with torch.no_grad():
        logits = net(x)
    for handle in handles:
        handle.remove()
    return read, logits


def loss_by_loops(net, dense, masks, x, power_images):
    read, logits = inputs_of(net, x)
    wanted, dense_logits = inputs_of(dense, x)
    basis, basis_logits = inputs_of(dense, power_images)
    terms = []
    for name in wanted:
        kept = (~masks[name].inputs).nonzero()[:, 0].tolist()
        error = power = 0.0
        for own, channel in enumerate(kept):
            error += float((read[name][:, own] - wanted[name][:, channel]).double().square().mean())
            power += float(basis[name][:, channel].double().var(correction=0))
        terms.append(error / power)
    error = sum(float((logits - dense_logits)[:, k].double().square().mean()) for k in range(logits.shape[1]))
    terms.append(error / sum(float(basis_logits[:, k].double().var(correction=0)) for k in range(logits.shape[1])))
    divergence = 0.0
    for own, target in zip((logits / 2).softmax(1), (dense_logits / 2).softmax(1), strict=True):
        divergence += float((target * (target / own).log()).sum()) / len(x)
    return sum(terms) / len(terms) + 0.1 * divergence


@pytest.mark.parametrize("hold_out", [True, False])
def test_the_loss_is_its_formula(hold_out):
    net, dense, masks = broken()
    x = torch.cat([images for images, _ in batches(40)])
    task = task_of(net, dense, masks, [x], hold_out=hold_out)
    with feature_distance(task) as distance:
        held_out = distance.held_out()
        basis = x[4::5] if hold_out else x[:7]
        if hold_out:
            assert held_out == pytest.approx(loss_by_loops(net, dense, masks, basis, basis), rel=1e-5)
        else:
            assert held_out is None
        inputs = task.images.held_out or RepairImages([x], None, False).held_out
        batch = inputs.replaced([x[:7]])
        assert float(distance(batch).detach()) == pytest.approx(
            loss_by_loops(net, dense, masks, x[:7], basis), rel=1e-5
        )


def test_the_gradient_is_that_of_the_loss():
    net, dense, masks = broken(conv_net().double(), x=X.double())
    task = task_of(net, dense, masks, [batches(40)[0][0].double()])
    weight = net.conv2.weight
    with feature_distance(task) as distance:
        distance.held_out()
        loss = distance(task.images.held_out)
        (gradient,) = torch.autograd.grad(loss, weight)
        direction, step = torch.randn_like(weight), 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(direction, alpha=sign * step)
                values.append(float(distance(task.images.held_out)))
                weight.add_(direction, alpha=-sign * step)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=1e-4)


class Reads(nn.Module):
    """Two layers read the same tensor; a third one's input is written over afterwards."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.a(x)
        y = self.b(x) + self.c(x)
        z = self.d(y.detach())
        return {"map": z, "mean": y.mul_(2.0).mean((2, 3))}


def test_what_several_layers_read_counts_once_and_what_is_written_over_is_left_out():
    torch.manual_seed(0)
    net = Reads().eval()
    masks = {
        name: PrunedChannels(torch.zeros(m.in_channels) > 0, torch.zeros(m.out_channels) > 0)
        for name, m in net.named_children()
    }
    task = task_of(net, copy.deepcopy(net), masks, [torch.randn(20, 3, 8, 8)])
    with feature_distance(task) as distance:
        pairs = distance._pairs(task.images.held_out)
        assert [call.layer for call in pairs] == ["a", "b", "", ""]
        assert distance.held_out() == 0.0


def prune(net, loader=None, **options):
    options = {"repair": "distill", "training_steps": 40, "progress": False} | options
    loader = batches(160, 32) if loader is None else loader
    return prune_to_flops(net, X, "capture", flops=0.5, loader=loader, **options)


def note_of(report):
    return next(note for note in report.notes if note.startswith("distill"))


def test_training_brings_the_network_nearer_on_images_that_it_did_not_see():
    net, joint = conv_net(), conv_net()
    prune(joint, repair="joint")
    report = prune(net)
    assert report.repair == ["distill"]
    assert {c.repair for c in report.consumers} == {"distill"}
    assert "trained without labels for 40 steps; on images held out the loss fell from" in note_of(report)
    assert "repair/distill" in report.seconds
    fresh = torch.cat([images for images, _ in batches(200, seed=5)])
    with torch.no_grad():
        target = conv_net()(fresh)
        assert (net(fresh) - target).square().mean() < (joint(fresh) - target).square().mean()


def test_the_same_images_give_the_same_weights_whatever_labels_they_have():
    one, two = conv_net(), conv_net()
    prune(one)
    torch.manual_seed(7)
    prune(two, [images for images, _ in batches(160, 32)])
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize("rate", [1e4, 1e30])
def test_what_does_harm_is_undone(monkeypatch, rate):
    monkeypatch.setattr(distillation, "RATES", (rate,))
    net, joint = conv_net(), conv_net()
    report = prune(net, training_steps=5)
    expected = prune(joint, repair="joint")
    assert "5 steps of training were undone" in note_of(report)
    assert [c.repair for c in report.consumers] == [c.repair for c in expected.consumers]
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), joint.state_dict().values(), strict=True))


def test_a_smaller_rate_is_tried_where_a_large_one_does_harm(monkeypatch):
    monkeypatch.setattr(distillation, "RATES", (1e4, 5e-3))
    assert "trained without labels" in note_of(prune(conv_net()))


def test_without_a_guard_all_images_are_trained_on_and_nothing_is_undone(monkeypatch):
    monkeypatch.setattr(distillation, "RATES", (0.5,))
    report = prune(conv_net(), guard=False, training_steps=3)
    assert note_of(report) == "distill: trained without labels for 3 steps"


def test_frozen_parameters_stay_frozen_and_ignored_layers_keep_their_weights():
    net, dense, masks = broken()
    net.conv2.weight.requires_grad_(False)
    before = net.conv1.weight
    statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
    task = task_of(net, dense, masks, batches(40))
    task.whole, task.training_steps = frozenset({"conv1"}), 10
    assert distillation.distill(task) == {}  # no consumers were listed
    assert net.conv1.weight is before
    assert not net.conv2.weight.requires_grad
    assert not torch.equal(net.conv2.weight, dense.conv2.weight[:, [c for c in range(16) if c not in (1, 4, 9)]])
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in net.named_buffers())


def test_shared_weights_stay_shared():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    net[4].weight = net[2].weight
    masks = {
        name: PrunedChannels(torch.zeros(m.in_features) > 0, torch.zeros(m.out_features) > 0)
        for name, m in net.named_children()
        if isinstance(m, nn.Linear)
    }
    dense = copy.deepcopy(net)
    with torch.no_grad():
        net[0].weight.mul_(1.2)
    old = net[2].weight
    task = task_of(net, dense, masks, [torch.randn(40, 6)])
    task.training_steps = 10
    distillation.distill(task)
    assert net[4].weight is net[2].weight
    assert net[2].weight is not old


def test_only_the_last_of_several_steps_trains():
    report = prune(conv_net(), steps=2)
    assert sum(note.startswith("distill: trained") for note in report.notes) == 1


def test_tokens_and_large_batches(monkeypatch):
    monkeypatch.setattr(distillation, "BATCH", 16)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 3)).eval()
    dense, x = copy.deepcopy(net), torch.randn(200, 9, 6)
    options = {"flops": 0.5, "loader": [x], "repair": "distill", "training_steps": 60, "progress": False}
    report = prune_to_flops(net, x[:1], "capture", **options)
    assert "trained without labels" in note_of(report)
    fresh = torch.randn(100, 9, 6)
    with torch.no_grad():
        assert (net(fresh) - dense(fresh)).square().mean() < dense(fresh).var()


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_steps_that_are_no_number_of_steps(steps):
    with pytest.raises(TwoAxisError, match="training_steps: expected a whole number of at least 1, got"):
        prune(conv_net(), training_steps=steps)


def test_mixtures_are_between_two_images():
    x = torch.tensor([0.0, 1.0, 10.0, 100.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    generator = torch.Generator().manual_seed(0)
    mixed = torch.stack([mix(x, generator) for _ in range(200)])
    assert (mixed.amax((2, 3, 4)) - mixed.amin((2, 3, 4))).max() < 1e-4  # an image is mixed as a whole
    assert mixed.min() >= 0
    assert mixed.max() <= 100
    unchanged = (mixed == x).float().mean()
    assert 0.5 < unchanged < 0.75  # half of them, and those mixed with themselves
    assert torch.equal(mix(x[:1], generator), x[:1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_that_which_the_repair_before_left(layout):
    net, dense, masks = broken(conv_net().to(memory_format=layout))
    net.to(memory_format=layout)
    strides = {name: p.stride() for name, p in net.named_parameters()}
    task = task_of(net, dense, masks, batches(40))
    task.training_steps = 3
    distillation.distill(task)
    assert {name: p.stride() for name, p in net.named_parameters()} == strides
