"""Union information against a conic programme, mirror descent, and tables whose minimum is known."""

import itertools

import numpy as np
import pytest
import reference_collapse
import torch

from tp_twoaxis import TwoAxisError
from tp_twoaxis.diagnostics.union_information import union_information


def counts(shape, images, concentration, tables=12, seed=0):
    """Joint distributions [tables, T, Y, X] of so many images; a low concentration leaves cells empty."""
    generator = np.random.default_rng(seed)
    cells = int(np.prod(shape))
    drawn = [generator.multinomial(images, generator.dirichlet(np.full(cells, concentration))) for _ in range(tables)]
    return torch.tensor(np.array(drawn), dtype=torch.float64).view(-1, *shape) / images


TABLES = {
    "full": counts((4, 4, 4), 5000, 100.0),
    "sparse": counts((4, 4, 4), 5000, 0.05),
    "few images": counts((4, 4, 4), 60, 0.3),
    "other sizes": counts((2, 3, 5), 300, 0.5),
}


@pytest.mark.parametrize("joint", TABLES.values(), ids=TABLES)
def test_equals_a_conic_programme(joint):
    pytest.importorskip("cvxpy")
    value, gap = union_information(joint.sum(3), joint.sum(2))
    programme = reference_collapse.ConicProgramme(*joint.shape[1:])
    expected = [programme.solve(table.sum(2).numpy(), table.sum(1).numpy()) for table in joint]
    assert float(gap.max()) < 1e-6
    np.testing.assert_allclose(value, expected, atol=1e-6)


@pytest.mark.parametrize("joint", TABLES.values(), ids=TABLES)
def test_equals_mirror_descent(joint):
    value, _ = union_information(joint.sum(3), joint.sum(2))
    for table, found in zip(joint[:2], value, strict=False):
        expected = reference_collapse.union_information_by_descent(table.sum(2).numpy(), table.sum(1).numpy())
        assert expected - 1e-3 < float(found) < expected + 1e-6  # descent comes from above, slowly


@pytest.mark.parametrize("joint", TABLES.values(), ids=TABLES)
def test_lies_between_the_better_one_and_what_there_is(joint):
    value, gap = union_information(joint.sum(3), joint.sum(2))
    for table, found in zip(joint.numpy(), value.tolist(), strict=True):
        single = max(reference_collapse.mutual_information(table.sum(axis)) for axis in (1, 2))
        both = reference_collapse.mutual_information(table.reshape(len(table), -1))
        assert single - 1e-6 < found < both + 1e-6
    assert float(gap.min()) >= 0.0
    assert float(gap.max()) < 1e-6


def test_copies_exclusive_or_and_independence():
    copy, xor, both = torch.zeros(3, 2, 2, 2, dtype=torch.float64)
    for y, x in itertools.product(range(2), range(2)):
        xor[y ^ x, y, x] = 0.25
    copy[0, 0, 0] = copy[1, 1, 1] = 0.5
    both += 0.125
    joint = torch.stack([copy, xor, both])
    value, _ = union_information(joint.sum(3), joint.sum(2))
    # of an exclusive or, each alone says nothing, so that together they need not either
    np.testing.assert_allclose(value, [np.log(2), 0.0, 0.0], atol=1e-6)
    pair = torch.zeros(4, 2, 2, dtype=torch.float64)  # the target is the pair itself: nothing is left to choose
    for y, x in itertools.product(range(2), range(2)):
        pair[2 * y + x, y, x] = 0.25
    value, _ = union_information(pair.sum(2)[None], pair.sum(1)[None])
    assert float(value) == pytest.approx(np.log(4), abs=1e-6)


def test_batches_order_and_labels_of_values_do_not_matter(monkeypatch):
    joint = torch.cat([TABLES["full"], TABLES["sparse"]])
    value, _ = union_information(joint.sum(3), joint.sum(2))
    monkeypatch.setattr("tp_twoaxis.diagnostics.union_information.BATCH", 7)
    parts, _ = union_information(joint.sum(3), joint.sum(2))
    torch.testing.assert_close(parts, value, atol=1e-6, rtol=0)
    swapped, _ = union_information(joint.sum(2), joint.sum(3))
    renamed = joint.flip(1)[:, :, [2, 0, 3, 1]]
    other, _ = union_information(renamed.sum(3), renamed.sum(2))
    torch.testing.assert_close(swapped, value, atol=1e-6, rtol=0)
    torch.testing.assert_close(other, value, atol=1e-6, rtol=0)


def test_values_that_do_not_occur_change_nothing():
    joint = TABLES["other sizes"]
    wider = torch.zeros(len(joint), 4, 4, 6, dtype=torch.float64)
    wider[:, :2, :3, :5] = joint
    value, _ = union_information(joint.sum(3), joint.sum(2))
    padded, _ = union_information(wider.sum(3), wider.sum(2))
    torch.testing.assert_close(padded, value, atol=1e-6, rtol=0)


def test_bad_tables_are_refused():
    table = TABLES["full"].sum(3)
    with pytest.raises(TwoAxisError, match="same B and T"):
        union_information(table, table[:3])
    with pytest.raises(TwoAxisError, match="same B and T"):
        union_information(table[0], table[0])
    with pytest.raises(TwoAxisError, match="sum to 1"):
        union_information(table, 5000 * table)
    with pytest.raises(TwoAxisError, match="sum to 1"):
        union_information(table, table.flip(1))
    with pytest.raises(TwoAxisError, match="sum to 1"):
        union_information(table * torch.nan, table)
