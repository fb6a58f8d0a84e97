"""What three channels say about the task beyond the best pair among them, against what pairs say beyond one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from tp_twoaxis.diagnostics.axis_coordinates import relative_depths
from tp_twoaxis.scores.information import information_from_r2, pair_r2
from tp_twoaxis.scores.target import pair_excess, task_information
from tp_twoaxis.statistics.layer_statistics import LayerStatistics
from tp_twoaxis.statistics.store import CalibrationStatistics

MOST_RELEVANT = 24
TRIPLES = 1500
# directions of three channels' correlation with less variance than this are collinear, as those of pairs are
COLLINEAR = 1e-9
COLUMNS = ("layer", "depth", "channels", "triples", "pair_excess", "triplet_excess", "ratio", "chance")


def triplet_excess(task_correlation: Tensor, correlation: Tensor, triples: Tensor) -> Tensor:
    """Information of triplets about the task beyond their best pair, ``max(0, M_ijk - max(M_ij, M_ik, M_jk))``.

    ``M_ijk = -1/2 ln(1 - R^2)`` of the regression of the task on all three (paper, appendix A).

    Args:
        task_correlation: [C], or [C, K]: then the mean over the columns.
        correlation: [C, C] of the pooled channels.
        triples: [N, 3] int64, different channels.

    Returns:
        [N] nats, not negative.

    Example:
        >>> triplet_excess(torch.tensor([0.5, 0.5, 0.5]), torch.eye(3), torch.tensor([[0, 1, 2]])).tolist()
        [0.3465...]
    """
    blocks = correlation[triples[:, :, None], triples[:, None]].double()
    variance, direction = torch.linalg.eigh(blocks)
    weight = torch.where(variance > COLLINEAR, 1.0 / variance.clamp_min(COLLINEAR), 0.0)
    columns = task_correlation.double().reshape(len(task_correlation), -1)
    total = torch.zeros(len(triples), dtype=torch.float64)
    for column in columns.unbind(1):
        r = column[triples]
        pairs = [pair_r2(r[:, i], r[:, j], blocks[:, i, j]) for i, j in itertools.combinations(range(3), 2)]
        best = torch.stack(pairs).amax(0)
        three = ((direction * r[:, :, None]).sum(1).square() * weight).sum(1).clamp_max(1.0)
        total += information_from_r2(torch.maximum(three, best)) - information_from_r2(best)
    return total / columns.shape[1]


def triplet_table(
    statistics: CalibrationStatistics,
    layers: Sequence[str],
    *,
    most_relevant: int = MOST_RELEVANT,
    triples: int = TRIPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the excess of triplets with that of pairs, layer by layer.

    Args:
        statistics: of the calibration, with a target.
        layers: which; those with fewer than three varying channels are left out.
        most_relevant: channels of the largest task information that are looked at.
        triples: most of their triplets that are, drawn at random.
        seed: of the draw.

    Returns:
        A row a layer: ``layer``, ``depth``, ``channels`` and ``triples`` looked at, mean ``pair_excess`` over all pairs
        of these channels (that it is over these is ours), mean ``triplet_excess`` in nats, and ``ratio``, the second
        over the first, NaN where pairs have none; and ``chance = 1 / 2 n``, what one more channel that knows nothing
        adds on n images: a ratio of excesses near it is one of noise.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = [(torch.randn(64, 3, 6, 6), torch.randint(6, (64,)))]
        >>> table = triplet_table(calibrate(net, images, progress=False), ["0"])
        >>> table[["layer", "channels", "triples"]].values.tolist()
        [['0', 6, 20]]
    """
    depths, rows = relative_depths(layers), []
    for name in layers:
        found = layer_triplets(statistics[name], most_relevant=most_relevant, triples=triples, seed=seed)
        if found is not None:
            rows.append({"layer": name, "depth": depths[name], **found})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def layer_triplets(
    layer: LayerStatistics, *, most_relevant: int = MOST_RELEVANT, triples: int = TRIPLES, seed: int = 0
) -> dict[str, float] | None:
    """Compare both excesses in one layer; see :func:`triplet_table`.

    Returns:
        All columns but ``layer`` and ``depth``; None where fewer than three channels vary.
    """
    varying = (layer.variance > 0).nonzero().ravel()
    task = layer.target_correlation()[varying]
    top = task_information(task).argsort(descending=True, stable=True)[:most_relevant]
    if len(top) < 3:
        return None
    task, correlation = task[top], layer.pooled_correlation[varying[top]][:, varying[top]]
    drawn = _draw_triples(len(top), triples, seed)
    upper = torch.triu_indices(len(top), len(top), offset=1)
    pairs = float(pair_excess(task, correlation)[upper[0], upper[1]].mean())
    excess = float(triplet_excess(task, correlation, drawn).mean())
    return {
        "channels": len(top),
        "triples": len(drawn),
        "pair_excess": pairs,
        "triplet_excess": excess,
        "ratio": excess / pairs if pairs > 0 else math.nan,
        "chance": 0.5 / layer.num_images,
    }


def _draw_triples(channels: int, most: int, seed: int) -> Tensor:
    """Different triplets of channels, [N, 3]: all where there are not more, in order."""
    every = torch.combinations(torch.arange(channels), 3)
    generator = torch.Generator().manual_seed(seed)
    return every[torch.randperm(len(every), generator=generator)[:most].sort().values]
