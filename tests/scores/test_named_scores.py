"""Named scores on real statistics: twins end to end, constant channels, invariances, errors."""

import numpy as np
import pytest
import reference_scores as twin
import torch
from torch import nn

from tp_twoaxis import TwoAxisError, calibrate
from tp_twoaxis.scores import SCORES, find_score
from tp_twoaxis.scores.cluster import spectral_clusters
from tp_twoaxis.scores.composite import composite_pid, pid_no_red
from tp_twoaxis.scores.named_scores import capture, evaluate, hull_refined, target_excess
from tp_twoaxis.scores.spectral import spectral_rs

CORRELATION_ONLY = (
    "low-overlap",
    "task-mi",
    "target-redundancy",
    "target-excess",
    "composite-pid",
    "pid-no-red",
    "spectral-pid-rs",
)


def layer_of(scale=None, order=None, weight=None, images=200):
    """Statistics of one linear layer on fixed images; its channels scaled, reordered or replaced."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 10, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (images,), generator=generator)
    net = nn.Sequential(nn.Linear(10, 12, bias=False), nn.Linear(12, 4)).double()
    with torch.no_grad():
        base = torch.randn(12, 10, generator=generator, dtype=torch.float64) if weight is None else weight
        head = torch.randn(4, 12, generator=generator, dtype=torch.float64)
        order = torch.arange(12) if order is None else order
        scale = torch.ones(12, dtype=torch.float64) if scale is None else scale
        net[0].weight.copy_((base * scale[:, None])[order])
        net[1].weight.copy_((head / torch.where(scale > 0, scale, 1.0))[:, order])
        net[1].bias.zero_()
    return calibrate(net, [(x, y)], progress=False)["0"]


def arrays(layer):
    return layer.variance.numpy(), layer.correlation.numpy(), layer.pooled_correlation.numpy()


def residual_shares(rho, ridge=1e-6):
    """What regression on all peers leaves of each channel, one channel at a time."""
    shares = []
    for k in range(len(rho)):
        peers = np.delete(np.arange(len(rho)), k)
        inner = rho[np.ix_(peers, peers)] + ridge * np.eye(len(peers))
        shares.append(1 - rho[k, peers] @ np.linalg.solve(inner, rho[peers, k]))
    return np.array(shares)


def slow_scores(variance, norm, rho, pooled, r):
    """Every score of channels that all vary, from the formulas."""
    active = np.ones(len(variance), dtype=bool)
    hulls = [twin.greedy_hull(rho, k, active, max_size=8)[1][-1] for k in range(len(variance))]
    capture, overlap, information = twin.capture(variance), twin.peer_overlap(rho, active), twin.task_information(r)
    excess, redundancy = twin.target_excess(r, pooled), twin.target_redundancy(information)

    def z(values):
        return twin.z(values, active)

    pid = z(information) + z(excess)
    # which clusters there are is k-means' business, what is made of them is not
    pairs = [[0.0 if k == j else twin.info(rho[k, j] ** 2) for j in range(len(r))] for k in range(len(r))]
    local = spectral_clusters(torch.tensor(pairs, dtype=torch.float64))
    atoms = np.minimum(information[:, None], information) + twin.pair_excess(r, pooled)
    target = spectral_clusters(torch.from_numpy(atoms))
    return {
        "capture": capture,
        "variance": variance / np.mean(variance),
        "conditional-variance": variance / np.mean(variance) * residual_shares(rho),
        "low-overlap": -overlap,
        "composite-local": z(capture) - 0.3 * z(overlap),
        "norm-local": 0.3 * z(np.log(norm)) + z(capture) - 0.3 * z(overlap),
        "hull": variance / np.mean(variance) * (1 - 0.5 * np.array(hulls)),
        "compact-hull": z(capture) - z(twin.compact_support(rho, active)),
        "cap-a": twin.assign_by_rank(capture, twin.annealed(z(capture) - 0.3 * z(overlap), z(capture))),
        "spectral-rs": twin.assign_by_rank(capture, twin.cluster_quantiles(capture, local.tolist())),
        "task-mi": information,
        "target-redundancy": redundancy,
        "target-excess": excess,
        "composite-pid": pid - z(redundancy),
        "pid-no-red": pid,
        "spectral-pid-rs": twin.assign_by_rank(information, twin.cluster_quantiles(pid, target.tolist())),
    }


def test_twins_end_to_end():
    layer = layer_of()
    variance, rho, pooled = arrays(layer)
    norm = layer.weight_power.sqrt().numpy()
    slow = slow_scores(variance, norm, rho, pooled, layer.target_correlation("margin").numpy())
    assert set(slow) == set(SCORES)
    for name in SCORES:
        np.testing.assert_allclose(evaluate(find_score(name), layer).numpy(), slow[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", SCORES)
def test_permuting_channels_permutes_the_score(name):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    expected = evaluate(find_score(name), layer_of())[order]
    torch.testing.assert_close(evaluate(find_score(name), layer_of(order=order)), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", SCORES)
def test_scaling_a_channel_moves_only_scores_that_know_power(name):
    scale = torch.ones(12, dtype=torch.float64)
    scale[3] = 5.0
    same = torch.allclose(evaluate(find_score(name), layer_of(scale=scale)), evaluate(find_score(name), layer_of()))
    assert same == (name in CORRELATION_ONLY)


@pytest.mark.parametrize("name", SCORES)
def test_constant_channels_are_lowest_and_do_not_move_the_others(name):
    weight = torch.randn(12, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with_zeros = weight.clone()
    with_zeros[[2, 7]] = 0.0
    layer = layer_of(weight=with_zeros)
    assert layer.variance[[2, 7]].tolist() == [0.0, 0.0]
    scores = evaluate(find_score(name), layer)
    assert scores[2] == scores[7] == scores.min()
    active = layer.variance > 0
    variance, rho, pooled = arrays(layer)
    keep = np.flatnonzero(active.numpy())
    r = layer.target_correlation().numpy()[keep]
    rho, pooled, variance = rho[np.ix_(keep, keep)], pooled[np.ix_(keep, keep)], variance[keep]
    norm = layer.weight_power.sqrt().numpy()[keep]
    alone = slow_scores(variance, norm, rho, pooled, r)[name]
    np.testing.assert_allclose(scores[active].numpy(), alone, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("width", [1, 3])
def test_single_channel_and_all_constant_layers(name, width):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, width), nn.Linear(width, 3))
    data = [(torch.randn(20, 6), torch.randint(3, (20,)))]
    assert torch.isfinite(evaluate(find_score(name), calibrate(net, data, progress=False)["0"])).all()
    nn.init.zeros_(net[0].weight)
    scores = evaluate(find_score(name), calibrate(net, data, progress=False)["0"])
    assert torch.isfinite(scores).all()
    assert len(set(scores.tolist())) == 1


def test_columns_of_a_target_are_averaged():
    generator = torch.Generator().manual_seed(0)
    net = nn.Linear(5, 6).double()
    data = [
        (torch.randn(80, 5, generator=generator, dtype=torch.float64), torch.randint(6, (80,), generator=generator))
    ]
    layer = calibrate(net, data, target="one_vs_rest", progress=False)[""]
    r = layer.target_correlation().numpy()
    assert r.shape == (6, 6)
    slow = np.mean([twin.task_information(r[:, k]) for k in range(6)], axis=0)
    np.testing.assert_allclose(evaluate(find_score("task-mi"), layer).numpy(), slow, rtol=1e-9)
    pairs = np.mean([twin.pair_excess(r[:, k], layer.pooled_correlation.numpy()) for k in range(6)], axis=0)
    np.testing.assert_allclose(evaluate(find_score("target-excess"), layer).numpy(), pairs.sum(1) / 5, rtol=1e-5)


def test_hull_strength():
    layer = layer_of()
    torch.testing.assert_close(hull_refined(layer, strength=0.0), find_score("variance")(layer))
    assert (hull_refined(layer, strength=1.0) <= hull_refined(layer, strength=0.2)).all()


def test_the_noise_floor_is_an_option():
    layer = layer_of()
    expected = [0.5 * np.log1p(power / 0.25) for power in layer.variance.tolist()]
    np.testing.assert_allclose(capture(layer, noise_power=0.25).numpy(), expected)
    with pytest.raises(TwoAxisError, match="noise_power: expected a variance above 0"):
        capture(layer, noise_power=0.0)


@pytest.mark.parametrize("rule", ["task-mi", "joint-mi", "excess"])
def test_partners_of_the_excess_are_an_option(rule):
    layer = layer_of()
    r, pooled = layer.target_correlation().numpy(), layer.pooled_correlation.numpy()
    excess = twin.target_excess(r, pooled, partners=4, rule=rule)
    np.testing.assert_allclose(target_excess(layer, partners=4, rule=rule).numpy(), excess, rtol=1e-6)
    active = np.ones(12, dtype=bool)
    pid = twin.z(twin.task_information(r), active) + twin.z(excess, active)
    np.testing.assert_allclose(pid_no_red(layer, 4, rule).numpy(), pid, rtol=1e-5)
    redundancy = twin.z(twin.target_redundancy(twin.task_information(r)), active)
    np.testing.assert_allclose(composite_pid(layer, 4, rule).numpy(), pid - redundancy, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("affinity", ["R", "S", "RS"])
def test_clusters_are_of_the_chosen_pairs(affinity):
    layer = layer_of()
    rho, r, count = layer.correlation.numpy(), layer.target_correlation().numpy(), 12
    overlap = np.array([[0.0 if k == j else twin.info(rho[k, j] ** 2) for j in range(count)] for k in range(count)])
    excess = twin.pair_excess(r, layer.pooled_correlation.numpy())
    both = overlap / overlap.mean() + excess / excess.mean()
    pairs = {"R": overlap, "S": excess, "RS": both}[affinity]
    values = twin.capture(layer.variance.numpy())
    clusters = spectral_clusters(torch.from_numpy(pairs)).tolist()
    expected = twin.assign_by_rank(values, twin.cluster_quantiles(values, clusters))
    np.testing.assert_allclose(spectral_rs(layer, affinity).numpy(), expected)


def test_an_unknown_affinity_is_refused():
    with pytest.raises(TwoAxisError, match="affinity"):
        spectral_rs(layer_of(), "SR")


def test_names_and_axes():
    with pytest.raises(TwoAxisError, match=r"capture.*did you mean 'capture'"):
        find_score("captur")
    with pytest.raises(TwoAxisError, match=r"task-mi, .*pid-no-red.* \(target axis\), got 'capture'"):
        find_score("capture", axis="target")
    assert {entry.axis for entry in SCORES.values()} == {"local", "target"}


@pytest.mark.parametrize(
    ("score", "got"),
    [
        (lambda layer: layer.variance[:-1], r"\[11\]"),
        (lambda layer: layer.variance * torch.nan, "not finite"),
        (lambda layer: layer.variance[:, None], r"\[12, 1\]"),
    ],
)
def test_bad_score_functions(score, got):
    with pytest.raises(TwoAxisError, match=f"0: expected one finite score for each of 12 channels, got.*{got}"):
        evaluate(score, layer_of())
