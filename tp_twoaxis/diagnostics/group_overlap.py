"""Whether the local groups of a layer are groups of channels that overlap, or add to each other's task information.

Paper: appendix K, figure 10. Pairs within a group are compared with pairs between groups, by overlap ``R_kj`` and by
pair excess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from tp_twoaxis.diagnostics.axis_coordinates import relative_depths
from tp_twoaxis.diagnostics.channel_groups import GROUPS, NO_GROUP, local_groups
from tp_twoaxis.diagnostics.communities import excess_graph, overlap_graph
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.store import CalibrationStatistics

PERMUTATIONS = 200
COLUMNS = {
    "layer": "name in the model",
    "depth": "0 first, 1 last convolution",
    "channels": "that vary",
    "groups": "local groups, of k-means on (z I, z R)",
    "overlap_within": "mean overlap of pairs in one group, nats",
    "overlap_between": "mean overlap of pairs of two groups, nats",
    "overlap_ratio": "within over between",
    "overlap_effect": "Cohen's d, within - between over the pooled deviation",
    "overlap_p": "of the difference, against permuted groups",
    "excess_within": "mean pair excess in one group, nats",
    "excess_between": "mean pair excess of two groups, nats",
    "excess_ratio": "within over between",
    "excess_effect": "Cohen's d",
    "excess_p": "of the difference, against permuted groups",
}


@dataclass(frozen=True)
class GroupContrast:
    """Pairs of channels in one group against pairs of two groups.

    Attributes:
        within: mean over pairs in one group.
        between: mean over pairs of two groups.
        effect: Cohen's d: their difference over the pooled standard deviation of pairs.
        p: share of permuted groupings, this one counted, whose means differ as much, ``(1 + hits) / (1 + n)``.

    All are NaN where every channel has the same group, or each one of its own.
    """

    within: float
    between: float
    effect: float
    p: float

    @property
    def ratio(self) -> float:
        """``within / between``; NaN where nothing is between."""
        return self.within / self.between if self.between > 0 else math.nan


def group_contrast(pairs: Tensor, groups: Tensor, *, permutations: int = PERMUTATIONS, seed: int = 0) -> GroupContrast:
    """Compare a quantity of pairs within and between groups.

    Args:
        pairs: [n, n] symmetric; the diagonal does not count.
        groups: [n] int64.
        permutations: of the groups among the channels.
        seed: of the permutations.

    Returns:
        :class:`GroupContrast`.

    Raises:
        TwoAxisError: the shapes do not fit.

    Example:
        >>> blocks = torch.block_diag(torch.full((3, 3), 3.0), torch.full((3, 3), 3.0)) + 1.0
        >>> contrast = group_contrast(blocks, torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> contrast.within, contrast.between, contrast.ratio
        (4.0, 1.0, 4.0)
    """
    count = len(groups)
    if pairs.shape != (count, count):
        raise TwoAxisError(f"pairs: expected [{count}, {count}] for {count} channels, got {list(pairs.shape)}")
    values = pairs.double() - torch.diag(pairs.diagonal().double())
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(count), *(torch.randperm(count, generator=generator) for _ in range(permutations))]
    within, between, number = _mean_pairs(values, groups[torch.stack(orders)])
    if not 0 < number < count * (count - 1) // 2:
        return GroupContrast(math.nan, math.nan, math.nan, math.nan)
    gaps = within - between
    # groupings that are alike differ by rounding alone
    hits = int((gaps[1:].abs() >= gaps[0].abs() * (1.0 - 1e-9)).sum())
    effect = _effect(values, groups, float(gaps[0]))
    return GroupContrast(float(within[0]), float(between[0]), effect, (1 + hits) / (1 + permutations))


def overlap_table(
    stats: CalibrationStatistics,
    layers: list[str],
    *,
    groups: int = GROUPS,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare pairs within and between each layer's local groups.

    Args:
        stats: of a calibration with a target.
        layers: in the model's order.
        groups: k of k-means.
        permutations: of the groups.
        seed: of k-means and permutations.

    Returns:
        A row a layer with the columns :data:`COLUMNS`; layers with fewer than 6 varying channels have no groups and
        NaN.

    Raises:
        TwoAxisError: no such layer, or no target.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 6))
        >>> stats = calibrate(net, [(torch.randn(64, 8), torch.randint(6, (64,)))], progress=False)
        >>> overlap_table(stats, ["1"])[["layer", "channels", "groups"]].values.tolist()
        [['1', 6, 3]]
    """
    depths = relative_depths(layers)
    rows = []
    for name in layers:
        layer = stats[name]
        labels = local_groups(layer, groups, seed=seed)
        varying = (layer.variance > 0).nonzero().ravel()
        own = labels[varying]
        found = len(torch.unique(own[own != NO_GROUP]))
        row = {"layer": name, "depth": depths[name], "channels": len(varying), "groups": found}
        for kind, graph in (("overlap", overlap_graph), ("excess", excess_graph)):
            contrast = group_contrast(graph(layer, varying), own, permutations=permutations, seed=seed)
            row |= {
                f"{kind}_within": contrast.within,
                f"{kind}_between": contrast.between,
                f"{kind}_ratio": contrast.ratio,
                f"{kind}_effect": contrast.effect,
                f"{kind}_p": contrast.p,
            }
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _mean_pairs(values: Tensor, groupings: Tensor) -> tuple[Tensor, Tensor, int]:
    """Average pairs within and between groups.

    Args:
        values: [n, n], diagonal 0.
        groupings: [P, n] int64, permutations of each other.

    Returns:
        Means [P] within and between, and how many pairs are within.
    """
    count = len(values)
    within = values.new_zeros(len(groupings))
    number = 0
    for group in torch.unique(groupings[0]):
        members = (groupings == group).to(values)
        within += ((members @ values) * members).sum(1) / 2.0
        size = int(members[0].sum())
        number += size * (size - 1) // 2
    total, pairs = values.sum() / 2.0, count * (count - 1) // 2
    return within / max(number, 1), (total - within) / max(pairs - number, 1), number


def _effect(values: Tensor, groups: Tensor, gap: float) -> float:
    """Cohen's d of the pairs' quantity; NaN where all pairs of both kinds are equal or there is one of either."""
    first, second = torch.triu_indices(len(values), len(values), offset=1)
    same = groups[first] == groups[second]
    squares = 0.0
    for kind in (values[first, second][same], values[first, second][~same]):
        squares += float((kind - kind.mean()).square().sum())
    degrees = len(first) - 2
    return gap / math.sqrt(squares / degrees) if degrees > 0 and squares > 0 else math.nan
