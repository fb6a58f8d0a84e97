"""An importance for the next step of pruning: a copy with statistics of what is left, told what is gone."""

from functools import partial

import pytest
import torch
import torch_pruning as tp
from cases import batches, conv_net

from tp_twoaxis import CapQGWImportance, HybridImportance, TwoAxisError, TwoAxisImportance, calibrate
from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.importance.activation_baselines import VBPImportance
from tp_twoaxis.importance.renewal import Interim, RebuiltImportance, renewed, told
from tp_twoaxis.scores.registry import cap_a

X = torch.zeros(1, 3, 8, 8)


@pytest.fixture(scope="module")
def stats():
    return calibrate(conv_net(), batches(), consumers=True, gradients=True, progress=False)


def narrower():
    """The network that the statistics are of, after it lost channels, and a group of it."""
    net = conv_net()
    graph = tp.DependencyGraph().build_dependency(net, X)
    graph.get_pruning_group(net.conv1, tp.prune_conv_out_channels, [0, 3, 5]).prune()
    graph = tp.DependencyGraph().build_dependency(net, X)
    return net, graph.get_pruning_group(net.conv1, tp.prune_conv_out_channels, list(range(13)))


@pytest.mark.parametrize(
    "make",
    [
        TwoAxisImportance,
        partial(TwoAxisImportance, score="hull", site="consumer", group_reduction="max"),
        CapQGWImportance,
    ],
)
def test_a_copy_scores_what_is_left(stats, make):
    net, group = narrower()
    old = make(stats)
    with pytest.raises(StaleStatisticsError):
        old(group)
    new = renewed(old, Interim(net, batches(), progress=False))
    assert type(new) is type(old)
    fresh = make(calibrate(net, batches(), consumers=True, gradients=True, progress=False))
    assert torch.equal(new(group), fresh(group))
    assert old.stats is stats
    with pytest.raises(StaleStatisticsError):
        old(group)


def test_an_importance_s_own_loader_counts(stats):
    net, _ = narrower()
    assert renewed(TwoAxisImportance(stats, loader=batches(32)), Interim(net, progress=False)).stats.num_images == 32
    assert renewed(TwoAxisImportance(stats), Interim(net, batches(), 20, progress=False)).stats.num_images == 20
    with pytest.raises(TwoAxisError, match=r"expected loader=\.\.\., got none"):
        renewed(TwoAxisImportance(stats), Interim(net))


def test_what_is_gone_is_told_at_the_side_that_is_scored(stats):
    interim = Interim(conv_net(), written={"conv1": 0.25}, read={"conv1": 0.75})
    for site, share in (("producer", 0.25), ("consumer", 0.75)):
        importance = TwoAxisImportance(stats, "cap-a", site=site)
        first = importance.layer_scores("conv1")
        later = told(importance, interim)
        assert torch.equal(later.layer_scores("conv1"), cap_a(importance.layer_statistics("conv1"), removed=share))
        assert torch.equal(importance.layer_scores("conv1"), first)
        assert torch.equal(later.layer_scores("conv2"), importance.layer_scores("conv2"))
    by_hand = TwoAxisImportance(stats, partial(cap_a, removed=0.1))
    assert torch.equal(told(by_hand, interim).layer_scores("conv1"), by_hand.layer_scores("conv1"))
    plain = TwoAxisImportance(stats, "variance")
    assert torch.equal(told(plain, interim).layer_scores("conv1"), plain.layer_scores("conv1"))


def test_hybrids_renew_their_parts(stats):
    net, group = narrower()
    vbp = VBPImportance.calibrate(conv_net(), batches(), progress=False)
    hybrid = HybridImportance(vbp, TwoAxisImportance(stats, "cap-a"))
    interim = Interim(net, batches(), progress=False, written={"conv1": 3 / 16})
    new = renewed(hybrid, interim)
    assert torch.equal(new.allocation(group), VBPImportance.calibrate(net, batches(), progress=False)(group))
    assert new.ranking._removed == told(hybrid, interim).ranking._removed == {"conv1": 3 / 16}
    assert (hybrid.allocation, hybrid.ranking._removed) == (vbp, {})
    assert vbp.statistics is not new.allocation.statistics


def test_others_are_called_again_or_built_anew():
    interim = Interim(conv_net())
    magnitude = tp.importance.MagnitudeImportance()
    assert renewed(magnitude, interim) is told(magnitude, interim) is magnitude
    asked = []
    rebuilt = RebuiltImportance(magnitude, lambda interim: asked.append(interim) or "next")
    assert (renewed(rebuilt, interim).importance, rebuilt.importance, asked) == ("next", magnitude, [interim])
