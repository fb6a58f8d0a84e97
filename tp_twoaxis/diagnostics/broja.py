"""What a channel and the most task-informative peer say about the task together: shared, unique, and by synergy.

The decomposition of Bertschinger, Rauh, Olbrich, Jost & Ay (2014), on quantile-binned pooled outputs. It assumes no
distribution, so that it can tell which of the Gaussian target axis's properties are those of Gaussian formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from tp_twoaxis.diagnostics.axis_coordinates import cell_correlation, local_axis, relative_depths
from tp_twoaxis.diagnostics.evidence import NotApplicableError
from tp_twoaxis.diagnostics.union_information import union_information
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.scores.target import task_information
from tp_twoaxis.statistics.layer_statistics import LayerStatistics
from tp_twoaxis.statistics.pooled_samples import PooledSamples
from tp_twoaxis.statistics.store import CalibrationStatistics

BINS = 4
CHANNELS = 64
# images for each cell of a table of T, Y_k and Y_j; fewer show little but the estimator's bias (ours)
IMAGES_PER_CELL = 4


@dataclass(frozen=True)
class Decomposition:
    """Information of two variables about a target, in nats, [B] each.

    Attributes:
        first: I(T; Y), which is ``shared + unique_first``.
        second: I(T; X), which is ``shared + unique_second``.
        joint: I(T; Y X), the sum of all four parts.
        shared: what both say.
        unique_first: what only the first one says.
        unique_second: what only the second one says.
        synergy: what only both together say.
        gap: by how much ``shared`` and ``synergy`` may be too small and the unique parts too large.
    """

    first: Tensor
    second: Tensor
    joint: Tensor
    shared: Tensor
    unique_first: Tensor
    unique_second: Tensor
    synergy: Tensor
    gap: Tensor


def decompose(joint: Tensor) -> Decomposition:
    """Decompose what two variables say about a target.

    With ``m`` the least ``I_Q(T; Y X)`` of all distributions Q that agree with both pairs (T, Y) and (T, X):
    ``shared = I(T; Y) + I(T; X) - m``, ``unique_first = m - I(T; X)``, ``unique_second = m - I(T; Y)`` and ``synergy =
    I(T; Y X) - m``.

    Args:
        joint: [B, T, Y, X] ``p(t, y, x)``; each sums to 1.

    Raises:
        TwoAxisError: not such tables.

    Example:
        >>> copy, xor = torch.zeros(2, 2, 2, 2)
        >>> copy[0, 0, 0] = copy[1, 1, 1] = 0.5
        >>> xor[0, 0, 0] = xor[0, 1, 1] = xor[1, 0, 1] = xor[1, 1, 0] = 0.25
        >>> parts = decompose(torch.stack([copy, xor]))
        >>> [round(x, 4) for x in parts.shared.tolist()], [round(x, 4) for x in parts.synergy.tolist()]
        ([0.6931, 0.0], [0.0, 0.6931])
    """
    if joint.ndim != 4:
        raise TwoAxisError(f"expected tables [B, T, Y, X], got {list(joint.shape)}")
    p = joint.double()
    least, gap = union_information(p.sum(3), p.sum(2))
    first, second, both = (_information(table) for table in (p.sum(3), p.sum(2), p.flatten(2)))
    return Decomposition(
        first,
        second,
        both,
        shared=(first + second - least).clamp_min(0.0),
        unique_first=(least - second).clamp_min(0.0),
        unique_second=(least - first).clamp_min(0.0),
        synergy=(both - least).clamp_min(0.0),
        gap=gap,
    )


def _information(table: Tensor) -> Tensor:
    """Mutual information of each table [B, T, Y] in nats."""
    entropies = (-torch.xlogy(p, p).sum(1) for p in (table.sum(2), table.sum(1), table.flatten(1)))
    of_target, of_other, of_both = entropies
    return (of_target + of_other - of_both).clamp_min(0.0)


def quantile_bins(values: Tensor, bins: int = BINS) -> Tensor:
    """Put samples into equally full bins, column by column.

    Args:
        values: [n, C].
        bins: at least 2.

    Returns:
        [n, C] int64 in [0, bins); equal values share a bin, so that a constant has one.

    Example:
        >>> quantile_bins(torch.tensor([[1.0], [5.0], [2.0], [9.0]]), bins=2).ravel().tolist()
        [0, 1, 0, 1]
    """
    if bins < 2:
        raise TwoAxisError(f"bins: expected at least 2, got {bins}; 4 is usual")
    columns = values.double().T.contiguous()
    # the first value of each bin but the lowest
    starts = torch.arange(1, bins) * len(values) // bins
    edges = columns.sort(dim=1).values[:, starts]
    return torch.searchsorted(edges.contiguous(), columns, right=True).T


def broja_table(
    statistics: CalibrationStatistics,
    samples: PooledSamples,
    layers: Sequence[str],
    *,
    channels: int = CHANNELS,
    bins: int = BINS,
    seed: int = 0,
) -> pd.DataFrame:
    """Decompose what channels and the most task-informative peer of each layer say about the target.

    The peer j of a channel is the one with the largest Gaussian task information M among all of the layer that vary;
    of the best channel itself it is the second one. The same is done with the target's values dealt out to other images
    (``shuffled``, one draw): what remains then is the estimator's bias, ``(bins - 1)^2 / 2 n`` nats for a pair.

    Args:
        statistics: of the calibration, with a target.
        samples: pooled outputs of (the same) images.
        layers: which; those with fewer than two varying channels are left out.
        channels: most channels of a layer that are decomposed, drawn at random (the paper's 64; that they are drawn is
            ours); all vary.
        bins: of target and channels, equally full.
        seed: of channels and shuffle.

    Returns:
        A row for each channel, all in nats: ``layer``, ``depth``, ``channel``, ``peer``; Gaussian ``capture`` (I),
        ``overlap`` (R), ``task_mi`` (M); binned ``information`` (I(T; Y_k)), ``peer_information``, ``shared``,
        ``unique`` (of the channel), ``synergy``; ``irrecoverable``, the share ``unique / information`` that the peer
        cannot give back (the paper's IIL); ``shuffled_shared``, ``shuffled_unique``, ``shuffled_synergy``; and ``gap``,
        a bound of the numerical error.

    Raises:
        NotApplicableError: too few images for the cells of a table, a constant target or one of several columns, or no
            layer with two varying channels.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> from tp_twoaxis.statistics import pooled_samples
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = [(torch.randn(256, 3, 6, 6), torch.randint(4, (256,)))]
        >>> stats, samples = calibrate(net, images, progress=False), pooled_samples(net, images, progress=False)
        >>> table = broja_table(stats, samples, ["0"])
        >>> bool((table.shared + table.unique - table.information).abs().max() < 1e-6)
        True
    """
    able = [name for name in layers if int((statistics[name].variance > 0).sum()) >= 2]
    if not able:
        raise NotApplicableError("no layer has two channels that vary; expected a channel and a peer of it")
    target = _binned_target(samples, bins)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    depths, columns, tables, shuffled = relative_depths(layers), [], [], []
    for name in able:
        rows = _chosen_channels(statistics[name], channels, seed)
        binned, peers = (quantile_bins(samples.outputs[name][:, rows[side]], bins) for side in ("channel", "peer"))
        tables.append(_joint_tables(target, binned, peers, bins))
        shuffled.append(_joint_tables(target[order], binned, peers, bins))
        columns.append(pd.DataFrame({"layer": name, "depth": depths[name], **rows}))
    found, biased = decompose(torch.cat(tables)), decompose(torch.cat(shuffled))
    share = torch.where(found.first > 0, found.unique_first / found.first, torch.nan)
    values = {
        "information": found.first,
        "peer_information": found.second,
        "shared": found.shared,
        "unique": found.unique_first,
        "synergy": found.synergy,
        "irrecoverable": share,
        "shuffled_shared": biased.shared,
        "shuffled_unique": biased.unique_first,
        "shuffled_synergy": biased.synergy,
        "gap": torch.maximum(found.gap, biased.gap),
    }
    return pd.concat(columns, ignore_index=True).assign(**{name: value.numpy() for name, value in values.items()})


def _binned_target(samples: PooledSamples, bins: int) -> Tensor:
    """[n] bins of the target, where they can be filled."""
    values = samples.target_values()
    if values.ndim != 1:
        raise NotApplicableError(
            f"the target {samples.target} has {values.shape[1]} numbers an image; expected one, such as 'margin'"
        )
    needed = IMAGES_PER_CELL * bins**3
    if len(values) < needed:
        raise NotApplicableError(
            f"expected at least {needed} images to fill tables of {bins} x {bins} x {bins} cells, got {len(values)}"
        )
    if float(values.min()) == float(values.max()):
        raise NotApplicableError(f"the target {samples.target} is the same for all images; nothing can tell about it")
    return quantile_bins(values[:, None], bins)[:, 0]


def _chosen_channels(layer: LayerStatistics, limit: int, seed: int) -> dict[str, Tensor]:
    """Draw channels of a layer; their numbers, their peers' and their Gaussian coordinates, [K] each."""
    varying = (layer.variance > 0).nonzero().ravel()
    relevance = task_information(layer.target_correlation()[varying])
    best, second = relevance.argsort(descending=True, stable=True)[:2]
    drawn = torch.randperm(len(varying), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    here = local_axis(layer)
    return {
        "channel": varying[drawn],
        "peer": varying[torch.where(drawn == best, second, best)],
        "capture": here.capture[drawn],
        "overlap": here.overlap[drawn],
        "task_mi": relevance[drawn],
    }


def _joint_tables(target: Tensor, first: Tensor, second: Tensor, bins: int) -> Tensor:
    """Shares of images, [K, T, Y, X], of bins [n], [n, K] and [n, K]."""
    pairs, cells = first.shape[1], bins**3
    codes = (target[:, None] * bins + first) * bins + second + cells * torch.arange(pairs)
    counts = torch.bincount(codes.ravel(), minlength=pairs * cells)
    return counts.view(pairs, bins, bins, bins).double() / len(target)


def broja_layers(table: pd.DataFrame) -> pd.DataFrame:
    """Condense a table of channels to one row a layer.

    Args:
        table: of :func:`broja_table`.

    Returns:
        ``layer``, ``depth``, ``channels`` (decomposed); Spearman's ``rho_shared_task`` (with M), ``rho_shared_overlap``
        (with R) and ``rho_irrecoverable_capture`` (with I), NaN below three channels; means in nats of ``shared``,
        ``unique``, ``synergy`` and of the shuffled ones; ``shared_over_synergy``, the ratio of these means, and
        ``corrected_ratio`` (ours), of what each is above its shuffled mean, NaN where synergy is not; mean
        ``irrecoverable`` share; and the largest ``gap``.

    Example:
        >>> parts = {name: [0.2, 0.4, 0.6] for name in ("shared", "unique", "synergy", "irrecoverable", "gap")}
        >>> shuffled = {name: [0.1, 0.1, 0.1] for name in ("shuffled_shared", "shuffled_unique", "shuffled_synergy")}
        >>> axes = {"task_mi": [1.0, 2.0, 3.0], "overlap": [3.0, 2.0, 1.0], "capture": [1.0, 3.0, 2.0]}
        >>> table = pd.DataFrame({"layer": "conv1", "depth": 0.0, **axes, **parts, **shuffled})
        >>> broja_layers(table)[["channels", "rho_shared_task", "rho_shared_overlap"]].values.tolist()
        [[3.0, 1.0, -1.0]]
    """
    rows = []
    for name, part in table.groupby("layer", sort=False):
        means = part[["shared", "unique", "synergy", "shuffled_shared", "shuffled_unique", "shuffled_synergy"]].mean()
        synergy = means.synergy - means.shuffled_synergy
        rows.append(
            {
                "layer": name,
                "depth": part.depth.iloc[0],
                "channels": len(part),
                "rho_shared_task": _rho(part, "shared", "task_mi"),
                "rho_shared_overlap": _rho(part, "shared", "overlap"),
                "rho_irrecoverable_capture": _rho(part.dropna(subset="irrecoverable"), "irrecoverable", "capture"),
                **means,
                "shared_over_synergy": means.shared / means.synergy if means.synergy > 0 else torch.nan,
                "corrected_ratio": (means.shared - means.shuffled_shared) / synergy if synergy > 0 else torch.nan,
                "irrecoverable": part.irrecoverable.mean(),
                "gap": part.gap.max(),
            }
        )
    return pd.DataFrame(rows)


def _rho(part: pd.DataFrame, a: str, b: str) -> float:
    return cell_correlation(torch.tensor(part[a].to_numpy()), torch.tensor(part[b].to_numpy()))
