"""Curves of a network's distortion against the channels that a group loses: values, slopes, and files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tp_twoaxis.errors import FileFormatError, TwoAxisError, listing
from tp_twoaxis.runtime.serialization import write_bytes

KIND, VERSION = "tp-twoaxis distortion curves", 1
# rise of the scores over a group, beside their mean, where all slopes agree: the order stays that of the ranking
TIE = 1e-3
# distortions below this share of a curve's largest are taken for it: their logarithms say nothing
NEGLIGIBLE = 1e-9

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DistortionCurve:
    """How far the logits move when a group's weakest channels are missing and its consumers are refitted.

    Attributes:
        name: the group's root layer.
        size: its channels.
        removed: [k] how many are missing at each point, ascending from 0.
        distortion: [k] mean squared distance of the logits from the dense network's, over their variance; >= 0.
        standard_error: [k] of that mean over the images.
        macs_saved: [k] share of the dense network's MACs that goes with the missing channels, in [0, 1].
        images: that it was measured on.
    """

    name: str
    size: int
    removed: tuple[int, ...]
    distortion: tuple[float, ...]
    standard_error: tuple[float, ...]
    macs_saved: tuple[float, ...]
    images: int

    def slopes(self) -> Tensor:
        """Slope of the curve at each channel, [size] float64; see :func:`slopes_of`."""
        return slopes_of(self.removed, self.distortion, self.size)


class DistortionCurves(Mapping[str, DistortionCurve]):
    """The measured curves of a network's groups, by the names of their root layers.

    They say how sensitive each group is to pruning. Where groups share a root layer, those after the first are called
    ``NAME#2``, ``NAME#3`` and so on.

    Args:
        curves: in the order of their measurement.

    Example:
        >>> curve = DistortionCurve("conv1", 8, (0, 4, 7), (0.0, 0.1, 0.6), (0.0, 0.01, 0.1), (0.0, 0.2, 0.35), 32)
        >>> curves = DistortionCurves([curve])
        >>> curves
        DistortionCurves(1 groups)
        >>> curves.to_rows()[1]["group"], curves.to_rows()[1]["share_removed"], curves.to_rows()[1]["distortion"]
        ('conv1', 0.5, 0.1)
        >>> DistortionCurves.from_json(curves.to_json()) == curves
        True
    """

    def __init__(self, curves: list[DistortionCurve]) -> None:
        self._curves: dict[str, DistortionCurve] = {}
        seen: dict[str, int] = {}
        for curve in curves:
            seen[curve.name] = seen.get(curve.name, 0) + 1
            number = seen[curve.name]
            self._curves[curve.name if number == 1 else f"{curve.name}#{number}"] = curve

    def __getitem__(self, name: str) -> DistortionCurve:
        if name not in self._curves:
            raise TwoAxisError(f"expected a group with a curve ({listing(self._curves)}), got {name!r}")
        return self._curves[name]

    def __contains__(self, name: object) -> bool:
        return name in self._curves

    def __iter__(self) -> Iterator[str]:
        return iter(self._curves)

    def __len__(self) -> int:
        return len(self._curves)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} groups)"

    def in_order_of(self, names: Iterable[str]) -> DistortionCurves:
        """Sort the curves by their root layers, as these stand in a model's ``named_modules()``.

        Args:
            names: of all layers.
        """
        place = {name: position for position, name in enumerate(names)}
        return DistortionCurves(sorted(self.values(), key=lambda curve: place[curve.name]))

    def to_rows(self) -> list[dict[str, Any]]:
        """List all points: group, size, removed, share_removed, distortion, standard_error, macs_saved, images."""
        return [
            {
                "group": name,
                "size": curve.size,
                "removed": removed,
                "share_removed": removed / curve.size,
                "distortion": distortion,
                "standard_error": error,
                "macs_saved": saved,
                "images": curve.images,
            }
            for name, curve in self.items()
            for removed, distortion, error, saved in zip(
                curve.removed, curve.distortion, curve.standard_error, curve.macs_saved, strict=True
            )
        ]

    def to_json(self) -> str:
        """Write the curves as JSON; see :meth:`from_json`."""
        return json.dumps({"format": KIND, "version": VERSION, "curves": [asdict(curve) for curve in self.values()]})

    @classmethod
    def from_json(cls, text: str) -> DistortionCurves:
        """Read what :meth:`to_json` wrote.

        Raises:
            FileFormatError: it did not, or in another version.
        """
        try:
            payload = json.loads(text)
            if payload["format"] != KIND or payload["version"] != VERSION:
                raise KeyError
            return cls([_read_curve(**entry) for entry in payload["curves"]])
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"expected {KIND}, version {VERSION}, as JSON, got {text[:40]!r}; write it with DistortionCurves.save"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the curves to a JSON file, whole or not at all.

        Raises:
            TwoAxisError: it cannot be written.
        """
        write_bytes(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> DistortionCurves:
        """Read a file of :meth:`save`.

        Raises:
            FileFormatError: it is none.
            TwoAxisError: it cannot be read.
        """
        try:
            text = Path(path).read_text()
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{path}: expected JSON, got other bytes") from error
        except OSError as error:
            raise TwoAxisError(f"{path}: could not be read ({error})") from error
        try:
            return cls.from_json(text)
        except FileFormatError as error:
            raise FileFormatError(f"{path}: {error}") from error


def _read_curve(**entry: Any) -> DistortionCurve:
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()}
    curve = DistortionCurve(**values)
    points = {len(values) for values in (curve.removed, curve.distortion, curve.standard_error, curve.macs_saved)}
    if len(points) != 1 or not all(map(math.isfinite, curve.distortion)):
        raise ValueError
    return curve


def slopes_of(removed: tuple[int, ...], values: tuple[float, ...], size: int) -> Tensor:
    """Slope of a curve at each of its steps, never falling.

    The curve is made non-decreasing and interpolated as :func:`interpolated` does it, then made convex from below; its
    slopes hold at the middle of the hull's segments and are interpolated in between.

    Args:
        removed: where the curve was measured, ascending from 0.
        values: what was measured there.
        size: steps; those beyond the last point have its slope.

    Returns:
        [size] float64, ascending, also where all slopes agree (a thousandth of their mean over the whole group).

    Example:
        >>> slopes_of((0, 2, 4), (0.0, 2.0, 8.0), 4).round(decimals=2).tolist()  # the square of the step, halved
        [0.5, 1.5, 2.5, 3.5]
    """
    y = interpolated(removed, values)
    x = np.arange(len(y), dtype=np.float64)
    hull = [0]
    for i in range(1, len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    if len(hull) < 2:
        return torch.zeros(size, dtype=torch.float64)
    x, y = x[hull], y[hull]
    slopes = np.interp(np.arange(size) + 0.5, (x[1:] + x[:-1]) / 2, np.diff(y) / np.diff(x))
    return torch.from_numpy(slopes + TIE * slopes.mean() * np.arange(size) / size)


def interpolated(removed: tuple[int, ...], values: tuple[float, ...]) -> Floats:
    """Interpolate a curve at every step up to its last point, [last + 1]; never falling, 0 at 0.

    Curves of distortion resemble powers of the number of missing channels over orders of magnitude, so logarithms are
    interpolated, by monotone cubics (Fritsch and Carlson 1980); before the first point the curve is a power with the
    slope that it has there, but at least straight. (Ours: widths of a CIFAR-10 ResNet-20 from four such points differ
    by 0.3 to 3 % of the channels from those of eight points and straight lines between them, by 3 to 4 % where the
    four are joined by straight lines.)

    Args:
        removed: where it was measured, ascending from 0.
        values: what was measured there.

    Example:
        >>> interpolated((0, 2, 4), (0.0, 4.0, 16.0)).round(6).tolist()  # a power stays one
        [0.0, 1.0, 4.0, 9.0, 16.0]
    """
    x, y = np.asarray(removed, dtype=np.float64), np.maximum.accumulate(np.asarray(values, dtype=np.float64))
    if y[-1] <= 0.0:
        return np.zeros(int(x[-1]) + 1)
    steps = np.arange(1, int(x[-1]) + 1, dtype=np.float64)
    logs, heights = np.log(x[1:]), np.log(np.maximum(y[1:], NEGLIGIBLE * y[-1]))
    first = steps < x[1]
    found = np.empty_like(steps)
    exponent = 1.0
    if len(logs) > 1:
        from scipy.interpolate import PchipInterpolator

        curve = PchipInterpolator(logs, heights)
        exponent = max(exponent, float(curve(logs[0], 1)))
        found[~first] = np.exp(curve(np.log(steps[~first])))
    else:
        found[~first] = np.exp(heights[0])
    found[first] = np.exp(heights[0]) * (steps[first] / x[1]) ** exponent
    return np.concatenate([[0.0], np.maximum.accumulate(found)])
