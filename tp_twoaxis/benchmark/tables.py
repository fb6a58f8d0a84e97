"""From records to tables: one row a trial, means over seeds, areas under curves, wins, times."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tp_twoaxis.benchmark.methods import Method
from tp_twoaxis.benchmark.protocol import Curve, common_interval, mean_interval, paired_interval, retention_auc
from tp_twoaxis.errors import TwoAxisError

COUNTERS = ("macs", "host_macs", "thop_macs", "params")
Areas = dict[str, dict[int, float]]
FAILED = -1.0  # below any accuracy
ACCURACIES = ("accuracy", "before_finetuning", "dense")


def trial_table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Lay records out, one row a trial.

    Args:
        records: of :meth:`~tp_twoaxis.benchmark.results.ResultsFolder.read_all`.

    Returns:
        Columns ``network, seed, method, criterion, allocation, repair, finetune_batches, finetune_lr`` (the rate
        that was taken), ``steps, treatment, keep, grid, status, error, achieved`` (share of MACs), ``macs, host_macs,
        thop_macs, params`` of the pruned network and ``dense_...`` of the dense one (``host_macs`` by Torch-Pruning's
        counter), ``accuracy, before_finetuning, dense`` in [0, 1], ``retention``, ``seconds_...`` by phase,
        ``checkpoint``, ``weights``, and what made the trial: ``commit, torch, machine, command, date``. Measurements of
        failed trials are missing.

    Raises:
        TwoAxisError: there are no records.

    Example:
        >>> record = {"network": {"name": "net"}, "seed": 1, "keep": 0.5, "grid": "macs", "status": "failed",
        ...     "seconds": {},
        ...     "provenance": {}, "error": {"type": "ValueError", "message": "no"}, "method": {"name": "l2",
        ...     "criterion": "l2", "allocation": "global", "repair": [], "finetune_batches": 0}}
        >>> trial_table([record])[["method", "treatment", "status", "error"]].iloc[0].tolist()
        ['l2', 'none', 'failed', 'ValueError: no']
    """
    if not records:
        raise TwoAxisError("expected at least one trial, got none; run the sweep first")
    return pd.DataFrame([_row(record) for record in records])


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    method = record["method"]
    error = record.get("error")
    steps = method.get("steps", 1)  # older records lack it
    made = Method(method["criterion"], method["allocation"], tuple(method["repair"]), method["finetune_batches"], steps)
    accuracy = record.get("accuracy", {})
    values = {
        name: accuracy.get(key, np.nan)
        for name, key in zip(ACCURACIES, ("pruned", "before_finetuning", "dense"), strict=True)
    }
    return {
        "network": record["network"]["name"],
        "seed": record["seed"],
        "method": method["name"],
        "criterion": method["criterion"],
        "allocation": method["allocation"],
        "repair": "+".join(method["repair"]) or "none",
        "finetune_batches": method["finetune_batches"],
        "finetune_lr": (record.get("finetuning") or {}).get("lr", np.nan),  # records of one rate may lack it
        "steps": steps,
        "treatment": made.treatment,
        "keep": record["keep"],
        "grid": record["grid"],
        "status": record["status"],
        "error": None if error is None else f"{error['type']}: {error['message']}",
        "achieved": record.get("achieved", np.nan),
        **{name: _number(record.get(name), "pruned") for name in COUNTERS},
        **{f"dense_{name}": _number(record.get(name), "dense") for name in COUNTERS},
        **values,
        "retention": values["accuracy"] / values["dense"] if values["dense"] else np.nan,
        **{f"seconds_{phase}": seconds for phase, seconds in record["seconds"].items()},
        "checkpoint": record["network"].get("checkpoint"),
        "weights": record.get("weights"),
        **_provenance(record["provenance"]),
    }


def read_trial_table(path: Path) -> pd.DataFrame:
    """Read a table that :func:`trial_table` made and a report wrote as CSV.

    Raises:
        TwoAxisError: it cannot be read, or is another table.
    """
    try:
        trials = pd.read_csv(path, dtype=dict.fromkeys(("repair", "treatment", "error", "commit", "torch"), str))
    except (OSError, ValueError) as error:
        raise TwoAxisError(f"{path}: expected a table of trials, reading it failed: {error}; write it anew") from error
    if missing := {"network", "method", "keep", "status", "achieved", "accuracy"} - set(trials.columns):
        raise TwoAxisError(f"{path}: expected a table of trials, it lacks {', '.join(sorted(missing))}; write it anew")
    return trials.assign(error=trials.error.where(trials.error.notna(), None))


def latest_provenance(trials: pd.DataFrame) -> dict[str, Any]:
    """Give what made the trial that ran last, as far as the table tells.

    Example:
        >>> made = {"date": "2026", "commit": "a1", "torch": "2.14", "command": "c", "machine": "2 cores EPYC, cpu"}
        >>> latest_provenance(pd.DataFrame([made]))["machine"]
        {'cores': '2', 'processor': 'EPYC', 'device': 'cpu'}
    """
    row = trials.loc[trials.date.astype(str).idxmax()]
    found = re.fullmatch(r"(\S+) cores (.*), (.*?)", str(row.machine))
    machine = dict(zip(("cores", "processor", "device"), found.groups(), strict=True)) if found else {}
    known = {key: row[key] for key in ("commit", "command", "date")}
    return {**known, "versions": {"torch": row.torch}, "machine": machine}


def _provenance(made: Mapping[str, Any]) -> dict[str, Any]:
    machine = made.get("machine", {})
    where = f"{machine.get('cores')} cores {machine.get('processor')}, {machine.get('device')}" if machine else None
    return {
        "commit": made.get("commit"),
        "torch": made.get("versions", {}).get("torch"),
        "machine": where,
        "command": made.get("command"),
        "date": made.get("date"),
    }


def _number(counts: Mapping[str, Any] | None, which: str) -> float:
    value = None if counts is None else counts[which]
    return np.nan if value is None else float(value)


def measured(trials: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of trials that did not fail."""
    return trials[trials.status == "ok"]


def summary_table(trials: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread over seeds for every network, method and share kept.

    Returns:
        Columns ``network, method, criterion, treatment, keep, seeds, achieved, accuracy, std`` (sample standard
        deviation, missing for one seed), ``lowest, highest, retention, dense``, in the config's order.
    """
    keys = ["network", "method", "criterion", "treatment", "keep"]
    groups = measured(trials).groupby(keys, sort=False)
    return groups.agg(
        seeds=("seed", "nunique"),
        achieved=("achieved", "mean"),
        accuracy=("accuracy", "mean"),
        std=("accuracy", "std"),
        lowest=("accuracy", "min"),
        highest=("accuracy", "max"),
        retention=("retention", "mean"),
        dense=("dense", "mean"),
    ).reset_index()


@dataclass(frozen=True)
class AucResult:
    """Areas under the accuracy-retention curves.

    Attributes:
        table: columns ``network, method, auc, low, high, seeds, unmeasured, behind_best, behind_low, behind_high``;
            ``auc`` is the mean retention over the common interval, ``unmeasured`` how many of the compared seeds'
            trials failed or are missing, ``behind_best`` the mean paired difference from the best method of the
            network; bounds are Student's 95 % intervals over seeds. Methods with an area on more seeds first, of those
            the best.
        areas: network -> method -> seed -> area.
        intervals: network -> the interval of MACs removed that its methods have in common.
        notes: what is missing and why.
    """

    table: pd.DataFrame
    areas: dict[str, Areas]
    intervals: dict[str, tuple[float, float]]
    notes: list[str]


def auc_table(trials: pd.DataFrame) -> AucResult:
    """Compare methods by the area under accuracy retention over MACs removed; see the protocol.

    A curve counts where it was measured at every share of the network's: no line bridges a trial that failed, and no
    interval is cut short for it. So a method that failed somewhere has no area on that seed and comes after those that
    have; its difference from the best is over the seeds that both have. Seeds that some method has not been run on to
    the end are left out for all. A network without a common interval has no rows but a note that names the method at
    fault.
    """
    rows: list[dict[str, Any]] = []
    found: dict[str, Areas] = {}
    intervals: dict[str, tuple[float, float]] = {}
    notes: list[str] = []
    for network in trials.network.unique():
        mine = trials[trials.network == network]
        seeds, unfinished = _compared_seeds(mine)
        if unfinished:
            notes.append(f"{network}: seeds {', '.join(map(str, unfinished))} are not compared until all trials ran")
        compared, shares = mine[mine.seed.isin(seeds)], mine.keep.nunique()
        curves = {method: _curves(measured(own), shares) for method, own in compared.groupby("method", sort=False)}
        if absent := [method for method, own in curves.items() if not own]:
            notes.append(
                f"{network}: {', '.join(absent)} left out, no seed has all its shares of MACs measured, or two"
            )
        if partial := [f"{method} on {len(own)}" for method, own in curves.items() if 0 < len(own) < len(seeds)]:
            notes.append(
                f"{network}: not measured to the end on all {len(seeds)} seeds, so last and in no family: "
                f"{', '.join(partial)}"
            )
        curves = {method: own for method, own in curves.items() if own}
        try:
            interval = common_interval({method: list(own.values()) for method, own in curves.items()})
        except TwoAxisError as error:
            notes.append(f"{network}: {error}")
            continue
        intervals[network] = interval
        areas = found[network] = {
            method: {seed: retention_auc(curve, interval) for seed, curve in own.items()}
            for method, own in curves.items()
        }
        order = sorted(areas, key=lambda method: (-len(areas[method]), -float(np.mean(list(areas[method].values())))))
        good = measured(compared).groupby("method").size()
        for method in order:
            row = _auc_row(network, method, areas[method], areas[order[0]])
            rows.append(row | {"unmeasured": len(seeds) * shares - int(good[method])})
    columns = ["network", "method", "auc", "low", "high", "seeds", "unmeasured"]
    columns += ["behind_best", "behind_low", "behind_high"]
    return AucResult(pd.DataFrame(rows, columns=columns), found, intervals, notes)


def _compared_seeds(trials: pd.DataFrame) -> tuple[list[int], list[int]]:
    """Split a network's seeds into those on which every method's trials ran, and others; none of the former: all."""
    ran = trials.drop_duplicates(["seed", "method", "keep"]).groupby("seed", sort=False).size()
    whole = trials.method.nunique() * trials.keep.nunique()
    finished, unfinished = ran.index[ran == whole].tolist(), ran.index[ran < whole].tolist()
    return (finished, unfinished) if finished else (unfinished, [])


def _curves(trials: pd.DataFrame, shares: int) -> dict[int, Curve]:
    """Give the curve of every seed that has all shares measured, and at least two different MACs."""
    return {
        int(seed): Curve((1.0 - own.achieved).tolist(), own.retention.tolist())
        for seed, own in trials.groupby("seed", sort=False)
        if own.keep.nunique() == shares and own.achieved.nunique() > 1
    }


def _auc_row(network: str, method: str, own: dict[int, float], best: dict[int, float]) -> dict[str, Any]:
    auc = mean_interval(list(own.values()))
    shared = [seed for seed in own if seed in best]
    row = {"network": network, "method": method, "auc": auc.mean, "low": auc.low, "high": auc.high, "seeds": len(own)}
    if not shared:
        return row | {"behind_best": np.nan, "behind_low": np.nan, "behind_high": np.nan}
    behind = paired_interval([own[s] for s in shared], [best[s] for s in shared])
    return row | {"behind_best": behind.mean, "behind_low": behind.low, "behind_high": behind.high}


def win_matrix(trials: pd.DataFrame) -> pd.DataFrame:
    """Count how often the row's method is more accurate than the column's, at equal network, seed and MACs.

    A trial that failed is lost to one that did not. Methods that always failed have no row.

    Returns:
        [methods, methods] shares in [0, 1], ties count half; missing on the diagonal and where no trial is shared.
    """
    some = trials[trials.method.isin(measured(trials).method)]
    wide = some.assign(accuracy=some.accuracy.where(some.status == "ok", FAILED)).pivot_table(
        index=["network", "seed", "keep"], columns="method", values="accuracy", sort=False
    )
    names = list(wide.columns)
    values = wide.to_numpy()
    shares = np.full((len(names), len(names)), np.nan)
    for i in range(len(names)):
        for j in range(len(names)):
            both = ~np.isnan(values[:, i]) & ~np.isnan(values[:, j]) & (np.maximum(values[:, i], values[:, j]) > FAILED)
            if i != j and both.any():
                a, b = values[both, i], values[both, j]
                shares[i, j] = float(np.mean((a > b) + 0.5 * (a == b)))
    return pd.DataFrame(shares, index=pd.Index(names, name="method"), columns=names)


def timing_table(trials: pd.DataFrame) -> pd.DataFrame:
    """Mean seconds a trial by phase, for every network and method.

    ``statistics`` and ``gradients`` are what gathering them took once for a network and seed; ``total`` is the
    wall-clock time of the trial itself, which includes them only where it was the first to need them.
    """
    phases = [name for name in trials.columns if name.startswith("seconds_")]
    phases = [name for name in phases if name != "seconds_total"] + ["seconds_total"]
    means = measured(trials).groupby(["network", "method"], sort=False)[phases].mean().reset_index()
    return means.rename(columns=lambda name: name.removeprefix("seconds_"))


def failure_table(trials: pd.DataFrame) -> pd.DataFrame:
    """List failed trials with their errors."""
    return trials[trials.status == "failed"][["network", "seed", "method", "keep", "error"]].reset_index(drop=True)


def warnings_of(trials: pd.DataFrame) -> list[str]:
    """List what makes trials hard to compare: other weights, other commits, targets that were missed."""
    good = measured(trials)
    notes = []
    for (network, checkpoint), own in good.groupby(["network", "checkpoint"], sort=False, dropna=False):
        if own.weights.nunique() > 1:
            which = f"{network} ({checkpoint})" if checkpoint else str(network)
            notes.append(f"{which}: its trials have {own.weights.nunique()} different dense weights; run them anew")
    for network, own in good.groupby("network", sort=False):
        outcomes = own.groupby(["method", "keep"]).accuracy.agg(["size", "nunique"])
        repeated = outcomes[outcomes["size"] > 1]
        if len(repeated) and (repeated["nunique"] == 1).mean() > 0.5:
            notes.append(
                f"{network}: most trials are the same for all seeds, so that intervals over seeds say nothing; seeds "
                'that share weights differ by calibration images with "calibration_draw": "seed"'
            )
    if good.commit.nunique() > 1:
        notes.append(f"trials come from {good.commit.nunique()} commits: {', '.join(map(str, good.commit.unique()))}")
    off = good[(good.grid == "macs") & ((good.achieved - good.keep).abs() > 0.02 * good.keep)]
    if len(off):
        notes.append(
            f"{len(off)} trials keep other MACs than their share by more than 2 %: {', '.join(off.method.unique())}"
        )
    return notes
