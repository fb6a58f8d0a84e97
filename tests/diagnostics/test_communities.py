"""Communities of channels against Newman's formula, and what is and is not an edge."""

from __future__ import annotations

import builtins
import math

import pytest
import reference_structure as twin
import torch
from cases import batches, conv_net

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.diagnostics import communities
from tp_twoaxis.diagnostics.communities import (
    COLUMNS,
    chance_modularity,
    community_table,
    excess_graph,
    find_communities,
    overlap_graph,
    strongest_edges,
)
from tp_twoaxis.scores import pair_excess, pair_overlap


def symmetric(count: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return (drawn + drawn.T).fill_diagonal_(0.0)


@pytest.mark.parametrize("share", [0.1, 0.35, 1.0])
def test_edges_and_modularity_are_those_of_the_formula(share: float) -> None:
    weights = symmetric(14, seed=3)
    weights[2, 5] = weights[5, 2] = -1.0  # no edge, however strong
    edges = twin.strongest_edges(weights.tolist(), share)
    assert list(map(tuple, strongest_edges(weights, share).tolist())) == edges
    found = find_communities(weights, share)
    assert found.edges == len(edges)
    assert found.modularity == pytest.approx(twin.modularity(weights.tolist(), edges, found.members))


def test_blocks_are_found_and_their_modularity_is_known() -> None:
    weights = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4), torch.ones(4, 4)).double() + 1e-3
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    found = find_communities(weights[order][:, order], share=18 / 66)  # the pairs inside of the blocks
    place = {int(old): new for new, old in enumerate(order)}
    blocks = {tuple(sorted(place[k] for k in range(start, start + 4))) for start in (0, 4, 8)}
    assert set(found.members) == blocks
    assert found.modularity == pytest.approx(2 / 3)


def test_a_graph_without_positive_weights_has_no_modularity() -> None:
    found = find_communities(torch.zeros(5, 5))
    assert (found.edges, found.members) == (0, ())
    assert math.isnan(found.modularity)
    assert math.isnan(chance_modularity(torch.zeros(5, 5)))


def test_weights_dealt_at_random_are_less_modular_than_blocks() -> None:
    weights = torch.block_diag(*[torch.ones(5, 5)] * 4)
    chance = chance_modularity(weights, share=1.0, shuffles=3)
    assert chance < find_communities(weights, share=1.0).modularity - 0.2
    assert chance_modularity(weights, share=1.0, shuffles=3) == chance


def test_graphs_are_those_of_the_varying_channels() -> None:
    net = conv_net()
    with torch.no_grad():
        net.conv1.weight[3] = 0.0
    stats = calibrate(net, batches(), progress=False)
    layer, varying = stats["conv1"], torch.tensor([k for k in range(16) if k != 3])
    table = community_table(stats, ["conv1", "conv2"])
    assert list(table) == list(COLUMNS)
    assert table.channels.tolist() == [15, 16]
    assert table.depth.tolist() == [0.0, 1.0]
    overlap = pair_overlap(layer.correlation)[varying][:, varying]
    excess = pair_excess(layer.target_correlation(), layer.pooled_correlation)[varying][:, varying]
    torch.testing.assert_close(overlap_graph(layer, varying), overlap)
    torch.testing.assert_close(excess_graph(layer, varying), excess)
    first = table.iloc[0]
    assert first.overlap_modularity == find_communities(overlap).modularity
    assert first.excess_modularity == find_communities(excess).modularity
    assert first.gap == first.overlap_modularity - first.excess_modularity


def test_of_wide_layers_channels_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communities, "MOST_CHANNELS", 10)
    stats = calibrate(conv_net(), batches(), progress=False)
    table = community_table(stats, ["conv1", "reduce"])
    assert table.channels.tolist() == [10, 8]
    assert community_table(stats, ["conv1", "reduce"]).equals(table)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(TwoAxisError, match="share: expected a number above 0"):
        strongest_edges(symmetric(4), share)


def test_without_networkx_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name, *arguments, **keywords):
        if name == "networkx":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(TwoAxisError, match=r"tp-twoaxis\[evidence\]"):
        find_communities(symmetric(4))
