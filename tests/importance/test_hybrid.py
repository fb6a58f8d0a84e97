"""The allocation's values in the ranking's order, on real groups and inside the planner."""

import pytest
import torch
import torch_pruning as tp
from cases import batches, conv_net

from tp_twoaxis import HybridImportance, LocalImportance, TwoAxisError, calibrate, prune_to_flops
from tp_twoaxis.errors import StaleStatisticsError
from tp_twoaxis.importance.registry import make_importance
from tp_twoaxis.statistics.gradients import accumulate_gradients

X = torch.zeros(1, 3, 8, 8)


@pytest.fixture(scope="module")
def stats():
    return calibrate(conv_net(), batches(), progress=False)


def groups_of(net):
    graph = tp.DependencyGraph().build_dependency(net, X)
    return list(graph.get_all_groups(ignored_layers=[net.fc]))


def test_values_are_the_allocations_and_the_order_is_the_rankings(stats):
    net = conv_net()
    allocation, ranking = make_importance("l2"), LocalImportance(stats)
    hybrid = HybridImportance(allocation, ranking)
    for group in groups_of(net):
        got, values, order = hybrid(group), allocation(group), ranking(group)
        torch.testing.assert_close(got.sort().values, values.sort().values)
        assert torch.equal(got.argsort(), order.argsort(stable=True))
        assert got.dtype == torch.float32


def test_an_importance_with_itself_is_itself(stats):
    group = groups_of(conv_net())[0]
    torch.testing.assert_close(HybridImportance("l2", "l2")(group), make_importance("l2")(group))


def test_as_many_channels_leave_as_by_the_allocation_alone(stats):
    kept = {}
    for name, importance in {"l2": "l2", "hybrid": HybridImportance("l2", LocalImportance(stats, "capture"))}.items():
        net = conv_net()
        report = prune_to_flops(net, X, importance, flops=0.5, repair=(), progress=False)
        kept[name] = [len(group.kept) for group in report.groups]
        if name == "hybrid":
            variance = stats["reduce"].variance
            own = next(group for group in report.groups if group.name == "reduce")
            assert min(variance[own.kept]) >= max(variance[own.removed])
    assert kept["l2"] == kept["hybrid"]


def test_names_gather_what_they_need():
    net = conv_net()
    hybrid = HybridImportance("taylor", "hull", model=net, loader=batches())
    assert net.conv1.weight.grad is not None
    assert hybrid.stats.num_images == 48
    assert "TaylorImportance" in repr(hybrid)
    assert "HybridImportance(allocation=" in repr(hybrid)
    reference = conv_net()
    accumulate_gradients(reference, batches(), progress=False)
    ranking = LocalImportance(calibrate(reference, batches(), progress=False), "hull")
    expected = HybridImportance(tp.importance.TaylorImportance(), ranking)
    for mine, theirs in zip(groups_of(net), groups_of(reference), strict=True):
        assert torch.equal(hybrid(mine), expected(theirs))


@pytest.mark.parametrize("role", [0, 1])
def test_what_either_declines_is_declined(role, stats):
    parts = [make_importance("l2"), LocalImportance(stats)]
    parts[role] = lambda group: None
    assert HybridImportance(*parts)(groups_of(conv_net())[0]) is None


def test_stale_rankings_raise(stats):
    net = conv_net()
    with torch.no_grad():
        net.conv1.weight.add_(1.0)
    with pytest.raises(StaleStatisticsError, match="conv1"):
        HybridImportance("l2", LocalImportance(stats))(groups_of(net)[0])


def test_bad_parts():
    group = groups_of(conv_net())[0]
    with pytest.raises(TwoAxisError, match=r"capture.*got 'captur'"):
        HybridImportance("l2", "captur")
    with pytest.raises(TwoAxisError, match=r"'taylor': expected model=... and loader=... with labels"):
        HybridImportance("taylor", "l2")
    with pytest.raises(TwoAxisError, match=r"'capture': expected stats=calibrate"):
        HybridImportance("l2", "capture")
    with pytest.raises(TwoAxisError, match=r"ranking .*: expected 8 finite scores.*got shape \[3\]"):
        HybridImportance("l2", lambda group: torch.zeros(3))(group)
    with pytest.raises(TwoAxisError, match=r"allocation .*not finite"):
        HybridImportance(lambda group: torch.full((8,), torch.nan), "l2")(group)
