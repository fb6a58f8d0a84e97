"""Normalisers equal Torch-Pruning's own wherever those are finite, and refuse what would mislead."""

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_twoaxis import TwoAxisError
from tp_twoaxis.importance.normalize import normalize

NAMES = [
    None,
    "mean",
    "sum",
    "max",
    "lamp",
    "standarization",
    "gaussian",
    "sentinel_0",
    "sentinel_0.5",
    "sentinel_0.99",
]


@pytest.mark.parametrize("name", NAMES)
@given(values=st.lists(st.floats(0.0078125, 1024.0, width=32), min_size=2, max_size=20, unique=True))
@settings(max_examples=20, deadline=None)
def test_equals_the_host(name, values):
    scores = torch.tensor(values, dtype=torch.float32)
    host = tp.importance.GroupMagnitudeImportance()._normalize(scores.clone(), name)
    torch.testing.assert_close(normalize(scores, name), host, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_given_scores_are_left_alone_and_functions_run(name):
    scores = torch.rand(5)
    before = scores.clone()
    normalize(scores, name)
    assert torch.equal(scores, before)
    assert torch.equal(normalize(scores, lambda s: s * 2), scores * 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 4])
def test_all_zero_scores_stay_finite(name, size):
    assert normalize(torch.zeros(size, dtype=torch.float64), name).tolist() == [0.0] * size


@pytest.mark.parametrize("name", NAMES)
def test_order_is_kept_but_by_lamp_only_up_to_ties(name):
    scores = torch.tensor([0.3, 0.1, 0.2, 0.9], dtype=torch.float64)
    assert normalize(scores, name).argsort().tolist() == scores.argsort().tolist()


@pytest.mark.parametrize("name", ["mean", "sum", "max", "lamp", "sentinel_0.5"])
def test_negative_scores_need_a_signed_normalizer(name):
    with pytest.raises(TwoAxisError, match=r"at least 0, got -1; use 'softmax', 'standarization', 'gaussian' or None"):
        normalize(torch.tensor([2.0, -1.0]), name)
    assert normalize(torch.tensor([2.0, -1.0]), "standarization").tolist() == pytest.approx([1.0, 0.0])


@given(values=st.lists(st.floats(-50, 50), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_softmax_is_positive_of_mean_1_and_knows_no_shift(values):
    scores = torch.tensor(values, dtype=torch.float64)
    got = normalize(scores, "softmax")
    assert (got > 0).all()
    assert got.mean().item() == pytest.approx(1.0)
    torch.testing.assert_close(got, torch.exp(scores) / torch.exp(scores).mean())
    torch.testing.assert_close(normalize(scores + 400.0, "softmax"), got)


def test_median_is_of_the_scores_above_0():
    scores = torch.tensor([0.0, 3.0, 1.0, 0.0, 0.0, 5.0], dtype=torch.float64)
    assert normalize(scores, "median").tolist() == pytest.approx([0.0, 1.0, 1 / 3, 0.0, 0.0, 5 / 3])
    assert normalize(torch.zeros(3), "median").tolist() == [0.0] * 3
    with pytest.raises(TwoAxisError, match="'median' divides and needs scores of at least 0, got -1"):
        normalize(torch.tensor([2.0, -1.0]), "median")


@pytest.mark.parametrize("name", ["best", "sentinel_", "sentinel_1", "sentinel_x", "sentinel_-0.1"])
def test_unknown_names(name):
    with pytest.raises(TwoAxisError, match=f"normalizer: expected one of median, .*got '{name}'"):
        normalize(torch.rand(3), name)


@pytest.mark.parametrize(("function", "got"), [(lambda s: s / 0, "not finite"), (lambda s: s[1:], r"shape \[2\]")])
def test_functions_are_checked(function, got):
    with pytest.raises(TwoAxisError, match=f"3 finite scores, got.*{got}"):
        normalize(torch.ones(3), function)
