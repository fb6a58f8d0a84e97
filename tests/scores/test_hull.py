"""Greedy hulls and full explanation against explicit linear solves."""

import numpy as np
import pytest
import reference_scores as twin
import torch

from tp_twoaxis import TwoAxisError
from tp_twoaxis.scores import full_explanation, greedy_hulls, hull


def correlation(channels, seed=0, factors=6):
    """A few common factors and private noise, so that hulls of every size occur."""
    generator = torch.Generator().manual_seed(seed)
    load = torch.randn(channels, factors, generator=generator, dtype=torch.float64)
    noise = torch.rand(channels, generator=generator, dtype=torch.float64) * 3
    covariance = load @ load.T + torch.diag(noise)
    scale = covariance.diagonal().sqrt()
    return covariance / scale / scale[:, None]


@pytest.mark.parametrize(
    ("channels", "pool", "max_size", "epsilon"), [(2, 32, 10, 0.1), (14, 6, 4, 0.1), (20, 32, 10, 0.3)]
)
@pytest.mark.parametrize("constant", [False, True])
def test_twin_channel_by_channel(channels, pool, max_size, epsilon, constant):
    rho = correlation(channels, seed=channels)
    active = torch.ones(channels, dtype=torch.bool)
    if constant and channels > 2:
        active[[1, 5]] = False
        rho[[1, 5]] = 0.0
        rho[:, [1, 5]] = 0.0
        rho.fill_diagonal_(1.0)
    hulls = greedy_hulls(rho, active=active, pool=pool, max_size=max_size, epsilon=epsilon)
    for k in range(channels):
        chosen, path, whole, size = twin.greedy_hull(rho.numpy(), k, active.numpy(), pool, max_size, epsilon)
        np.testing.assert_allclose(hulls.path[k, : len(path)].numpy(), path, atol=1e-8)
        assert hulls.pool_explanation[k].item() == pytest.approx(whole, abs=1e-8)
        assert hulls.size[k].item() == size
        assert hulls.peers[k, : len(chosen)].tolist() == chosen
        if size:
            assert hulls.explanation[k].item() == pytest.approx(path[size - 1], abs=1e-8)
        assert bool(hulls.singleton[k]) == (size == 1)
        assert bool(hulls.saturated[k]) == (size == max_size)


@pytest.mark.parametrize("block", [1, 3 * 6**2, 10**6])
def test_blocks_of_channels_decide_memory_only(monkeypatch, block):
    rho, active = correlation(20, seed=7), torch.arange(20) != 4
    monkeypatch.setattr(hull, "BLOCK_NUMBERS", block)
    hulls = greedy_hulls(rho, active=active, pool=6, max_size=4)
    for k in range(20):
        chosen, path, whole, size = twin.greedy_hull(rho.numpy(), k, active.numpy(), 6, 4)
        np.testing.assert_allclose(hulls.path[k, : len(path)].numpy(), path, atol=1e-8)
        assert (hulls.size[k].item(), hulls.peers[k, : len(chosen)].tolist()) == (size, chosen)
        assert hulls.pool_explanation[k].item() == pytest.approx(whole, abs=1e-8)


def test_path_rises_and_permutes():
    rho = correlation(30, seed=2)
    hulls = greedy_hulls(rho)
    assert (hulls.path.diff(dim=1) >= -1e-12).all()
    assert ((hulls.path >= 0) & (hulls.path <= 1)).all()
    assert (hulls.path[:, -1] <= hulls.pool_explanation + 1e-12).all()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    permuted = greedy_hulls(rho[order][:, order])
    torch.testing.assert_close(permuted.path, hulls.path[order])
    assert torch.equal(order[permuted.peers], hulls.peers[order])


def test_a_duplicate_is_a_singleton_hull():
    rho = correlation(12, seed=4)
    index = torch.tensor([*range(12), 3])
    hulls = greedy_hulls(rho[index][:, index])
    assert hulls.size[3] == hulls.size[12] == 1
    assert hulls.singleton[[3, 12]].all()
    assert hulls.peers[3, 0] == 12
    assert hulls.explanation[3].item() == pytest.approx(1.0, abs=1e-5)
    assert full_explanation(rho[index][:, index])[3].item() == pytest.approx(1.0, abs=1e-5)


def test_sum_of_many_equal_parts_saturates():
    parts = 16
    rho = torch.eye(parts + 1, dtype=torch.float64)
    rho[parts, :parts] = rho[:parts, parts] = 1 / np.sqrt(parts + 0.01)
    hulls = greedy_hulls(rho)
    assert hulls.size[parts] == 10
    assert hulls.saturated[parts]
    assert hulls.explanation[parts].item() == pytest.approx(10 / 16, abs=1e-3)
    assert hulls.pool_explanation[parts].item() == pytest.approx(1.0, abs=2e-3)
    assert greedy_hulls(rho, max_size=16, epsilon=0.01).size[parts] == 16


def test_perfectly_collinear_layers_stay_finite():
    rho = torch.ones(6, 6, dtype=torch.float64)
    hulls = greedy_hulls(rho, ridge=0.0)
    assert torch.isfinite(hulls.path).all()
    assert hulls.singleton.all()
    torch.testing.assert_close(hulls.explanation, torch.ones(6, dtype=torch.float64))


def test_degenerate_layers():
    single = greedy_hulls(torch.ones(1, 1))
    assert single.size.tolist() == [0]
    assert single.path.shape == (1, 0)
    assert not single.saturated.any()
    constant = greedy_hulls(torch.eye(4), active=torch.zeros(4, dtype=torch.bool))
    assert constant.explanation.tolist() == [0.0] * 4
    assert constant.pool_explanation.tolist() == [0.0] * 4
    assert full_explanation(torch.eye(4), active=torch.zeros(4, dtype=torch.bool)).tolist() == [0.0] * 4
    assert full_explanation(torch.ones(1, 1)).item() == pytest.approx(0.0, abs=1e-9)


def test_a_channel_that_no_peer_explains_has_no_hull():
    rho = torch.eye(5, dtype=torch.float64)
    rho[0, 1] = rho[1, 0] = 0.9
    active = torch.tensor([True, True, True, True, False])
    hulls = greedy_hulls(rho, active=active, max_size=1)
    assert hulls.size.tolist() == [1, 1, 0, 0, 0]
    assert hulls.singleton.tolist() == hulls.saturated.tolist() == [True, True, False, False, False]
    assert hulls.explanation[2:].tolist() == [0.0] * 3
    # explained by a millionth of a millionth is little, but not rounding
    rho[2, 3] = rho[3, 2] = 1e-6
    assert greedy_hulls(rho, active=active).size.tolist() == [1, 1, 1, 1, 0]


def test_full_explanation_twin():
    rho = correlation(10, seed=1)
    slow = [twin.explanation(rho.numpy(), k, [j for j in range(10) if j != k]) for k in range(10)]
    np.testing.assert_allclose(full_explanation(rho, ridge=0.0).numpy(), slow, atol=1e-9)


def test_wide_layers_run():
    hulls = greedy_hulls(correlation(512, factors=40), pool=16, max_size=6)
    assert hulls.path.shape == (512, 6)


@pytest.mark.parametrize("reference", ["pool", "peers"])
@pytest.mark.parametrize("tolerance", ["factor", "difference"])
@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.4])
def test_hulls_are_the_shortest_prefixes_that_least_squares_finds_enough(reference, tolerance, epsilon):
    count, pool, max_size = 24, 8, 5
    rho, active = correlation(count, seed=3, factors=4), torch.arange(count) != 4
    rho[4] = rho[:, 4] = 0.0
    rho[4, 4] = 1.0
    hulls = greedy_hulls(
        rho, active=active, pool=pool, max_size=max_size, epsilon=epsilon, tolerance=tolerance, reference=reference
    )
    for k in range(count):
        chosen, _, whole, _ = twin.greedy_hull(rho.numpy(), k, active.numpy(), pool, max_size)
        if reference == "peers":
            others = [j for j in range(count) if j != k and active[j]]
            whole = twin.explanation(rho.numpy(), k, others, 1e-6) if active[k] else 0.0
        required = (1 - epsilon) * whole if tolerance == "factor" else whole - epsilon
        # the empty set explains nothing, and is enough where nothing is required
        explained = [twin.explanation(rho.numpy(), k, chosen[:n], 1e-6) for n in range(len(chosen) + 1)]
        size = next((n for n, value in enumerate(explained) if value >= required), len(chosen))
        assert hulls.size[k].item() == (size if active[k] else 0)
        assert hulls.explanation[k].item() == pytest.approx(explained[size] if active[k] else 0.0, abs=1e-8)
        assert (bool(hulls.singleton[k]), bool(hulls.saturated[k])) == (size == 1, active[k] and size == max_size)


def test_all_peers_ask_more_than_the_pool():
    rho = correlation(40, seed=5, factors=20)
    pool, peers = (greedy_hulls(rho, pool=6, max_size=4, reference=name) for name in ("pool", "peers"))
    assert (peers.size >= pool.size).all()
    assert peers.saturated.sum() > pool.saturated.sum()
    assert torch.equal(pool.peers, peers.peers)


def test_a_difference_needs_no_peer_where_all_explain_less():
    rho = torch.eye(4, dtype=torch.float64)
    rho[0, 1] = rho[1, 0] = 0.2  # 4 % of the variance
    hulls = greedy_hulls(rho, tolerance="difference")
    assert hulls.size.tolist() == [0] * 4
    assert not (hulls.singleton | hulls.saturated).any()
    assert greedy_hulls(rho).size.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("bad", [{"pool": 0}, {"max_size": 0}, {"ridge": -1.0}])
def test_errors(bad):
    with pytest.raises(TwoAxisError, match="expected pool >= 1"):
        greedy_hulls(torch.eye(3), **bad)


@pytest.mark.parametrize("bad", [{"epsilon": 1.0}, {"epsilon": -0.1}, {"tolerance": "ratio"}, {"reference": "all"}])
def test_unknown_thresholds_are_refused(bad):
    with pytest.raises(TwoAxisError, match=next(iter(bad))):
        greedy_hulls(torch.eye(3), **bad)
