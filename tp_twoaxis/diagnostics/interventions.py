"""Does removal damage follow what peers can supply? Lesions and peer replacement (paper, section 4.1, appendix K.2)."""

from __future__ import annotations

from functools import partial

import pandas as pd

from tp_twoaxis.diagnostics import interventions_figures as figures
from tp_twoaxis.diagnostics.damage_regression import damage_regression, regression_summary
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, Estimate, EvidenceInputs, Section
from tp_twoaxis.diagnostics.lesion_damage import damage_by_layer, damage_correlations, matched_pairs, pooled_pairs
from tp_twoaxis.diagnostics.lesion_probe import lesion_probe
from tp_twoaxis.diagnostics.peer_recovery import matched_recovery_table, recovery_table
from tp_twoaxis.diagnostics.run_aggregates import best_estimate

LOST = "number lost"
FEW_CELLS = 10  # a bootstrap of fewer is narrower than it says


def interventions_section(inputs: EvidenceInputs) -> Section:
    """Remove channels of three convolutions, and see what the damage and its repair by peers go with.

    Args:
        inputs: with held-out images.

    Raises:
        NotApplicableError: no held-out images, no convolution, no task variable, or nothing in these layers varies.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)).eval()
        >>> images = [(torch.randn(32, 3, 4, 4), torch.randint(4, (32,)))]
        >>> inputs = EvidenceInputs(net, calibrate(net, images, progress=False), images, images, progress=False)
        >>> interventions_section(inputs).name
        'interventions'
    """
    return interventions_of(lesion_probe(inputs, removal=inputs.removal), seed=inputs.seed)


def interventions_of(channels: pd.DataFrame, *, seed: int = 0) -> Section:
    """Answer from a table of removed channels, of one network or of several with columns ``network`` and ``seed``.

    Args:
        channels: from :func:`~tp_twoaxis.diagnostics.lesion_probe.lesion_probe`.
        seed: of the resamples.

    Example:
        >>> import numpy as np
        >>> from tp_twoaxis.diagnostics.lesion_probe import COLUMNS
        >>> values = np.random.default_rng(0).uniform(size=(30, len(COLUMNS)))
        >>> table = pd.DataFrame(values, columns=list(COLUMNS)).assign(layer="conv1", depth=0.0, constant=False)
        >>> table["removal"] = "mean"
        >>> interventions_of(table).claims[0].verdict  # one cell has no interval
        'UNDECIDED'
    """
    pairs, regression = matched_pairs(channels), damage_regression(channels)
    in_place = " or ".join({"mean": "their mean", "zero": "zero"}[removal] for removal in channels.removal.unique())
    tables = {
        "lesion_channels": channels,
        "lesion_layers": damage_by_layer(channels),
        "damage_correlations": damage_correlations(channels),
        "matched_capture": pairs,
        "matched_capture_pooled": pooled_pairs(pairs),
        "peer_recovery": recovery_table(channels, seed=seed),
        "matched_task_recovery": matched_recovery_table(channels, seed=seed),
        "damage_regression": regression,
        "damage_regression_mean": regression_summary(regression),
    }
    return Section(
        "interventions",
        "Does the damage of removing a channel follow what its peers can supply, beyond capture and task information?",
        tables,
        [*_damage_claims(tables), *_pair_claims(tables), *_recovery_claims(tables), *_matched_claims(tables)],
        _drawings(tables),
        follows=(
            "Where the peers' explanation tells the recovered share, a pruner gains by repairing with peers what it "
            "removes, and by removing first what peers explain; where capture alone tells the damage, overlap adds "
            "little to the ranking."
        ),
        fails=(
            f"Single channels of three convolutions are removed, with {in_place} in their place in the stored output, "
            "before BatchNorm; whole groups, as a pruner removes them, also lose the peers. Damages of a few "
            "thousandths of a nat are near the images' sampling error (see the table of layers), and bins, pairs and "
            "thresholds are ours where the paper's text lost them. Of one network there are three cells: its intervals "
            "say how much hangs on its layers and channels, not what another training would give."
        ),
    )


def _damage_claims(tables: dict[str, pd.DataFrame]) -> list[Claim]:
    rho, regression = tables["damage_correlations"], tables["damage_regression"]
    over = f"mean over {len(rho)} cells" + ("" if len(rho) >= FEW_CELLS else ", too few for an interval to be trusted")
    rho = rho.assign(compact_lead=-rho.compact_local - rho.capture)
    # every set of predictors has the cells in the same order
    sets = [part.reset_index(drop=True) for _, part in regression.groupby("predictors", sort=False)]
    gain = sets[-1].assign(gain=sets[-1].held_out - sets[0].held_out) if sets else pd.DataFrame({"gain": []})
    return [
        Claim(
            "low capture with compact peer support, z K - z I, tells the harmless channels better than low capture",
            f"positive, {LOST}",
            best_estimate(rho, "compact_lead"),
            above=0.0,
            note=f"difference of rank correlations with less damage, {over}",
        ),
        Claim(
            "channels with larger hulls do more damage, not less",
            f"positive, {LOST}",
            best_estimate(rho, "hull_size"),
            above=0.0,
            note=f"rank correlation of hull size and damage, {over}",
        ),
        Claim(
            "capture, overlap, compact support and task information predict damage beyond the weight norm",
            f"positive, {LOST}",
            best_estimate(gain, "gain"),
            above=0.0,
            note=f"gain of R^2 in cells that the regression did not see, {over}; the paper's is over all channels",
        ),
    ]


def _pair_claims(tables: dict[str, pd.DataFrame]) -> list[Claim]:
    pooled = tables["matched_capture_pooled"].set_index("property")
    won = {name: Estimate(row.win_rate, row.lower, row.upper) for name, row in pooled.iterrows()}
    share = {name: f"share of {count} pairs" for name, count in pooled["pairs"].items()}
    return [
        Claim(
            "at equal capture, whether the larger hull costs less is a matter of chance",
            "0.474",
            won["hull_size"],
            above=0.45,
            below=0.55,
            note=f"{share['hull_size']}; the bounds of chance are ours",
        ),
        Claim(
            "at equal capture, the channel with more overlap costs less",
            "0.553",
            won["overlap"],
            above=0.5,
            note=f"{share['overlap']}; the paper's is over all channels of its networks, ours over the probed ones",
        ),
        Claim(
            "at equal capture, the channel with the more compact peer support costs less",
            f"above 0.5, {LOST}",
            won["compact_support"],
            above=0.5,
            note=share["compact_support"],
        ),
    ]


def _recovery_claims(tables: dict[str, pd.DataFrame]) -> list[Claim]:
    row = tables["peer_recovery"].iloc[0]
    at = f"damage {row.rule}, {row.channels} channels; the paper's threshold is lost"
    return [
        Claim("peers give back most of the damage", "0.687 (median)", _estimate(row, "share"), above=0.5, note=at),
        Claim(
            "peers help more often than they harm", "0.843 of channels", _estimate(row, "helped"), above=0.5, note=at
        ),
        Claim(
            "the recovered share goes with the peers' explanation E_8 more than with task information",
            f"positive, {LOST}",
            _estimate(row, "advantage"),
            above=0.0,
            note=f"difference of rank correlations over all layers together; {at}",
        ),
    ]


def _matched_claims(tables: dict[str, pd.DataFrame]) -> list[Claim]:
    matched = tables["matched_task_recovery"]
    row = matched[matched.rule.str.startswith("largest")].iloc[0]
    inside = f"{row.rule} of damages, {row.channels} channels, ranks within bins of task information"
    return [
        Claim(
            "at equal task information, the peers' explanation E_8 tells the recovered share",
            "[0.077, 0.183]",
            _estimate(row, "peer_explanation"),
            above=0.0,
            note=inside,
        ),
        Claim(
            "at equal task information, capture does not tell the recovered share",
            "[-0.060, 0.038]",
            _estimate(row, "capture"),
            above=-0.1,
            below=0.1,
            note=f"{inside}; the bounds are ours",
        ),
        Claim(
            "in bins of task information, what is left of it does not tell the recovered share",
            "[-0.013, 0.088]",
            _estimate(row, "task_mi"),
            above=-0.1,
            below=0.1,
            note=f"{inside}; the bounds are ours",
        ),
        Claim(
            "at equal task information, the half that peers explain better recovers more",
            "[0.537, 0.665]",
            _estimate(row, "win_rate"),
            above=0.5,
            note=f"share of {row.bins} bins; {inside}",
        ),
    ]


def _estimate(row: pd.Series, name: str) -> Estimate:
    return Estimate(row[name], row[f"{name}_lower"], row[f"{name}_upper"])


def _drawings(tables: dict[str, pd.DataFrame]) -> list[Drawing]:
    return [
        Drawing(
            "damage_correlations",
            partial(figures.correlations_figure, tables["damage_correlations"]),
            "Rank correlation of each score with the loss that a removed channel costs, one point a layer, coloured "
            "from the first to the last convolution; bars are means. A score to keep channels by lies to the right of "
            "0, one to remove them by to the left.",
        ),
        Drawing(
            "matched_capture",
            partial(figures.pairs_figure, tables["matched_capture_pooled"], tables["matched_task_recovery"]),
            "How often, of two channels with nearly equal capture, the one with more overlap, a larger hull or more "
            "compact support costs less; below, how often of the channels with nearly equal task information the half "
            "that peers explain better recovers more. Bars are Wilson's 95 % intervals, diamonds and pale bars the "
            "paper's.",
        ),
        Drawing(
            "peer_recovery",
            partial(figures.recovery_figure, tables["lesion_channels"]),
            "Share of the damage that 8 peers' prediction gives back against the share of the channel's variance that "
            "they explain, for channels whose removal costs more than 0.001 nats. 1: everything; below 0: the "
            "prediction does more harm than the removal.",
        ),
        Drawing(
            "matched_task_recovery",
            partial(figures.matched_figure, tables["matched_task_recovery"]),
            "Correlation of the recovered share with the peers' explanation, capture and task information, by rank "
            "within bins of task information, for three sets of most damaging channels; dots with 95 % intervals, pale "
            "bars the paper's intervals.",
        ),
        Drawing(
            "damage_regression",
            partial(figures.regression_figure, tables["damage_regression_mean"]),
            "Share of the damage's variance that weight norm predicts, and what each further score adds: where the "
            "regression was fitted, and in layers that it did not see.",
        ),
    ]
