"""Growing regressions of the damage, by the normal equations."""

from __future__ import annotations

import numpy as np
import pytest
from lesion_cases import lesion_table

from tp_twoaxis.diagnostics.damage_regression import PREDICTORS, damage_regression, regression_summary, standardised


def z(values):
    return (values - values.mean()) / values.std()


def design(table):
    cells = []
    for _, part in table[~table.constant].groupby("layer", sort=False):
        columns = [np.log(part.norm), part.capture, part.overlap, part.compact_support, part.task_mi]
        cells.append((np.column_stack([z(c.to_numpy()) for c in columns]), z(part.damage.to_numpy())))
    return cells


def test_each_cell_is_predicted_from_the_others():
    table = lesion_table()
    found, cells = damage_regression(table), design(table)
    sets = found.predictors.unique().tolist()
    assert sets[0] == "ln norm"
    assert sets[-1] == "ln norm + I + R + K + M"
    for count, name in enumerate(sets, start=1):
        part = found[found.predictors == name]
        for left_out, (x, y) in enumerate(cells):
            others = [cell for place, cell in enumerate(cells) if place != left_out]
            a = np.concatenate([cell[0][:, :count] for cell in others])
            b = np.concatenate([cell[1] for cell in others])
            residual = y - x[:, :count] @ np.linalg.solve(a.T @ a, a.T @ b)
            expected = 1 - (residual**2).sum() / (y**2).sum()
            assert part.held_out.iloc[left_out] == pytest.approx(expected, abs=1e-10)
        a, b = np.concatenate([c[0][:, :count] for c in cells]), np.concatenate([c[1] for c in cells])
        residual = b - a @ np.linalg.solve(a.T @ a, a.T @ b)
        assert part.fitted.nunique() == 1
        assert part.fitted.iloc[0] == pytest.approx(1 - residual.var() / b.var(), abs=1e-10)
    summary = regression_summary(found)
    assert summary.fitted.is_monotonic_increasing
    assert summary.held_out.tolist() == pytest.approx(
        [found[found.predictors == name].held_out.mean() for name in sets]
    )


def test_a_planted_law_is_found_in_cells_that_were_left_out():
    table = lesion_table(constant=False)
    parts = standardised(table)
    table["damage"] = (0.7 * parts.log_norm + 0.5 * parts.capture - 0.4 * parts.compact_support).to_numpy()
    summary = regression_summary(damage_regression(table)).set_index("predictors")
    assert summary.held_out["ln norm + I + R + K"] > 0.95
    assert summary.held_out["ln norm"] < 0.8


def test_cells_without_spread_or_channels():
    table = lesion_table(constant=False)
    table.loc[table.layer == "conv2", "norm"] = 1.0
    flat = standardised(table)
    assert (flat.log_norm[flat.layer == "conv2"] == 0.0).all()
    assert damage_regression(table).held_out.notna().all()
    alone = damage_regression(table[table.layer == "conv1"])
    assert alone.held_out.isna().all()
    assert alone.fitted.notna().all()
    assert len(damage_regression(lesion_table(channels=2, constant=False))) == 0
    assert len(regression_summary(damage_regression(lesion_table(channels=2, constant=False)))) == 0
    assert len(PREDICTORS) == 5
