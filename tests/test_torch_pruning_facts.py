"""Facts about Torch-Pruning 1.6.1 that this package relies on or protects from; a host that changes one fails here."""

import importlib.metadata

import pytest
import torch
import torch_pruning as tp
from cases import conv_net
from torch import nn

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def two_convs(width=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, 2, 1)
    )


def pruner_of(net, importance, **options):
    dicts = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "channel_groups": {}}
    return tp.pruner.BasePruner(net, X, importance=importance, ignored_layers=[net[-1]], **{**dicts, **options})


def prune(net, importance, **options):
    pruner_of(net, importance, **options).step()
    return [m.out_channels for m in net if isinstance(m, nn.Conv2d)]


def ramp(group):
    return torch.arange(len(group[0].idxs)).float()


def test_version_attribute_lags_behind_the_metadata():
    assert importlib.metadata.version("torch-pruning").startswith("1.6.1")
    assert tp.__version__ == "1.6.0"


def test_the_length_of_an_importance_is_never_checked():
    assert prune(two_convs(), lambda group: torch.arange(4.0), pruning_ratio=0.5) == [6, 6, 2]


def test_nan_protects_and_none_drops_out_of_the_ratio():
    assert prune(two_convs(), lambda group: torch.full((8,), torch.nan), global_pruning=True) == [8, 8, 2]

    def first_only(group):
        return ramp(group) if group[0].dep.target.name.startswith("0") else None

    # half of the 8 channels that are ranked, not half of 16
    assert prune(two_convs(), first_only, global_pruning=True) == [4, 8, 2]


def test_numpy_importances_crash():
    with pytest.raises((TypeError, AttributeError)):
        prune(two_convs(), lambda group: ramp(group).numpy())


def test_ties_all_leave_and_a_group_wholly_below_the_threshold_is_skipped():
    def scores(group):
        low = group[0].dep.target.name.startswith("0")
        return torch.zeros(8) if low else 1 + torch.arange(8.0)

    # 4 of 16 channels asked for; all 8 tied ones would have to go, so none does
    assert prune(two_convs(), scores, global_pruning=True, pruning_ratio=0.25) == [8, 8, 2]
    # more of the ratio can therefore remove less: at 0.6 only the second layer loses channels
    assert prune(two_convs(), scores, global_pruning=True, pruning_ratio=0.6) == [8, 6, 2]


def test_default_dicts_are_shared_by_all_pruners():
    first = tp.pruner.BasePruner(two_convs(), X, importance=ramp)
    second = tp.pruner.BasePruner(two_convs(), X, importance=ramp)
    assert first.out_channel_groups is second.out_channel_groups
    assert first.num_heads is second.num_heads


def test_the_constructor_leaves_the_model_in_eval_mode():
    net = two_convs().train()
    pruner_of(net, ramp)
    assert not net.training


def test_all_frozen_prunes_nothing_and_frozen_parameters_come_back_trainable():
    assert prune(two_convs().requires_grad_(False), ramp) == [8, 8, 2]
    partly = two_convs()
    partly[0].weight.requires_grad_(False)
    assert prune(partly, ramp) == [4, 4, 2]
    assert partly[0].weight.requires_grad


def test_no_grad_around_the_constructor_asserts():
    with torch.no_grad(), pytest.raises(AssertionError):
        pruner_of(two_convs(), ramp)


def test_fpgm_measures_squared_weights():
    net = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5]])[:, :, None, None])
        net[1].weight.zero_()
    graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 2, 4, 4))
    group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, [0, 1, 2])
    scores = tp.importance.FPGMImportance(group_reduction="first", normalizer=None)(group)
    weight = net[0].weight.detach().flatten(1)
    squared = torch.cdist(weight.square(), weight.square()).sum(1)
    torch.testing.assert_close(scores, squared)
    assert not torch.allclose(scores, torch.cdist(weight, weight).sum(1))


def test_round_to_can_reach_zero_and_the_layer_is_then_skipped():
    assert prune(two_convs(), ramp, pruning_ratio=0.5, round_to=8) == [8, 8, 2]


def test_the_global_ratio_can_take_a_layer_to_almost_nothing():
    def scores(group):
        low = group[0].dep.target.name.startswith("0")
        return torch.arange(8.0) if low else 6.5 + torch.arange(8.0)

    assert min(prune(two_convs(), scores, global_pruning=True, max_pruning_ratio=0.5, pruning_ratio=0.45)) == 1


def test_stored_scores_go_stale_without_an_error():
    torch.manual_seed(0)
    net = two_convs()
    pruner = pruner_of(net, lambda group: torch.arange(8.0), iterative_steps=2, pruning_ratio=0.5)
    pruner.step()
    assert net[0].out_channels == 6
    pruner.step()  # 8 scores for 6 channels: four leave where two should
    assert net[0].out_channels == 2


def test_private_names_that_this_package_reads():
    net = conv_net()
    graph = tp.DependencyGraph().build_dependency(net, X)
    group = graph.get_pruning_group(net.conv1, tp.prune_conv_out_channels, [3, 1])
    assert group._DG is graph
    assert graph.model is net
    assert graph._module2name[net.conv1] == "conv1"
    assert list(group[0].idxs) == [3, 1]
    assert all(list(item.root_idxs) for item in group)
    assert net.conv1 in graph.module2node
    assert graph.is_out_channel_pruning_fn(group[0].dep.handler)


def test_chunk_is_mapped_in_the_order_of_the_walk_back():
    class Chunked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            first, second = self.conv(x).chunk(2, dim=1)
            return self.a(first) + self.b(second)

    net = Chunked()
    graph = tp.DependencyGraph().build_dependency(net, X)
    group = graph.get_pruning_group(net.conv, tp.prune_conv_out_channels, [0])
    readers = {item.dep.target.module for item in group} & {net.a, net.b}
    assert readers == {net.b}  # wrong: channel 0 is read by a


def test_flatten_is_taken_for_channel_major():
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(256, 2)

        def forward(self, x):
            return self.fc(self.conv(x).permute(0, 2, 3, 1).flatten(1))

    net = Pixels()
    graph = tp.DependencyGraph().build_dependency(net, X)
    group = graph.get_pruning_group(net.conv, tp.prune_conv_out_channels, [1])
    columns = next(item.idxs for item in group if item.dep.target.module is net.fc)
    assert list(columns) == list(range(64, 128))  # wrong: these are 1, 5, 9, ...
