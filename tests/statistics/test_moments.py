"""CoMoments against NumPy, and the invariances that make its parts mergeable."""

import itertools

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_twoaxis import TwoAxisError
from tp_twoaxis.statistics import moments as module
from tp_twoaxis.statistics.moments import STRIP, CoMoments


def draw(n=200, width=6, seed=0, dtype=torch.float64):
    """Correlated rows with different means and scales."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    shift = 3 * torch.randn(width, generator=generator, dtype=torch.float64)
    return (torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix + shift).to(dtype)


def of(*parts, other=None):
    """Moments of parts taken in one after the other."""
    moments = CoMoments(parts[0].shape[-1], None if other is None else other[0].shape[-1])
    for i, part in enumerate(parts):
        moments.update(part, None if other is None else other[i])
    return moments


def error(moments, x, y=None):
    """Largest error against NumPy of mean (in standard deviations) and covariance (in both)."""
    x = x.double().numpy().reshape(-1, x.shape[-1])
    y = x if y is None else y.double().numpy().reshape(-1, y.shape[-1])
    assert moments.count == len(x)
    off = np.abs(moments.mean.numpy() - x.mean(0)) / x.std(0)
    other_off = np.abs(moments.other_mean.numpy() - y.mean(0)) / y.std(0)
    covariance = reference.relative_error(moments.covariance, reference.covariance(x, y), x.var(0), y.var(0))
    return max(off.max(), other_off.max(), covariance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_numpy_on_the_values_given(dtype):
    x = draw(dtype=dtype)
    assert error(of(x), x) < 1e-12


def test_paired_rows():
    x, y = draw(seed=1), draw(width=3, seed=2, dtype=torch.float32)
    moments = of(x, other=[y])
    assert moments.paired
    assert moments.scatter.shape == (6, 3)
    assert error(moments, x, y) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mean_a_hundred_thousand_standard_deviations_away(dtype):
    x = (torch.randn(4000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e5).to(dtype)
    moments = of(*x.split(37))
    # naive sums of squares lose all but six digits here in float64, and every digit in float32
    assert error(moments, x) < 1e-9
    assert error(of(x[:1500]).merge(of(x[1500:])), x) < 1e-9


@pytest.mark.parametrize("layout", ["flat", "positions", "strided"])
def test_any_layout_and_the_rows_stay_as_they_are(layout):
    x = draw(240)
    given_rows = {"flat": x, "positions": x.view(8, 30, 6), "strided": x.view(8, 30, 6).transpose(1, 2).contiguous()}
    rows = given_rows[layout]
    rows = rows.transpose(1, 2) if layout == "strided" else rows
    before = rows.clone()
    assert error(of(rows), x) < 1e-12
    assert torch.equal(rows, before)
    paired = CoMoments(6, 6)
    paired.update(rows, rows)
    assert torch.equal(rows, before)
    torch.testing.assert_close(paired.scatter, of(rows).scatter, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(
    cuts=st.lists(st.integers(0, 120), max_size=6),
    order=st.permutations(range(120)),
    block=st.integers(1, 400),
    merged=st.booleans(),
    seed=st.integers(0, 5),
)
def test_batches_order_blocks_and_merging_change_nothing(cuts, order, block, merged, seed):
    x, y = draw(120, 4, seed), draw(120, 2, seed + 10)
    bounds = [0, *sorted(cuts), 120]
    pieces = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    permuted = torch.tensor(order)
    original = dict(module.BLOCK_NUMBERS)
    module.BLOCK_NUMBERS["cpu"] = block
    try:
        for other in (None, y):
            parts = [x[permuted][piece] for piece in pieces]
            others = None if other is None else [other[permuted][piece] for piece in pieces]
            if merged:
                result = CoMoments(4, None if other is None else 2)
                for i in reversed(range(len(parts))):
                    result.merge(of(parts[i], other=None if others is None else [others[i]]))
            else:
                result = of(*parts, other=others)
            assert error(result, x, other) < 1e-9
    finally:
        module.BLOCK_NUMBERS.update(original)


def test_merging_leaves_the_other_part_alone_and_returns_self():
    a, b = of(draw(seed=1)), of(draw(seed=2))
    mean, scatter = b.mean.clone(), b.scatter.clone()
    assert a.merge(b) is a
    assert torch.equal(b.mean, mean)
    assert torch.equal(b.scatter, scatter)
    assert b.count == 200


@settings(deadline=None, max_examples=25)
@given(
    pieces=st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([0.5, 1.0, 4.0, 64.0, 50 / 7])), min_size=1, max_size=5
    ),
    order=st.randoms(use_true_random=False),
    paired=st.booleans(),
    shift=st.sampled_from([0.0, 1e6]),
)
def test_weighted_rows_equal_rows_that_are_repeated(pieces, order, paired, shift):
    """Rows of weight w count as w of them, in whatever order parts of different weights come or merge."""
    x, y = draw(sum(n for n, _ in pieces), 4) + shift, draw(sum(n for n, _ in pieces), 3, 1)
    weights = np.concatenate([np.full(n, w) for n, w in pieces])
    parts = []
    for rows, others, (_, weight) in zip(
        x.split([n for n, _ in pieces]), y.split([n for n, _ in pieces]), pieces, strict=True
    ):
        parts.append(CoMoments(4, 3 if paired else None))
        parts[-1].update(rows, others if paired else None, weight=weight)
    order.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    joint = np.concatenate([x.numpy(), y.numpy()], 1)
    expected = np.cov(joint, rowvar=False, bias=True, aweights=weights).reshape(7, 7)
    assert (merged.count, merged.weight) == (len(x), pytest.approx(weights.sum()))
    scale = np.sqrt(np.outer(x.var(0, correction=0), (y if paired else x).var(0, correction=0)) + 1e-12)
    found = merged.covariance.numpy() - (expected[:4, 4:] if paired else expected[:4, :4])
    assert (np.abs(found) / scale).max() < 1e-6
    np.testing.assert_allclose(merged.mean, np.average(x.numpy(), axis=0, weights=weights), rtol=1e-12)


def test_rows_with_gradients_leave_no_graph():
    rows = draw().requires_grad_()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            moments = of(rows, rows).merge(of(rows))
        assert not moments.scatter.requires_grad
        assert not moments.mean.requires_grad


def test_weights_that_make_no_sense():
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(TwoAxisError, match="weight: expected the number of rows that each row stands for"):
            CoMoments(3).update(torch.zeros(2, 3), weight=weight)


def test_the_variance_is_the_covariances_diagonal():
    moments = CoMoments(3)
    assert torch.equal(moments.variance, torch.zeros(3, dtype=torch.float64))
    moments.update(torch.randn(9, 3), weight=2.5)
    assert torch.equal(moments.variance, moments.covariance.diagonal())


def test_empty_parts_are_neutral():
    x = draw()
    assert torch.equal(CoMoments(3).covariance, torch.zeros(3, 3, dtype=torch.float64))
    moments = of(x[:0], x, x[:0])
    moments.update(torch.zeros(2, 0, 6))
    for merged in (CoMoments(6).merge(moments), moments.merge(CoMoments(6))):
        assert error(merged, x) < 1e-12


@pytest.mark.parametrize("width", [40, STRIP + 3, 2 * STRIP])
@pytest.mark.parametrize("product", [torch.float32, torch.float64])
def test_the_scatter_is_symmetric_to_the_last_bit(width, product):
    moments = CoMoments(width, product=product)
    for part in draw(300, width).split(77):
        moments.update(part)
    x = draw(300, width)
    other = of(x[:9])
    for merged in (moments, moments.merge(other)):
        assert torch.equal(merged.scatter, merged.scatter.T)
    assert error(moments, torch.cat([draw(300, width), x[:9]])) < (1e-12 if product == torch.float64 else 1e-6)


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e4, -1e7])
@pytest.mark.parametrize("sizes", [[200], [1, 199], [50, 50, 100]])
def test_float32_products_keep_their_digits_far_from_zero(mean, sizes):
    x = draw() + mean * torch.linspace(1, 2, 6)
    rows, moments = x.float(), CoMoments(6, product=torch.float32)
    for part in rows.split(sizes):
        moments.update(part)
    assert error(moments, rows) < 5e-6


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_lower_precision_of_products_is_not_used(precision, monkeypatch):
    before = torch.get_float32_matmul_precision()
    rows = draw(2000, 64).float()
    try:
        torch.set_float32_matmul_precision(precision)
        moments = CoMoments(64, product=torch.float32)
        moments.update(rows)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert error(moments, rows) < 1e-12

    def unclear():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", unclear)
    moments = CoMoments(64, product=torch.float32)
    moments.update(rows)
    assert error(moments, rows) < 1e-12


def test_from_parts_rebuilds():
    x, y = draw(), draw(width=2, seed=3)
    for moments in (of(x), of(x, other=[y])):
        again = CoMoments.from_parts(
            moments.count, moments.mean, moments.scatter, moments.other_mean if moments.paired else None, weight=50.0
        )
        assert (again.count, again.weight) == (200, 50.0)
        again = CoMoments.from_parts(
            moments.count, moments.mean, moments.scatter, moments.other_mean if moments.paired else None
        )
        assert again.paired == moments.paired
        assert torch.equal(again.covariance, moments.covariance)
        assert torch.equal(again.other_mean, moments.other_mean)
        again.merge(moments)
        assert again.count == 400


def test_moments_move():
    moments = of(draw(), other=[draw(width=2)])
    assert moments.to("cpu") is moments
    assert {moments.mean.device.type, moments.other_mean.device.type, moments.scatter.device.type} == {"cpu"}


@pytest.mark.parametrize(
    ("moments", "arguments", "message"),
    [
        (CoMoments(3), (torch.zeros(5, 4),), r"expected rows \[n, 3\], got \[5, 4\]"),
        (CoMoments(3), (torch.zeros(3),), r"expected rows \[n, 3\], got \[3\]"),
        (CoMoments(3), (torch.zeros(1, 2, 3, 3),), r"expected rows \[n, 3\]"),
        (CoMoments(3), (torch.zeros(5, 3), torch.zeros(5, 2)), r"got \[5, 3\] and \[5, 2\]"),
        (CoMoments(3, 2), (torch.zeros(5, 3),), "and their pairs"),
        (CoMoments(3, 2), (torch.zeros(5, 3), torch.zeros(4, 2)), r"paired rows \[5, 2\], got \[4, 2\]"),
        (CoMoments(3, 2), (torch.zeros(5, 3), torch.zeros(5, 1)), r"paired rows \[5, 2\], got \[5, 1\]"),
    ],
)
def test_shapes_that_do_not_fit(moments, arguments, message):
    with pytest.raises(TwoAxisError, match=message):
        moments.update(*arguments)
    assert moments.count == 0


@pytest.mark.parametrize("other", [CoMoments(4), CoMoments(3, 3), CoMoments(3, 2)])
def test_moments_that_do_not_merge(other):
    with pytest.raises(TwoAxisError, match="only moments of the same layer merge"):
        CoMoments(3).merge(other)


def test_parts_that_do_not_fit():
    with pytest.raises(TwoAxisError, match=r"expected a scatter \[2, 2\], got \[3, 3\]"):
        CoMoments.from_parts(1, torch.zeros(2), torch.zeros(3, 3))
