"""Where removed channels are affine functions of kept ones, repair does not change the network's output."""

import pytest
import torch
from repair_cases import CASES, case, remove_channels

from tp_twoaxis.repair import REPAIRS, repair_network
from tp_twoaxis.repair.pruned_consumers import BEHIND_NORM


@pytest.mark.parametrize(
    "repair", [name for name in REPAIRS if "ridge" in (name, *REPAIRS[name].contains) and not REPAIRS[name].trains]
)
@pytest.mark.parametrize("name", CASES)
def test_the_output_is_unchanged(name, repair):
    net, x, removed = case(name)
    # both halves: the first batch is held out where there are others
    loader = [x] if repair in ("sequential", "joint") else [x[:16], x[16:]]
    dense, masks = remove_channels(net, x[:2], removed)
    with torch.no_grad():
        expected, unrepaired = dense(x), net(x)
        assert (unrepaired - expected).abs().max() > 1e-3  # removal alone is felt
        # the default ridge is larger where rows are few, as behind pooling: here the dependence is known to be exact
        report = repair_network(net, dense, masks, (repair,), loader=loader, ridge=1e-9, progress=False)
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    for consumer in report.consumers:
        assert (consumer.repair, consumer.reason) == (repair, "")
        assert min(c.explained for c in consumer.removed) > 1 - 1e-4
        assert consumer.predicted < 1e-8
        assert consumer.measured < 1e-8
        assert consumer.in_network < 1e-8


def test_the_projection_behind_a_depthwise_layer_is_refitted():
    net, x, removed = case("expand-depthwise-project")
    dense, masks = remove_channels(net, x[:2], removed)
    report = repair_network(net, dense, masks, ("ridge",), loader=[x], progress=False)
    assert [c.layer for c in report.consumers] == ["6"]
    assert report.consumers[0].removed[0].channel == 5
    assert report.consumers[0].removed[0].peers[0][0] == 0
    assert torch.equal(net[3].weight, dense[3].weight[:5])


def test_attention_uses_both_peers():
    net, x, removed = case("attention value-proj")
    dense, masks = remove_channels(net, x[:2], removed)
    report = repair_network(net, dense, masks, ("ridge",), loader=[x], progress=False)
    channel = report.consumers[0].removed[0]
    assert {peer for peer, weight in channel.peers if abs(weight) > 0.01} == {0, 1}


def test_flattening_removes_every_position_of_a_channel():
    net, x, removed = case("flatten-linear")
    dense, masks = remove_channels(net, x[:2], removed)
    report = repair_network(net, dense, masks, ("ridge",), loader=[x], progress=False)
    assert [c.channel for c in report.consumers[0].removed] == [16, 17, 18, 19]
    assert [c.peers[0][0] for c in report.consumers[0].removed] == [4, 5, 6, 7]


@pytest.mark.parametrize("repair", ["ridge", "patch"])
def test_behind_a_layer_norm_nothing_is_refitted_at_once(repair):
    net, x, _ = case("ConvNeXt")
    dense, masks = remove_channels(net, x[:2], {"stem": [2]})
    report = repair_network(net, dense, masks, (repair,), loader=[x], progress=False)
    skipped = next(c for c in report.consumers if c.layer == "fc1")
    assert (skipped.repair, skipped.reason) == ("none", BEHIND_NORM)
    assert report.notes == [
        f"fc1: not refitted, {BEHIND_NORM}",
        "norm: mean and variance over fewer channels than before, which no refit undoes",
    ]
    assert next(c for c in report.consumers if c.layer == "head").repair == repair


def test_sequential_repair_reaches_behind_a_layer_norm():
    net, x, _ = case("ConvNeXt")
    dense, masks = remove_channels(net, x[:2], {"stem": [2]})
    report = repair_network(net, dense, masks, ("sequential",), loader=[x], progress=False)
    one_shot, _, _ = case("ConvNeXt")
    dense, masks = remove_channels(one_shot, x[:2], {"stem": [2]})
    repair_network(one_shot, dense, masks, ("ridge",), loader=[x], progress=False)
    with torch.no_grad():
        assert (net(x) - dense(x)).square().mean() < (one_shot(x) - dense(x)).square().mean()
    assert {c.repair for c in report.consumers} == {"sequential"}
