"""Explanations find planted structure, say it in words, and refuse what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from cases import batches, conv_net
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.diagnostics.explain import explain
from tp_twoaxis.diagnostics.lesions import lesion, recovered_share
from tp_twoaxis.errors import StaleStatisticsError


def planted_net():
    """conv1: channel 5 is twice channel 2 (negated), channel 3 never varies."""
    net = conv_net()
    with torch.no_grad():
        net.fc.weight.mul_(400.0)
        net.conv1.weight[5] = -2.0 * net.conv1.weight[2]
        net.conv1.weight[3] = 0.0
        net.fc.bias.sub_(net(torch.cat([x for x, _ in batches(96)])).mean(0))
    return net


@pytest.fixture(scope="module")
def net():
    return planted_net()


@pytest.fixture(scope="module")
def stats(net):
    return calibrate(net, batches(96), progress=False)


@pytest.fixture(scope="module")
def detailed(net, stats):
    images = [images for images, _ in batches(64, seed=5)]
    return explain(net, "conv1", images, stats=stats, channels=[5, 3, 8], progress=False)


def test_the_planted_copy_is_found_and_given_back(detailed):
    assert detailed.profiles[5].hull == (2,)
    assert detailed.recovered(5) == pytest.approx(1.0, abs=1e-3)
    text = detailed.sentences(5)
    assert text[0] == "100% of channel 5 can be predicted from 1 peer (2)."
    assert "Removing it (its mean in its place) " in text[3]
    assert "with the prediction of its 8 best peers in its place it costs 0.0 points" in text[3]
    assert text[-1] == "Its peers give back 100% of the loss."


def test_constant_channels_are_told_so(detailed):
    first, cost = detailed.sentences(3)
    assert "never varies on the 96 images" in first
    assert "costs 0.0 points" in cost
    assert "peers" not in cost
    assert detailed.recovered(3) is None


def test_numbers_are_those_of_the_parts(net, stats, detailed):
    images = [images for images, _ in batches(64, seed=5)]
    parts = lesion(net, images, "conv1", [5, 3, 8], ("mean", "peers"), stats=stats, progress=False)
    assert detailed.lesions == parts
    assert detailed.recovered(8) == recovered_share(parts.find(8, "mean"), parts.find(8, "peers"))
    assert (detailed.kind, detailed.target, detailed.score_images) == ("Conv2d", "margin", 96)
    assert any("no labels" in note for note in detailed.notes)
    zero = explain(net, "conv1", images, stats=stats, channels=8, removal="zero", progress=False)
    assert zero.lesions == lesion(net, images, "conv1", 8, ("zero", "peers"), stats=stats, progress=False)
    assert "(zero in its place)" in zero.sentences(8)[3]


def test_words_and_json_agree(detailed):
    payload = json.loads(detailed.to_json())
    assert [entry["channel"] for entry in payload["explained"]] == [5, 3, 8]
    assert len(payload["profiles"]) == 16
    assert payload["lesions"]["lesions"][0]["loss_increase"] == detailed.lesions.lesions[0].loss_increase
    text = str(detailed)
    for entry in payload["explained"]:
        for sentence in detailed.sentences(entry["channel"]):
            assert sentence in text
            assert sentence in entry["text"]
    assert "agreement with the whole network" in text
    assert "note: " in text


def test_json_has_no_infinities(net, stats):
    result = explain(net, "conv1", batches(1), stats=stats, channels=8, progress=False)
    assert json.loads(result.to_json())["lesions"]["lesions"][0]["standard_error"] is None


def test_an_overview_needs_no_images(net, stats):
    result = explain(net, "conv1", stats=stats)
    assert (result.channels, result.lesions) == ((), None)
    easy, hard = result.ends()
    assert {easy[0].channel, easy[1].channel} == {2, 5}
    shares = [p.hull_explanation for p in (*easy, *hard[::-1])]
    assert shares == sorted(shares, reverse=True)
    assert not {p.channel for p in easy} & {p.channel for p in hard}
    assert 3 not in {p.channel for p in (*easy, *hard)}
    text = str(result)
    assert "16 channels, 1 of them constant" in text
    assert "easiest to replace by their peers" in text


def test_small_layers_have_no_channel_at_both_ends(net, stats):
    easy, hard = explain(net, "fc", stats=stats).ends()
    assert len(easy) + len(hard) == 5
    assert len({p.channel for p in (*easy, *hard)}) == 5


def test_a_channel_without_peers():
    net = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(36, 5))
    text = explain(net, "0", batches(32), channels=0, progress=False).sentences(0)
    assert text[0] == "Channel 0 has no peers that vary."
    assert len(text) == 2


def test_statistics_are_gathered_where_there_are_none(net):
    result = explain(net, "conv1", batches(32), channels=0, progress=False)
    assert result.score_images == result.lesions.images == 32
    assert any("statistics are of the images that lesions" in note for note in result.notes)
    assert "points of accuracy" in " ".join(result.sentences(0))
    few = explain(nn.Sequential(nn.Flatten(), nn.Linear(192, 40)), "1", batches(24), progress=False)
    assert any("24 rows are few for 40 channels" in note for note in few.notes)


def test_without_a_target_there_is_no_task_axis(net):
    stats = calibrate(net, batches(32), target=None, progress=False)
    result = explain(net, "conv1", batches(32), stats=stats, channels=4, progress=False)
    assert result.profiles[4].task_mi is None
    assert not any("By itself" in text for text in result.sentences(4))
    assert "target: none" in str(result)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "conv11"}, "no layer 'conv11'; near it: conv1"),
        ({"channels": 99}, "expected channels of 0 to 15, got 99"),
        ({"removal": "peers"}, "removal: expected mean or zero"),
        ({"loader": None}, "expected images to gather lesions from"),
        ({"loader": None, "channels": None, "stats": None}, "expected images to gather statistics from"),
        ({"peers": 11}, "peers: expected 1 to 10"),
    ],
)
def test_bad_input(net, stats, changes, message):
    given = {"layer": "conv1", "loader": batches(16), "stats": stats, "channels": 0} | changes
    with pytest.raises(TwoAxisError, match=message):
        explain(net, given.pop("layer"), given.pop("loader"), progress=False, **given)


def test_stale_statistics(stats):
    other = conv_net(1)
    with pytest.raises(StaleStatisticsError, match="conv1"):
        explain(other, "conv1", stats=stats)
