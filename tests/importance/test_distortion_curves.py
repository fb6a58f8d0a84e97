"""Curves: their slopes, their rows, their files."""

import json

import numpy as np
import pytest
import torch

from tp_twoaxis.errors import FileFormatError, TwoAxisError
from tp_twoaxis.importance.distortion_curves import DistortionCurve, DistortionCurves, interpolated, slopes_of


def curve(name="conv1", size=8, scale=1.0):
    values = (0.0, 0.01 * scale, 0.09 * scale, 0.5 * scale)
    return DistortionCurve(name, size, (0, 2, 4, 7), values, (0.0, 0.001, 0.01, 0.1), (0.0, 0.1, 0.2, 0.35), 32)


def test_slopes_never_fall_and_add_up_where_the_curve_is_convex():
    slopes = slopes_of((0, 2, 4, 8), (0.0, 3.0, 2.0, 10.0), 8)  # the second value falls back: noise
    assert bool((slopes.diff() > 0).all())
    line = slopes_of((0, 4), (0.0, 2.0), 4)
    torch.testing.assert_close(line, torch.full((4,), 0.5, dtype=torch.float64), rtol=2e-3, atol=0)
    assert slopes_of((0,), (0.0,), 1).tolist() == [0.0]
    assert slopes_of((0, 2), (0.0, 0.0), 3).tolist() == [0.0, 0.0, 0.0]
    power = slopes_of((0, 8, 16, 24, 31), tuple(float(k) ** 3 for k in (0, 8, 16, 24, 31)), 32)
    middles = torch.arange(32, dtype=torch.float64) + 0.5
    torch.testing.assert_close(power[2:30], (3 * middles**2)[2:30], rtol=0.02, atol=3.0)


@pytest.mark.parametrize("seed", range(5))
def test_interpolation_passes_through_the_points_and_never_falls(seed):
    g = np.random.default_rng(seed)
    removed = (0, *sorted(g.choice(np.arange(1, 60), 5, replace=False).tolist()))
    values = (0.0, *np.sort(10.0 ** g.uniform(-6, 1, 5)).tolist())
    found = interpolated(removed, values)
    assert len(found) == removed[-1] + 1
    np.testing.assert_allclose(found[list(removed)], values, rtol=1e-9)
    assert np.all(np.diff(found) >= 0.0)
    assert np.all(found[1 : removed[1]] <= values[1] * np.arange(1, removed[1]) / removed[1] * (1 + 1e-9))


def test_free_channels_have_finite_slopes():
    slopes = slopes_of((0, 2, 4, 7), (0.0, 0.0, 1e-20, 1.0), 8)
    assert bool(torch.isfinite(slopes).all())
    assert float(slopes[0]) < 1e-3 * float(slopes[-1])


def test_rows_hold_every_point_and_names_stay_apart():
    curves = DistortionCurves([curve(), curve("conv2"), curve(scale=2.0)])
    assert list(curves) == ["conv1", "conv2", "conv1#2"]
    assert curves["conv1#2"].distortion[-1] == 1.0
    rows = curves.to_rows()
    assert len(rows) == 12
    assert rows[5] == {
        "group": "conv2",
        "size": 8,
        "removed": 2,
        "share_removed": 0.25,
        "distortion": 0.01,
        "standard_error": 0.001,
        "macs_saved": 0.1,
        "images": 32,
    }
    with pytest.raises(TwoAxisError, match=r"a group with a curve \(conv1, conv2, conv1#2\), got 'fc'"):
        curves["fc"]


def test_files_return_what_was_saved(tmp_path):
    curves = DistortionCurves([curve(), curve("conv2", scale=1 / 3)])
    curves.save(tmp_path / "curves.json")
    assert DistortionCurves.load(tmp_path / "curves.json") == curves


@pytest.mark.parametrize(
    "content",
    [
        b"nonsense",
        b"\xff\xfe",
        b"[]",
        b'{"format": "other", "version": 1, "curves": []}',
        json.dumps({"format": "tp-twoaxis distortion curves", "version": 2, "curves": []}).encode(),
        DistortionCurves([curve()]).to_json().replace("0.09", "NaN").encode(),
        DistortionCurves([curve()]).to_json().replace("0.09, ", "").encode(),
        DistortionCurves([curve()]).to_json().replace("removed", "gone").encode(),
    ],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "curves.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"curves\.json: expected"):
        DistortionCurves.load(tmp_path / "curves.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TwoAxisError, match=r"none\.json: could not be read"):
        DistortionCurves.load(tmp_path / "none.json")
