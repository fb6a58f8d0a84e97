"""Measure the curves of all groups of a network together, on as few images and points as settle their order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tp_twoaxis.importance.distortion import Distortion
from tp_twoaxis.importance.distortion_curves import DistortionCurve, Floats, slopes_of
from tp_twoaxis.importance.layer_refits import LayerChange

# images of the first round; each later round doubles them. Fewer, where these cost too much, but no fewer than
FIRST_IMAGES, FEWEST_IMAGES = 32, 16
# shares of the groups' cost at whose thresholds the widths must be settled
BUDGETS = (0.25, 0.5, 0.65)
# standard error of a group's width, as a share of it and in the mean over groups, that counts as settled
SETTLED = 0.01
# a threshold that lies where the distortion rises by more than this factor between two points gets a point between them
STEEP = 10.0
# such points in a group at most
MORE_POINTS = 2


@dataclass(frozen=True)
class RemovalOrder:
    """A group's channels in the order in which they would leave, and what that takes from the layers that read them.

    Attributes:
        name: the group's root layer.
        order: [size] int64, root channels, the first to leave first.
        inputs: layer -> which of its inputs are which root channels: their numbers [n] and roots [n], and its width.
        layers: of each layer that writes or reads the channels, its share of the network's MACs and, for each of its
            sides that loses channels, the part of that side which they are.
        cost: what a channel's distortion is compared by.
    """

    name: str
    order: Tensor
    inputs: Mapping[str, list[tuple[Tensor, Tensor, int]]]
    layers: tuple[tuple[float, tuple[float, ...]], ...]
    cost: float

    @property
    def size(self) -> int:
        """Root channels."""
        return len(self.order)

    @property
    def macs(self) -> float:
        """Share of the network's MACs that the first channel frees."""
        return sum(share * sum(parts) for share, parts in self.layers) / self.size

    def macs_saved(self, count: int) -> float:
        """Share of the network's MACs that so many channels free, in [0, 1].

        Less than their number times the first's where a layer both writes and reads them.
        """
        gone = count / self.size
        return sum(share * (1.0 - math.prod(1.0 - part * gone for part in parts)) for share, parts in self.layers)

    def missing(self, count: int) -> dict[str, Tensor]:
        """Inputs [C_in] bool that each layer lacks when so many channels are gone."""
        gone = torch.zeros(self.size, dtype=torch.bool)
        gone[self.order[:count]] = True
        found = {}
        for name, parts in self.inputs.items():
            found[name] = torch.zeros(parts[0][2], dtype=torch.bool)
            for channels, roots, _ in parts:
                found[name][channels[gone[roots]]] = True
        return {name: inputs for name, inputs in found.items() if bool(inputs.any())}


def measure_curves(
    orders: list[RemovalOrder], distortion: Distortion, *, levels: int, passes: float
) -> list[DistortionCurve]:
    """Measure a curve for each group.

    Points are the first ``1 / levels``, ``2 / levels``, ... of a group's channels and all but one. Images come in
    rounds, the same for all groups: 32, then twice as many, until the widths that the curves give at three budgets
    differ so little between the odd and the even images that the widths from all of them have a standard error of 1 %
    in the mean over groups; or all images are used; or more would exceed ``passes``, though 16 are always taken. One
    group alone has no width to settle and takes as many as it may. After the first round a group gets up to two more
    points where a threshold falls on a cliff.

    Args:
        orders: of the groups.
        distortion: of their network.
        levels: at least 1.
        passes: bound on the cost, in passes of a single image through the whole network.

    Returns:
        A curve for each of the orders, all of its values finite.
    """
    return _Measurement(orders, distortion, levels, passes).run()


class _Measurement:
    """What was measured so far."""

    def __init__(self, orders: list[RemovalOrder], distortion: Distortion, levels: int, passes: float) -> None:
        self.orders, self.distortion = orders, distortion
        self.left = passes
        self.images = 0
        self.changes: dict[tuple[int, int], dict[str, LayerChange]] = {}
        self.found: dict[tuple[int, int], Tensor] = {}
        for number, order in enumerate(orders):
            self.add(number, sorted({*(round(k * order.size / levels) for k in range(1, levels)), order.size - 1}))

    def add(self, number: int, counts: list[int]) -> None:
        """Add points to a group's curve, the largest first: it is the one by which a replay is checked."""
        order = self.orders[number]
        for count in reversed([count for count in counts if 0 < count < order.size]):
            missing = order.missing(count)
            if missing:
                self.changes[number, count] = {
                    name: self.distortion.refits.change(name, inputs) for name, inputs in missing.items()
                }

    def cost(self, keys: list[tuple[int, int]]) -> float:
        """Passes that an image costs: the dense network once for its logits and once for the record, and each trial."""
        return 2.0 + sum(self.distortion.repeated_share(self.changes[key]) for key in keys)

    def affordable(self) -> int:
        """Count the further images on which all points may be measured."""
        return int(max(self.left, 0.0) / self.cost(list(self.changes)))

    def measure(self, keys: list[tuple[int, int]], images: range) -> None:
        self.left -= self.cost(keys) * len(images)
        for key, values in self.distortion.measure({key: self.changes[key] for key in keys}, images).items():
            self.found[key] = torch.cat([self.found[key], values]) if key in self.found else values

    def run(self) -> list[DistortionCurve]:
        available = len(self.distortion.images)
        following = min(FIRST_IMAGES, available, max(FEWEST_IMAGES, self.affordable()))
        while following > self.images:
            first = self.images == 0
            self.measure(list(self.changes), range(self.images, following))
            self.images = following
            if first:
                for _ in range(MORE_POINTS):
                    self.refine()
            if self.is_settled():
                break
            following = min(2 * self.images, available, self.images + self.affordable())
        return [self.curve(number) for number in range(len(self.orders))]

    def refine(self) -> None:
        """Add a point in the middle of each steep interval that a threshold falls into."""
        before = set(self.changes)
        slopes = [curve.slopes().numpy() for curve in map(self.curve, range(len(self.orders)))]
        widths = {number: set[int]() for number in range(len(self.orders))}
        for budget in BUDGETS:
            for number, width in enumerate(removed_at(slopes, [o.cost for o in self.orders], budget)):
                widths[number].add(int(width))
        for number, order in enumerate(self.orders):
            curve = self.curve(number)
            points = list(zip(curve.removed, curve.distortion, strict=True))[1:]
            steep = [
                (a + b) // 2
                for (a, low), (b, high) in pairwise(points)
                if high > STEEP * low and b - a > max(1, order.size // 16) and any(a <= w <= b for w in widths[number])
            ]
            self.add(number, steep[:1])
        if added := [key for key in self.changes if key not in before]:
            self.measure(added, range(self.images))

    def is_settled(self) -> bool:
        """Whether the widths' standard error is small; judged by how far two halves of the images agree."""
        if len(self.orders) < 2 or self.images < 4:
            return False
        costs, sizes = [o.cost for o in self.orders], np.asarray([o.size for o in self.orders])
        halves = [
            [slopes_of(*self.points(number, part), order.size).numpy() for number, order in enumerate(self.orders)]
            for part in (slice(0, None, 2), slice(1, None, 2))
        ]
        # two halves differ by twice the standard error of the whole
        errors = [
            np.abs(removed_at(halves[0], costs, budget) - removed_at(halves[1], costs, budget)) / sizes / 2
            for budget in BUDGETS
        ]
        return float(np.mean(errors)) <= SETTLED

    def points(self, number: int, part: slice) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Give a group's numbers of missing channels and the distortion at each, over some of the images."""
        counts = sorted(count for group, count in self.found if group == number)
        power = self.distortion.power(self.images)
        return (0, *counts), (0.0, *(float(self.found[number, count][part].mean()) / power for count in counts))

    def curve(self, number: int) -> DistortionCurve:
        order = self.orders[number]
        removed, distortion = self.points(number, slice(None))
        scale = self.distortion.power(self.images) * math.sqrt(max(self.images - 1, 1))
        errors = [float(self.found[number, count].std(correction=0)) / scale for count in removed[1:]]
        saved = tuple(map(order.macs_saved, removed))
        return DistortionCurve(order.name, order.size, removed, distortion, (0.0, *errors), saved, self.images)


def removed_at(slopes: list[Floats], costs: list[float], budget: float) -> Floats:
    """Number of channels that each group loses at the threshold where a share of the summed costs is gone.

    Args:
        slopes: group -> [size], ascending.
        costs: what a channel of each group costs, > 0; slopes are compared over them.
        budget: share in (0, 1).

    Returns:
        [groups].

    Example:
        >>> removed_at([np.array([1.0, 2.0, 9.0]), np.array([3.0, 4.0])], [1.0, 1.0], 0.6).tolist()
        [2.0, 1.0]
    """
    scores = np.concatenate([own / cost for own, cost in zip(slopes, costs, strict=True)])
    weights = np.concatenate([np.full(len(own), cost) for own, cost in zip(slopes, costs, strict=True)])
    ascending = np.argsort(scores, kind="stable")
    passed = np.cumsum(weights[ascending])
    last = min(int(np.searchsorted(passed, budget * passed[-1] * (1 - 1e-12))), len(scores) - 1)
    gone = np.zeros(len(scores))
    gone[ascending[: last + 1]] = 1.0
    edges = np.cumsum([0, *(len(own) for own in slopes)])
    return np.asarray([gone[a:b].sum() for a, b in pairwise(edges)])
