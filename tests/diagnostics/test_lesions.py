"""Lesions by hooks agree with networks whose weights were edited, and leave no trace."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import batches, conv_net
from reference_lesions import losses, without_channel
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.diagnostics.lesions import Lesion, lesion, recovered_share
from tp_twoaxis.diagnostics.peers import predict_from_peers
from tp_twoaxis.errors import StaleStatisticsError

KINDS = ("zero", "mean", "peers")


def sharp_net():
    """A network that is sure of what it says, so that lesions cost something."""
    net = conv_net()
    with torch.no_grad():
        net.fc.weight.mul_(400.0)
        net.fc.bias.sub_(net(torch.cat([x for x, _ in batches(96)])).mean(0))  # no class wins everywhere
    return net


@pytest.fixture(scope="module")
def net():
    return sharp_net()


@pytest.fixture(scope="module")
def stats(net):
    return calibrate(net, batches(96), progress=False)


@pytest.mark.parametrize(
    ("layer", "channels", "kinds"),
    [("conv1", [0, 7], KINDS), ("conv2", [15], KINDS), ("depthwise", [2], KINDS[:2]), ("fc", [4], KINDS)],
)
def test_a_lesion_is_an_edited_row(net, stats, layer, channels, kinds):
    data = batches(40, 16, seed=3)
    images, labels = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    result = lesion(net, data, layer, channels, kinds, stats=stats, peers=3, progress=False)
    whole, right = losses(net, images, labels)
    assert (result.images, result.reference) == (40, "labels")
    assert result.loss == pytest.approx(whole.mean(), rel=1e-5)
    assert result.accuracy == right.mean()
    assert [(x.channel, x.replacement) for x in result.lesions] == [(k, kind) for k in channels for kind in kinds]
    for entry in result.lesions:
        k = entry.channel
        prediction = predict_from_peers(stats[layer], 3)[k]
        twin = {
            "zero": (0.0,),
            "mean": (float(stats[layer].mean[k]),),
            "peers": (prediction.intercept, prediction.peers, prediction.weights),
        }[entry.replacement]
        own, hits = losses(without_channel(net, layer, k, *twin), images, labels)
        change = own - whole
        assert entry.loss_increase == pytest.approx(change.mean(), rel=1e-3, abs=1e-4)
        assert entry.standard_error == pytest.approx(change.std(ddof=1) / np.sqrt(40), rel=1e-3, abs=1e-4)
        assert entry.accuracy_drop == pytest.approx(right.mean() - hits.mean())
    assert any(abs(x.loss_increase) > 0.01 for x in result.lesions)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_and_token_layers(batch_first):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            return self.head(self.block(x).mean(1 if batch_first else 0))

    torch.manual_seed(0)
    net = Tokens().eval()
    with torch.no_grad():
        net.head.weight.mul_(20.0)
    images, labels = torch.randn(24, 6, 8), torch.randint(5, (24,))
    # a loader's batch comes first where statistics are gathered, so other layers need batch_first
    for layer in ("block.self_attn", "block.linear1") if batch_first else ("block.self_attn",):
        stats = calibrate(net, [(images, labels)], layers=[layer], progress=False)
        result = lesion(net, [(images, labels)], layer, 3, ("mean", "peers"), stats=stats, progress=False)
        whole, _ = losses(net, images, labels)
        prediction = predict_from_peers(stats[layer])[3]
        for entry, twin in zip(
            result.lesions,
            [(float(stats[layer].mean[3]),), (prediction.intercept, prediction.peers, prediction.weights)],
            strict=True,
        ):
            own, _ = losses(without_channel(net, layer, 3, *twin), images, labels)
            assert entry.loss_increase == pytest.approx((own - whole).mean(), rel=1e-3, abs=1e-4)
        assert abs(result.find(3, "mean").loss_increase) > 1e-3


def test_batches_and_company_do_not_matter(net, stats):
    together = lesion(net, batches(48, 48), "conv1", [1, 6, 9], KINDS, stats=stats, progress=False)
    cut = lesion(net, batches(48, 7), "conv1", [1, 6, 9], KINDS, stats=stats, progress=False)
    alone = lesion(net, batches(48, 48), "conv1", 6, "peers", stats=stats, progress=False)
    for one, other in zip(together.lesions, cut.lesions, strict=True):
        assert one.loss_increase == pytest.approx(other.loss_increase, rel=1e-4, abs=1e-6)
        assert one.accuracy_drop == other.accuracy_drop
    assert alone.lesions == [together.find(6, "peers")]
    assert lesion(net, batches(48, 16), "conv1", 6, "zero", max_images=20, progress=False).images == 20


def test_without_labels_the_whole_networks_predictions_count(net, stats):
    images = [images for images, _ in batches(48)]
    with torch.no_grad():
        labelled = [(x, net(x).argmax(1)) for x in images]
    free = lesion(net, images, "conv2", [2, 3], "mean", stats=stats, progress=False)
    answer = lesion(net, labelled, "conv2", [2, 3], "mean", stats=stats, progress=False)
    assert (free.reference, answer.reference) == ("dense predictions", "labels")
    assert free.accuracy == answer.accuracy == 1.0
    assert free.lesions == answer.lesions


def test_a_planted_copy_is_given_back():
    net = sharp_net()
    with torch.no_grad():
        net.conv1.weight[5] = 0.5 * net.conv1.weight[2] - 1.5 * net.conv1.weight[9]
    stats = calibrate(net, batches(96), progress=False)
    images = [images for images, _ in batches(64, seed=5)]
    result = lesion(net, images, "conv1", [5, 12], ("mean", "peers"), stats=stats, peers=2, progress=False)
    removed, replaced = result.lesions[:2]
    assert removed.loss_increase > 2 * removed.standard_error
    assert abs(replaced.loss_increase) < 1e-3 * removed.loss_increase
    assert replaced.accuracy_drop == 0.0
    assert recovered_share(removed, replaced) == pytest.approx(1.0, abs=1e-3)
    other = recovered_share(*result.lesions[2:])
    assert other is None or other < 0.95


def test_permuting_channels_permutes_lesions():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5)
    ).eval()
    order = torch.randperm(8)
    permuted = copy.deepcopy(net)
    with torch.no_grad():
        for module in permuted[:2]:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.ndim:
                    tensor.copy_(tensor[order].clone())
        permuted[3].weight.copy_(permuted[3].weight[:, order].clone())
    results = []
    for model in (net, permuted):
        stats = calibrate(model, batches(64), layers=["0"], progress=False)
        results.append(lesion(model, batches(48), "0", range(8), ("mean", "peers"), stats=stats, progress=False))
    for new, old in enumerate(order.tolist()):
        for kind in ("mean", "peers"):
            mine, theirs = results[1].find(new, kind), results[0].find(old, kind)
            assert mine.loss_increase == pytest.approx(theirs.loss_increase, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_comes_back_as_it_was(fail):
    net = sharp_net().train()
    net.bn1.eval()
    net.conv2.register_forward_hook(lambda *_: None)
    stats = calibrate(net, batches(48), progress=False)
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    hooks = dict(net.conv2._forward_hooks)
    torch.manual_seed(7)
    data = batches(48)
    if fail:
        data[2] = (data[2][0][:, :2], data[2][1])
        with pytest.raises(TwoAxisError, match="batch 2"):
            lesion(net, data, "conv2", [0, 1], KINDS, stats=stats, progress=False)
    else:
        lesion(nn.DataParallel(net), data, "conv2", [0, 1], KINDS, stats=stats, progress=False)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert dict(net.conv2._forward_hooks) == hooks
    assert torch.is_grad_enabled()


def test_recovered_shares_need_a_damage():
    def share(removed, replaced, error=0.001, **options):
        pair = (Lesion(0, name, loss, error, 0.0) for name, loss in (("mean", removed), ("peers", replaced)))
        return recovered_share(*pair, **options)

    assert share(0.5, 0.125) == 0.75
    assert share(0.5, 0.75) == -0.5
    assert share(0.5, -0.125) == 1.25
    assert share(0.5, 0.1, error=0.26) is None
    assert share(0.0005, 0.0, error=0.0) is None
    assert share(0.0005, 0.0, error=0.0, minimum_damage=1e-4) == 1.0
    assert share(-0.5, 0.0) is None


def test_one_image_has_no_standard_error(net, stats):
    result = lesion(net, batches(1), "conv1", 0, ("mean", "peers"), stats=stats, progress=False)
    assert recovered_share(*result.lesions) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "conv"}, "no layer 'conv'; near it: conv2, conv1"),
        ({"layer": "bn1"}, "writes no channels"),
        ({"channels": 16}, "expected channels of 0 to 15, got 16"),
        ({"channels": [0, -1]}, "expected channels of 0 to 15, got -1"),
        ({"channels": [0.5]}, "expected channels of 0 to 15, got 0.5"),
        ({"channels": []}, "at least one channel"),
        ({"replacement": "median"}, "expected one or several of zero, mean, peers, got 'median'"),
        ({"replacement": ()}, "expected one or several"),
        ({"stats": None}, "mean need the calibration's statistics"),
        ({"peers": 0, "replacement": "peers"}, "peers: expected 1 to 10"),
        ({"loader": []}, "at least one batch"),
        ({"loader": [batches(8)[0], batches(8)[0][0]]}, "yield labels always or never"),
        ({"loader": [(batches(8)[0][0], torch.full((8,), 9))]}, "batch 0: expected labels in"),
    ],
)
def test_bad_input(net, stats, changes, message):
    given = {"loader": batches(16), "layer": "conv1", "channels": 0, "replacement": "mean", "stats": stats} | changes
    positional = [given.pop(name) for name in ("loader", "layer", "channels", "replacement")]
    with pytest.raises(TwoAxisError, match=message):
        lesion(net, *positional, progress=False, **given)


def test_stale_statistics_and_other_models(stats):
    net = sharp_net()
    with torch.no_grad():
        net.conv1.weight.mul_(1.5)
    with pytest.raises(StaleStatisticsError, match="conv1"):
        lesion(net, batches(16), "conv1", 0, stats=stats, progress=False)
    lesion(net, batches(16), "conv1", 0, "zero", progress=False)
    with pytest.raises(TwoAxisError, match="pass a classifier"):
        lesion(nn.Sequential(nn.Conv2d(3, 4, 3)), batches(16), "0", 0, "zero", progress=False)

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(192, 5), nn.Linear(192, 5)

        def forward(self, x):
            return self.used(x.flatten(1))

    with pytest.raises(TwoAxisError, match="did not run"):
        lesion(Idle(), batches(16), "idle", 0, "zero", progress=False)
