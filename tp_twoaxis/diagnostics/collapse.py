"""Whether redundancy about the task says anything that single channels' task information does not (C2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import bootstrap

from tp_twoaxis.diagnostics.axis_coordinates import cell_correlation, local_axis, relative_depths, task_cells
from tp_twoaxis.diagnostics.broja import CHANNELS, broja_layers, broja_table
from tp_twoaxis.diagnostics.collapse_figures import (
    correlations_figure,
    parts_figure,
    redundancy_figure,
    triplets_figure,
)
from tp_twoaxis.diagnostics.evidence import (
    RESAMPLES,
    Claim,
    Drawing,
    Estimate,
    EvidenceInputs,
    Section,
)
from tp_twoaxis.diagnostics.ksg import ksg_table
from tp_twoaxis.diagnostics.layer_trends import best_trend
from tp_twoaxis.diagnostics.run_aggregates import best_estimate
from tp_twoaxis.diagnostics.triplets import triplet_table
from tp_twoaxis.scores.target import target_redundancy, task_information
from tp_twoaxis.statistics.pooled_samples import pooled_samples
from tp_twoaxis.statistics.store import CalibrationStatistics

# bounds of verdicts, ours
WEAK = 0.2
CLEAR = 0.5
EARLY, DEEP = 1.0 / 3.0, 2.0 / 3.0
_OVER_LAYERS = "over layers; the bound is ours"


def redundancy_table(statistics: CalibrationStatistics, layers: Sequence[str]) -> pd.DataFrame:
    """Put target redundancy beside what it is made of and what it is taken for.

    Args:
        statistics: of the calibration, with a target.
        layers: which.

    Returns:
        A row for each channel that varies, in nats: ``layer``, ``depth``, ``channel``, ``overlap`` (R), ``task_mi``
        (M), ``target_redundancy`` (equation 4).

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> stats = calibrate(net, [(torch.randn(64, 8), torch.randint(4, (64,)))], progress=False)
        >>> redundancy_table(stats, ["1"])[["layer", "channel"]].values.tolist()
        [['1', 0], ['1', 1], ['1', 2], ['1', 3]]
    """
    depths, parts = relative_depths(layers), []
    for name in layers:
        layer = statistics[name]
        varying = (layer.variance > 0).nonzero().ravel()
        information = task_information(layer.target_correlation()[varying])
        columns = {
            "channel": varying,
            "overlap": local_axis(layer).overlap,
            "task_mi": information,
            "target_redundancy": target_redundancy(information),
        }
        parts.append(pd.DataFrame({"layer": name, "depth": depths[name], **columns}))
    return pd.concat(parts, ignore_index=True)


def redundancy_layers(channels: pd.DataFrame) -> pd.DataFrame:
    """Correlate target redundancy with task information and with peer overlap.

    The first is arithmetic: ``mean_j min(M_k, M_j)`` rises with M_k, and is the same for the two most informative
    channels, so that Spearman's correlation of n channels is ``sqrt(1 - 6 / (n^3 - n))``.

    Args:
        channels: of :func:`redundancy_table`, of one network.

    Returns:
        A row a layer: ``layer``, ``depth``, ``channels``, ``rho_redundancy_task``, ``rho_overlap_redundancy``; NaN
        below three channels.

    Example:
        >>> table = pd.DataFrame({"layer": "conv1", "depth": 0.0, "overlap": [3.0, 2.0, 1.0],
        ...                       "task_mi": [1.0, 2.0, 3.0], "target_redundancy": [1.0, 1.5, 1.5]})
        >>> redundancy_layers(table).round(3)[["channels", "rho_redundancy_task"]].values.tolist()
        [[3.0, 0.866]]
    """
    rows = []
    for name, part in channels.groupby("layer", sort=False):
        redundancy, information, overlap = (
            torch.tensor(part[column].to_numpy()) for column in ("target_redundancy", "task_mi", "overlap")
        )
        rows.append(
            {
                "layer": name,
                "depth": part.depth.iloc[0],
                "channels": len(part),
                "rho_redundancy_task": cell_correlation(redundancy, information),
                "rho_overlap_redundancy": cell_correlation(overlap, redundancy),
            }
        )
    return pd.DataFrame(rows)


def collapse_section(inputs: EvidenceInputs, *, channels: int = CHANNELS) -> Section:
    """Answer whether redundancy about the task is more than single channels' task information.

    Args:
        inputs: a network, the statistics of its calibration, and the calibration's batches.
        channels: of a layer that are decomposed and estimated by neighbours, at most.

    Raises:
        NotApplicableError: see :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells` and
            :func:`~tp_twoaxis.diagnostics.broja.broja_table`.
        StaleStatisticsError: the statistics are of another state of the model.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = [(torch.randn(256, 3, 6, 6), torch.randint(4, (256,)))]
        >>> inputs = EvidenceInputs(net, calibrate(net, images, progress=False), images, progress=False)
        >>> list(collapse_section(inputs).tables)
        ['redundancy_layers', 'redundancy_channels', 'broja_layers', 'broja_channels', 'ksg', 'triplets']
    """
    layers, statistics = task_cells(inputs), inputs.statistics
    statistics.verify(inputs.model, layers)
    samples = pooled_samples(
        inputs.model,
        inputs.calibration,
        target=statistics.target,
        layers=layers,
        max_images=statistics.num_images,
        progress=inputs.progress,
    )
    redundancy = redundancy_table(statistics, layers)
    atoms = broja_table(statistics, samples, layers, channels=channels, seed=inputs.seed)
    sampled = {str(name): part.channel.tolist() for name, part in atoms.groupby("layer", sort=False)}
    tables = {
        "redundancy_layers": redundancy_layers(redundancy),
        "redundancy_channels": redundancy,
        "broja_layers": broja_layers(atoms),
        "broja_channels": atoms,
        "ksg": ksg_table(statistics, samples, sampled, seed=inputs.seed),
        "triplets": triplet_table(statistics, layers, seed=inputs.seed),
    }
    depths = relative_depths(inputs.cells())
    tables = {name: table.assign(depth=table.layer.map(depths)) for name, table in tables.items()}
    return Section(
        "collapse",
        "Does redundancy about the task say more than how much each channel says about it alone?",
        tables,
        collapse_claims(tables),
        _drawings(tables),
        follows="Gaussian target redundancy is task information once more: a criterion with a term for it weighs task "
        "information differently and learns nothing about which channels can stand in for each other. That has to be "
        "read off the local axis, from overlap and hulls.",
        fails=f"At most {channels} channels of a layer are decomposed, each with one peer. What a channel shares with "
        "the most informative peer is never more than it says itself, so that a high correlation with task information "
        "is to be expected; the low one with overlap is the finding. Parts of information from few images are too "
        "large, as the shuffled target shows, synergy most of all, and nearest neighbours are uncertain by about one "
        "over the root of the images: where channels say less than that, orders and ratios are those of noise. All is "
        "of pooled outputs; the Gaussian quantities are proxies.",
    )


def collapse_claims(tables: dict[str, pd.DataFrame]) -> list[Claim]:
    """Compare what came out with what the paper says.

    Args:
        tables: of :func:`collapse_section`, of one network or of several below each other.
    """
    redundancy, broja = tables["redundancy_layers"], tables["broja_layers"]
    arithmetic = redundancy.rho_redundancy_task
    third = {"early": broja.depth < EARLY, "middle": broja.depth.between(EARLY, DEEP), "deep": broja.depth > DEEP}
    known = broja.shared_over_synergy > 0
    ratio = {name: np.log(broja.shared_over_synergy[cells & known]) for name, cells in third.items()}
    triplets = tables["triplets"]
    shared, information = (torch.tensor(tables["broja_channels"][name].to_numpy()) for name in ("shared", "task_mi"))
    pooled = cell_correlation(shared, information)
    return [
        Claim(
            "Gaussian target redundancy orders channels as task information does",
            "by construction, but for a tie of the best two (lemma 1)",
            Estimate(float(arithmetic.mean()), float(arithmetic.min()), float(arithmetic.max())),
            above=CLEAR,
            note="an arithmetic check; the interval is the range over layers",
        ),
        _unrelated(
            "Peer overlap and target redundancy order channels differently", redundancy, "rho_overlap_redundancy"
        ),
        Claim(
            "Without Gaussian formulas too, shared information about the task follows task information",
            "0.883 ResNet-18, 0.884 VGG-16, 0.812 MobileNetV2",
            best_estimate(broja, "rho_shared_task"),
            above=CLEAR,
            note=f"BROJA, with the most informative peer, mean {_OVER_LAYERS}; over all channels at once {pooled:.2f}",
        ),
        _unrelated("Shared information about the task is not peer overlap", broja, "rho_shared_overlap"),
        Claim(
            "Middle layers share less about the task, against synergy, than early ones",
            "falls (numbers lost)",
            mean_contrast(ratio["early"], ratio["middle"]),
            above=0.0,
            note="difference of mean ln(shared / synergy) between thirds of the depth, ours",
        ),
        Claim(
            "Deep layers share more again than middle ones",
            "rises (numbers lost)",
            mean_contrast(ratio["deep"], ratio["middle"]),
            above=0.0,
            note="difference of mean ln(shared / synergy) between thirds of the depth, ours",
        ),
        _unrelated("What the best peer cannot give back is not input capture", broja, "rho_irrecoverable_capture"),
        Claim(
            "Gaussian task information and that by nearest neighbours order channels differently",
            "0.015 VGG-16, 0.103 MobileNetV2",
            best_estimate(tables["ksg"], "rho"),
            below=CLEAR,
            note=f"KSG with 3 neighbours, mean {_OVER_LAYERS}",
        ),
        Claim(
            "Triplets gain more over pairs, against what pairs gain, the deeper the layer",
            "climbs from input to output",
            best_trend(triplets, "ratio"),
            above=0.0,
            note="rank correlation with depth over layers; near an excess of one over twice the images it is of noise",
        ),
    ]


def _unrelated(sentence: str, cells: pd.DataFrame, column: str) -> Claim:
    return Claim(
        sentence,
        "weakly related (number lost)",
        best_estimate(cells, column),
        above=-WEAK,
        below=WEAK,
        note=f"mean rank correlation {_OVER_LAYERS}",
    )


def mean_contrast(one: Sequence[float], other: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Difference of two groups' means with a percentile bootstrap interval over layers (10,000 resamples).

    Args:
        one: a number a layer.
        other: a number a layer.
        level: of the interval, in (0, 1).
        seed: of the resamples.

    Returns:
        The first mean less the second; without an interval below two layers in either, NaN without any.

    Example:
        >>> round(mean_contrast([1.0, 2.0], [0.0, 1.0]).value, 3)
        1.0
    """
    groups = [np.asarray(values, dtype=np.float64) for values in (one, other)]
    if not all(len(values) for values in groups):
        return Estimate(np.nan)
    value = float(groups[0].mean() - groups[1].mean())
    if min(map(len, groups)) < 2 or not any(np.ptp(values) > 0 for values in groups):
        return Estimate(value)

    def difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(a.mean(axis) - b.mean(axis))

    found = bootstrap(
        groups, difference, n_resamples=RESAMPLES, confidence_level=level, method="percentile", rng=seed
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high))


def _drawings(tables: dict[str, pd.DataFrame]) -> list[Drawing]:
    return [
        Drawing(
            "target_redundancy",
            lambda: redundancy_figure(tables["redundancy_channels"]),
            "Every channel's rank in its layer. Above: by task information and by Gaussian target redundancy, which is "
            "one curve, by construction. Below: by peer overlap and by target redundancy.",
        ),
        Drawing(
            "distribution_free_correlations",
            lambda: correlations_figure(tables["broja_layers"], tables["ksg"]),
            "Rank correlations in each layer. Above: of the information about the task that a channel shares with the "
            "most informative peer, with task information and with peer overlap. Below: of the share that the peer "
            "cannot give back with input capture, and of task information by nearest neighbours with the Gaussian one.",
        ),
        Drawing(
            "parts_by_depth",
            lambda: parts_figure(tables["broja_layers"]),
            "Above: what a channel and the most informative peer say about the task, shared, by the channel alone and "
            "only together, mean of a layer; dotted with open marks the same with the target dealt to other images, "
            "which is the estimator's bias. Below: shared over synergy, as estimated and above that bias.",
        ),
        Drawing(
            "triplets_by_depth",
            lambda: triplets_figure(tables["triplets"]),
            "Above: what three of a layer's 24 most informative channels say beyond the best pair among them, over "
            "what two say beyond the better one. Below: both in nats, and what one more channel adds by chance.",
        ),
    ]
