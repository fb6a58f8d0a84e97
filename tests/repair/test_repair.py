"""Repairs by name: requests, reports, bad input, and what must not change."""

import copy
import json
import re
import threading

import pytest
import torch
import torchvision
from cases import batches, conv_net
from repair_cases import Residual, case, remove_channels
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate, prune_to_flops
from tp_twoaxis.dependency.channel_masks import PrunedChannels
from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.reconstruction import patches
from tp_twoaxis.repair import REPAIRS, check_repair, refits, repair_network, sequential
from tp_twoaxis.repair.images import RepairImages
from tp_twoaxis.repair.pruned_consumers import pruned_consumers
from tp_twoaxis.runtime.weights import SHARED, cannot_refit

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(7))
WEIGHTS = [name for name in REPAIRS if refits([name])]


def prune(net, repair, loader=None, **options):
    loader = batches(96, 16) if loader is None else loader
    return prune_to_flops(
        net, X, "l2", flops=0.6, repair=repair, loader=loader, training_steps=3, progress=False, **options
    )


def broken(seed=0):
    """A pruned network, its dense copy, and the channels that each layer lost."""
    net = conv_net(seed)
    dense, masks = remove_channels(net, X, {"conv1": [1, 4, 9], "reduce": [2]})
    return net, dense, masks


@pytest.mark.parametrize("repair", WEIGHTS)
@pytest.mark.parametrize("with_bn", [False, True])
def test_every_repair_through_prune_to_flops(repair, with_bn):
    net = conv_net()
    report = prune(net, (repair, "bn") if with_bn else repair)
    assert report.repair == [repair, "bn"][: 1 + with_bn]
    # three steps of training may serve nothing
    assert {c.repair for c in report.consumers} <= {repair, REPAIRS[repair].start if REPAIRS[repair].trains else repair}
    assert {f"repair/{name}" for name in ("statistics", "measure", *["bn"] * with_bn)} <= set(report.seconds)
    assert all(c.predicted >= 0 and c.measured >= 0 and c.in_network >= 0 for c in report.consumers)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert json.loads(report.to_json())["consumers"][0]["removed"][0]["peers"] is not None
    assert "explained" in str(report)


@pytest.mark.parametrize("repair", [("ridge", "bn"), ("patch",), ("sequential",), ("joint",)])
def test_a_mobilenet_of_torchvision(repair):
    torch.manual_seed(0)
    net, data = torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25), [torch.randn(24, 3, 32, 32)] * 2
    options = {"loader": data, "guard": False, "progress": False}
    report = prune_to_flops(net, X, "l1", flops=0.6, repair=repair, **options)
    assert {c.repair for c in report.consumers} == {repair[0]}
    assert torch.isfinite(net.eval()(data[0])).all()


def test_attention_of_torch_is_named():
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(32, 8, 1, 4, 32, 64, num_classes=5)
    data = [torch.randn(24, 3, 32, 32)] * 2
    options = {"loader": data, "guard": False, "progress": False}
    report = prune_to_flops(net, data[0][:1], "l1", flops=0.6, repair="sequential", **options)
    attention = [c for c in report.consumers if c.layer.endswith("self_attention")]
    assert [c.repair for c in attention] == ["none"]
    assert any("its projections run inside the attention function" in note for note in report.notes)
    assert {c.repair for c in report.consumers if c not in attention} == {"sequential"}


def test_the_more_a_repair_may_change_the_smaller_the_error():
    errors = []
    for repair in ["bias", "ridge", "patch"]:
        net, dense, masks = broken()
        data = batches(512, 128)
        report = repair_network(net, dense, masks, (repair,), loader=data, progress=False)
        errors.append(sum(c.measured for c in report.consumers))
    assert errors == sorted(errors, reverse=True)


def test_bias_moves_means_alone():
    net, dense, masks = broken()
    pruned_weight = net.conv2.weight.clone()
    stats = calibrate(dense, batches(96, 16), consumers=True, target=None, positions="all", progress=False)
    repair_network(net, dense, masks, ("bias",), stats=stats, progress=False)
    assert torch.equal(net.conv2.weight, pruned_weight)
    lost = masks["conv2"].inputs
    expected = (
        dense.conv2.bias[~masks["conv2"].outputs]
        + (dense.conv2.weight.sum((2, 3))[:, lost] @ stats["conv2"].input_mean[lost].float())[~masks["conv2"].outputs]
    )
    torch.testing.assert_close(net.conv2.bias.detach(), expected.detach())


def test_a_convolution_without_bias_shifts_its_batch_norm_or_gets_one():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False)
    ).eval()
    data = [x for x, _ in batches(64, 32)]
    dense, masks = remove_channels(net, X, {"0": [1, 2], "2": [3]})
    report = repair_network(net, dense, masks, ("ridge",), loader=data, progress=False)
    assert net[2].bias is None
    assert not torch.allclose(net[3].running_mean, dense[3].running_mean[:3])
    assert net[4].bias.shape == (4,)
    assert report.notes == ["4 got a bias for what removed channels contributed on average"]
    biased, dense, masks = broken()
    report = repair_network(biased, dense, masks, ("ridge",), loader=batches(), progress=False)
    assert not any("got a bias" in note for note in report.notes)


def test_statistics_at_hand_are_used_and_checked():
    stats = calibrate(conv_net(), batches(96, 16), consumers=True, progress=False)
    net = conv_net()
    report = prune_to_flops(net, X, "capture", flops=0.6, repair="ridge", stats=stats, progress=False)
    assert report.consumers
    assert report.consumers[0].measured is None  # without a loader there is nothing to measure on
    foreign, dense, masks = broken(seed=1)
    with pytest.raises(StaleStatisticsError, match="calibrate"):
        repair_network(foreign, dense, masks, ("ridge",), stats=stats, progress=False)


def test_inputs_that_were_not_recorded():
    stats = calibrate(conv_net(), batches(), progress=False)
    with pytest.raises(TwoAxisError, match=r"repair 'ridge' needs to know.*calibrate\(model, loader, consumers=True\)"):
        prune_to_flops(conv_net(), X, "capture", flops=0.6, repair="ridge", stats=stats, progress=False)
    partial = calibrate(conv_net(), batches(), consumers=True, layers=["conv1", "conv2"], progress=False)
    net, dense, masks = broken()
    with pytest.raises(TwoAxisError, match=r"depthwise|reduce.*not recorded; call calibrate\(consumers=True\)"):
        repair_network(net, dense, masks, ("ridge",), stats=partial, progress=False)


def test_requests_that_cannot_work():
    with pytest.raises(TwoAxisError, match="repair 'patch' needs images"):
        check_repair(("patch",), conv_net(), None, calibrate(conv_net(), batches(), consumers=True, progress=False))
    with pytest.raises(TwoAxisError, match=r"reads the images more than once.*got generator; pass list\(loader\)"):
        check_repair("ridge", conv_net(), (batch for batch in batches()))
    assert check_repair(("ridge", "bn", "ridge"), nn.Linear(2, 2), []) == ("ridge",)


def test_a_network_is_repaired_once():
    net, dense, masks = broken()
    repair_network(net, dense, masks, ("ridge",), loader=batches(), progress=False)
    with pytest.raises(TwoAxisError, match="conv2: expected the dense layer's weights without the removed channels"):
        repair_network(net, dense, masks, ("ridge",), loader=batches(), progress=False)


def test_few_images_are_noted_with_rows_and_width():
    net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 5))
    dense, masks = remove_channels(net, torch.randn(2, 6), {"0": list(range(10))})
    x = torch.randn(20, 6)
    report = repair_network(net, dense, masks, ("ridge",), loader=[x], guard=False, progress=False)
    assert report.notes == [
        "2: few rows, such as 20 for 54 inputs in 2, so reconstructions shrink towards no change; "
        "repair from more images"
    ]
    with torch.no_grad():
        fresh = torch.randn(400, 6)
        unrepaired = dense[2].weight[:, 10:] @ dense[0](fresh).relu()[:, 10:].T + dense[2].bias[:, None]
        assert (net(fresh) - dense(fresh)).square().mean() < (unrepaired.T - dense(fresh)).square().mean()


@pytest.mark.parametrize("repair", ["sequential", "joint"])
def test_ignored_layers_that_read_no_removed_channel_keep_their_weights(repair):
    """A detector's fixed decoding, say: its inputs change, which is no reason to refit it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 6, 3), nn.ReLU(),
        nn.Sequential(nn.Conv2d(6, 5, 1), nn.Conv2d(5, 2, 1)),
    ).eval()  # fmt: skip
    refitted, decoded = copy.deepcopy(net), [parameter.clone() for parameter in net[4].parameters()]
    prune(refitted, repair, ignored_layers=["2"])
    assert not torch.equal(refitted[4][1].weight, decoded[2])
    report = prune(net, repair, ignored_layers=["2", net[4]])
    assert [consumer.layer for consumer in report.consumers] == ["2"]
    assert all(torch.equal(now, before) for now, before in zip(net[4].parameters(), decoded, strict=True))


def test_ignored_layers_that_read_a_removed_channel_are_repaired():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 6, 3)).eval()
    report = prune(net, "sequential", ignored_layers=["2"])
    assert [(consumer.layer, consumer.repair) for consumer in report.consumers] == [("2", "sequential")]


def test_frozen_layers_are_repaired_and_stay_frozen():
    net = conv_net()
    net.conv2.requires_grad_(False)
    before = net.conv2.weight
    prune(net, "ridge")
    assert not net.conv2.weight.requires_grad
    assert net.conv2.weight is not before
    assert net.reduce.weight.requires_grad


def test_layers_that_cannot_be_refitted_are_named():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.Conv2d(4, 2, 1))
    dense, masks = remove_channels(net, X, {"0": [2]})
    report = repair_network(net, dense, masks, ("ridge",), loader=batches(), progress=False)
    assert report.notes == ["2: not refitted, a transposed convolution's taps do not cover its outputs evenly"]
    assert [(c.layer, c.repair) for c in report.consumers] == [("2", "none")]
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert cannot_refit(quantised) == "its weight is quantised (torch.int8)"


def test_a_weight_of_two_layers_does_not_change():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1))
    dense, masks = remove_channels(net, X, {"0": [1]})
    twin = nn.Conv2d(5, 4, 1)
    twin.weight = net[2].weight
    net[2].twin = twin
    assert pruned_consumers(net, dense, masks) == {"2": SHARED}
    outcome, _ = sequential.refit_in_order(net, dense, masks, RepairImages([batches(32, 32)[0][0]], None, False))
    assert outcome["2"] == SHARED
    assert net[2].twin.weight is net[2].weight


def test_a_consumer_of_two_groups_is_refitted_for_both():
    class Concatenated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(9, 4, 1)
            with torch.no_grad():
                self.a.weight[3], self.a.bias[3] = self.b.weight[0], self.b.bias[0] + 1
                self.b.weight[4], self.b.bias[4] = self.a.weight[0] * 3, self.a.bias[0]

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    torch.manual_seed(0)
    net, x = Concatenated().double(), torch.randn(32, 3, 6, 6).double()
    dense, masks = remove_channels(net, x, {"a": [3], "b": [4]})
    report = repair_network(net, dense, masks, ("ridge",), loader=[x], ridge=1e-9, progress=False)
    assert [c.channel for c in report.consumers[0].removed] == [3, 8]
    torch.testing.assert_close(net(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("repair", WEIGHTS)
def test_hooks_modes_and_random_numbers_come_back(repair):
    net, dense, masks = broken()
    net.train()
    state, modes = torch.get_rng_state(), [m.training for m in net.modules()]
    repair_network(net, dense, masks, (repair,), loader=batches(), training_steps=3, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    for model in (net, dense):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Failing:
    """A loader that fails on one of its later passes."""

    def __init__(self, passes):
        self.passes = passes

    def __iter__(self):
        self.passes -= 1
        if self.passes < 0:
            raise OSError("disk gone")
        return iter(batches(96, 16))

    def __len__(self):
        return 6


@pytest.mark.parametrize("repair", WEIGHTS)
def test_an_error_on_any_pass_over_the_images_puts_the_model_back(repair):
    failures = 0
    while True:
        net = conv_net()
        before = {name: (id(t), t.clone()) for name, t in net.state_dict(keep_vars=True).items()}
        try:
            prune(net, (repair, "bn"), loader=Failing(failures))
            break
        except (TwoAxisError, OSError):
            failures += 1
        after = net.state_dict(keep_vars=True)
        assert list(after) == list(before)
        assert all(id(after[name]) == key and torch.equal(after[name], value) for name, (key, value) in before.items())
    assert failures >= 3  # statistics, bn, what is held out


def test_sequential_repair_stops_its_reference_on_errors(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(sequential, "PatchFit", fail)
    net, dense, masks = broken()
    running = threading.active_count()
    with pytest.raises(RuntimeError, match="no memory"):
        repair_network(net, dense, masks, ("sequential",), loader=batches(), progress=False)
    assert threading.active_count() == running
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())


def test_sequential_repair_beats_one_shot_in_the_network():
    errors = {}
    for repair in ("ridge", "sequential"):
        torch.manual_seed(3)
        net = Residual()
        for layer in (net.stem, net.b, net.d):
            nn.init.kaiming_normal_(layer.weight)
        dense, masks = remove_channels(net, torch.randn(1, 3, 8, 8), {"stem": [5, 2], "a": [0, 1], "c": [3]})
        repair_network(net, dense, masks, (repair,), loader=[x for x, _ in batches(256, 64)], progress=False)
        with torch.no_grad():
            x = batches(128, 128, seed=9)[0][0]
            errors[repair] = float((net(x) - dense(x)).square().mean())
    assert errors["sequential"] < errors["ridge"]


def test_sequential_repair_falls_back_to_channels_for_large_patches(monkeypatch):
    monkeypatch.setattr(sequential, "fits", lambda layer: patches.patch_size(layer) <= 20)
    net, x, removed = case("conv-BN-ReLU-conv")
    dense, masks = remove_channels(net, x[:2], removed)
    report = repair_network(net, dense, masks, ("sequential",), loader=[x], progress=False)
    assert [(c.repair, c.reason) for c in report.consumers] == [
        ("sequential", "by channels because its patch is too large")
    ]
    torch.testing.assert_close(net(x), dense(x), rtol=1e-5, atol=1e-5)


def test_memory_bounds_the_images_of_sequential_repair():
    net, dense, masks = broken()
    options = {"loader": batches(96, 16), "progress": False}
    with pytest.raises(
        TwoAxisError, match=r"expected max_memory of at least [\d.e-]+ GiB, what 10 images need"
    ) as caught:
        repair_network(copy.deepcopy(net), dense, masks, ("sequential",), max_memory=1e-9, **options)
    least = float(str(caught.value).split("at least ")[1].split()[0])
    report = repair_network(net, dense, masks, ("sequential",), max_memory=2.1 * least, **options)
    (note,) = [note for note in report.notes if "repair ran on" in note]
    used = re.fullmatch(r"sequential repair ran on (\d+) images; its first layers, .* on (\d+) \(max_memory\)", note)
    assert used, note
    assert 12 <= int(used[2]) <= 20  # of 21, some are held out
    assert int(used[1]) > 2 * int(used[2])  # the last layers are small


def test_a_layer_that_runs_twice_keeps_its_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.c(self.b(torch.relu(self.b(torch.relu(self.a(x))))))

    net = Twice()
    dense = copy.deepcopy(net)
    dense_x = batches(32, 32)[0][0]
    widths = {"a": (3, 6), "b": (6, 6), "c": (6, 2)}
    masks = {name: PrunedChannels(*(torch.zeros(n, dtype=torch.bool) for n in pair)) for name, pair in widths.items()}
    outcome, used = sequential.refit_in_order(net, dense, masks, RepairImages([dense_x], None, False))
    assert outcome["b"] == "it runs more than once in a pass"
    assert used == (26, 26)  # the others are held out
    assert torch.equal(net(dense_x), dense(dense_x))
