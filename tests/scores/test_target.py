"""Target axis against slow twins, and its invariances."""

import numpy as np
import pytest
import reference_scores as twin
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_twoaxis import TwoAxisError
from tp_twoaxis.scores import (
    pair_excess,
    pair_information,
    target,
    target_excess,
    target_redundancy,
    task_information,
)


def joint(channels, seed=0, columns=None, rows=60):
    """Sample correlations with the task [C] or [C, K] and among channels [C, C]; jointly possible ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels + (columns or 1), generator=generator, dtype=torch.float64)
    x = x @ torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=torch.float64)
    full = torch.corrcoef(x.T)
    r = full[:channels, channels:]
    return (r if columns else r[:, 0]), full[:channels, :channels]


@given(st.integers(0, 10_000), st.integers(2, 9))
@settings(max_examples=25, deadline=None)
def test_twins(seed, channels):
    r, rho = joint(channels, seed)
    a, b = r.numpy(), rho.numpy()
    np.testing.assert_allclose(task_information(r).numpy(), twin.task_information(a), rtol=1e-9)
    m = task_information(r)
    np.testing.assert_allclose(target_redundancy(m).numpy(), twin.target_redundancy(m.numpy()), rtol=1e-9)
    np.testing.assert_allclose(pair_information(r, rho).numpy(), twin.pair_information(a, b), rtol=1e-6)
    np.testing.assert_allclose(pair_excess(r, rho).numpy(), twin.pair_excess(a, b), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("rule", ["task-mi", "joint-mi", "excess"])
@pytest.mark.parametrize(("channels", "partners"), [(2, 10), (12, 3), (12, 10), (12, 40)])
def test_partner_rules_twin(rule, channels, partners):
    r, rho = joint(channels, seed=3)
    got = target_excess(r, rho, partners=partners, rule=rule)
    slow = twin.target_excess(r.numpy(), rho.numpy(), partners, rule)
    np.testing.assert_allclose(got.numpy(), slow, rtol=1e-6, atol=1e-12)


def test_a_wide_layer_is_looked_at_in_blocks_of_rows():
    r, rho = joint(300, seed=5, columns=2)
    information, excess, relevance = pair_information(r, rho), pair_excess(r, rho), task_information(r)
    torch.testing.assert_close(information.diagonal(), relevance)
    torch.testing.assert_close(excess, excess.T)
    got = target_excess(r, rho, partners=3)
    best = relevance.argsort(descending=True).tolist()
    for k in (0, 217, 218, 299, best[0], best[2], best[3]):
        partners = [j for j in best if j != k][:3]
        slow = []
        for j in partners:
            a, b = r[[k, j]].numpy(), rho[[k, j]][:, [k, j]].numpy()
            pairs = [(twin.pair_information(a[:, i], b), twin.pair_excess(a[:, i], b)) for i in range(2)]
            joint_mi, slow_excess = (np.mean([both[part][0, 1] for both in pairs]) for part in range(2))
            assert information[k, j].item() == pytest.approx(joint_mi, rel=1e-6)
            slow.append(slow_excess)
        assert got[k].item() == pytest.approx(np.mean(slow), rel=1e-6, abs=1e-12)


def test_only_the_partners_are_looked_at(monkeypatch):
    r, rho = joint(40, columns=3)
    expected = {rule: target_excess(r, rho, partners=4, rule=rule) for rule in ("task-mi", "random")}
    monkeypatch.setattr(target, "_over_rows", lambda *args: pytest.fail("all pairs were looked at"))
    for rule, values in expected.items():
        assert torch.equal(target_excess(r, rho, partners=4, rule=rule), values)


def test_equal_partners_come_in_the_order_of_the_channels():
    r, rho = joint(8, seed=2)
    tied = r.clone()
    tied[:] = 0.5  # all are equally relevant
    excess = pair_excess(tied, rho)
    got = target_excess(tied, rho, partners=3)
    for k in range(8):
        assert got[k].item() == pytest.approx(float(excess[k, [j for j in range(8) if j != k][:3]].mean()))


def test_random_rule_draws_from_the_most_relevant():
    r, rho = joint(40, seed=1)
    first = target_excess(r, rho, partners=4, rule="random")
    assert torch.equal(first, target_excess(r, rho, partners=4, rule="random"))
    assert not torch.equal(first, target_excess(r, rho, partners=4, rule="random", seed=1))
    # every partner is one of the 8 most relevant peers, so no mean lies outside of what these can give
    excess = pair_excess(r, rho)
    relevant = task_information(r).argsort(descending=True)
    for k in range(40):
        pool = [j for j in relevant.tolist() if j != k][:8]
        ordered = excess[k, pool].sort().values
        assert ordered[:4].mean() - 1e-12 <= first[k] <= ordered[-4:].mean() + 1e-12
    # with no choice left every rule is the mean over all peers
    for rule in ("task-mi", "joint-mi", "excess", "random"):
        torch.testing.assert_close(target_excess(r, rho, partners=39, rule=rule), excess.sum(1) / 39)


@pytest.mark.parametrize("function", [task_information, pair_information, pair_excess])
def test_columns_are_averaged(function):
    r, rho = joint(6, seed=5, columns=3)
    arguments = () if function is task_information else (rho,)
    each = [function(r[:, i], *arguments) for i in range(3)]
    torch.testing.assert_close(function(r, *arguments), torch.stack(each).mean(0))


def test_one_column_is_none_and_excess_of_columns_averages_pairs():
    r, rho = joint(6, seed=6, columns=3)
    torch.testing.assert_close(target_excess(r[:, :1], rho), target_excess(r[:, 0], rho))
    slow = np.mean([twin.pair_excess(r[:, i].numpy(), rho.numpy()) for i in range(3)], axis=0)
    np.testing.assert_allclose(target_excess(r, rho).numpy(), slow.sum(1) / 5, rtol=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_permutation_and_sign(seed):
    r, rho = joint(9, seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    signs = torch.where(torch.rand(9, generator=torch.Generator().manual_seed(seed)) < 0.5, -1.0, 1.0).double()
    expected = target_excess(r, rho, partners=3)
    torch.testing.assert_close(target_excess(r[order], rho[order][:, order], partners=3), expected[order])
    flipped = target_excess(r * signs, rho * signs * signs[:, None], partners=3)
    torch.testing.assert_close(flipped, expected, rtol=1e-6, atol=1e-9)


def test_lemma_1_redundancy_ignores_channel_correlation_and_excess_of_a_copy_is_zero():
    r, rho = joint(5)
    duplicated = torch.tensor([0, 1, 2, 3, 4, 0])
    excess = pair_excess(r[duplicated], rho[duplicated][:, duplicated])
    assert excess[0, 5] == 0
    assert excess[0, 1] > 0


def test_degenerate_layers():
    one = torch.tensor([0.5])
    assert target_redundancy(one).tolist() == [0.0]
    assert target_excess(one, torch.eye(1)).tolist() == [0.0]
    assert target_excess(torch.zeros(4), torch.eye(4)).tolist() == [0.0] * 4
    assert torch.isfinite(task_information(torch.tensor([1.0, -1.0], dtype=torch.float64))).all()


def test_errors():
    r, rho = joint(4)
    with pytest.raises(TwoAxisError, match=r"partners.*at least 1.*0"):
        target_excess(r, rho, partners=0)
    with pytest.raises(TwoAxisError, match=r"task-mi.*got 'best'"):
        target_excess(r, rho, rule="best")
