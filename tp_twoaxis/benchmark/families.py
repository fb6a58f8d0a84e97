"""The paper's comparisons of families: best local against best target score and the baselines, and its selector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from tp_twoaxis.benchmark.protocol import mean_interval, paired_interval
from tp_twoaxis.benchmark.tables import Areas, AucResult
from tp_twoaxis.importance import CRITERIA
from tp_twoaxis.importance.criterion import parse_expression
from tp_twoaxis.scores.named_scores import SCORES

MAGNITUDES = ("l1", "l2")
# the comparisons whose signs the paper counts over networks (its table 12)
SIGNED = ("best local - best target", "best local - chip", "best local - taylor", "best norm and local - magnitude")
SIGNS = ["treatment", "comparison", "positive", "networks", "points", "low", "high"]
SELECTED = {
    "over_target": "chosen - best target",
    "over_chip": "chosen - chip",
    "over_taylor": "chosen - taylor",
    "behind_oracle": "chosen - best local of the seed",
}
COMPARISONS = ["network", "treatment", "comparison", "first", "second", "points", "low", "high", "seeds"]


def axis_of(criterion: str) -> str:
    """Give the axis of a criterion: as its row says, or ``baseline`` for everything that is not ours.

    Example:
        >>> axis_of("capture"), axis_of("norm-local"), axis_of("task-mi"), axis_of("taylor")
        ('local', 'mixed', 'target', 'baseline')
        >>> axis_of("spectral-rs"), axis_of("spectral-rs(affinity='S')")
        ('local', 'both')
    """
    # from our own tables alone: a report needs no plug-in that the trials needed
    name, options = parse_expression(criterion)
    if name in SCORES:
        return SCORES[name].axis_with(options)
    return CRITERIA[name].axis if name in CRITERIA else "baseline"


def axis_table(auc: AucResult, trials: pd.DataFrame) -> pd.DataFrame:
    """Compare families as the paper does (its table 9): the best of one against the best of another.

    "Best" is by mean area over the seeds of this very table, as in the paper, so a family of more members has an
    advantage; :func:`selector_table` shows what remains without it. All criteria of a treatment are compared on the
    same seeds: one without an area on some of them, because it failed there, belongs to no family here.

    Args:
        auc: areas of all methods.
        trials: of :func:`~tp_twoaxis.benchmark.tables.trial_table`.

    Returns:
        A row for each network, treatment (all but the criterion) and comparison: best local minus best target, minus
        magnitude, minus every baseline; mixed and hybrids minus best local; and the best score of norms and local
        statistics, which the paper calls mixed, minus magnitude. ``points`` is the mean paired difference of areas
        times 100, ``low`` and ``high`` Student's 95 % interval over seeds (missing for one seed).
    """
    rows = []
    for network, treatment, own in _families(auc, trials):
        local, target, mixed = (_best(own, axis) for axis in ("local", "target", "mixed"))
        hybrid = _best({c: a for c, a in own.items() if parse_expression(c)[0] == "hybrid"})
        norm_and_local = _best({c: a for c, a in own.items() if axis_of(c) == "mixed" and _is_score(c)})
        others = [("best local - best target", target)]
        magnitude = _best({c: a for c, a in own.items() if c in MAGNITUDES})
        others += [("best local - magnitude", magnitude)]
        others += [(f"best local - {c}", c) for c in own if axis_of(c) == "baseline" and c not in MAGNITUDES]
        pairs = [(name, local, other) for name, other in others]
        pairs += [("best mixed - best local", mixed, local), ("best hybrid - best local", hybrid, local)]
        pairs += [("best norm and local - magnitude", norm_and_local, magnitude)]
        for name, first, second in pairs:
            if first is None or second is None:
                continue
            seeds = list(own[first])
            gap = paired_interval([100 * own[first][s] for s in seeds], [100 * own[second][s] for s in seeds])
            rows.append([network, treatment, name, first, second, *gap, len(seeds)])
    return pd.DataFrame(rows, columns=COMPARISONS)


def sign_table(axes: pd.DataFrame) -> pd.DataFrame:
    """Count the networks on which a family is ahead, as the paper's table 12 does.

    Args:
        axes: of :func:`axis_table`, of one or several results folders.

    Returns:
        A row for each treatment and comparison of :data:`SIGNED`: on how many ``networks`` the mean difference is
        ``positive``, and its mean over networks in ``points`` with Student's 95 % interval ``low`` to ``high``
        (missing for one network). A tie is not positive. Intervals of single networks are in ``axes``.

    Example:
        >>> axes = pd.DataFrame([["a", "bn", "best local - taylor", "hull", "taylor", 2.0, 1.0, 3.0, 5]],
        ...                     columns=COMPARISONS)
        >>> sign_table(axes)[["comparison", "positive", "networks", "points"]].values.tolist()
        [['best local - taylor', 1, 1, 2.0]]
    """
    rows: list[list[Any]] = []
    for treatment in axes.treatment.unique():
        for comparison in SIGNED:
            own = axes[(axes.treatment == treatment) & (axes.comparison == comparison)]
            if len(own):
                over = mean_interval(own.points.tolist())
                rows.append([treatment, comparison, int((own.points > 0).sum()), len(own), *over])
    return pd.DataFrame(rows, columns=SIGNS)


def selector_table(auc: AucResult, trials: pd.DataFrame) -> pd.DataFrame:
    """Choose the local score without seeing the seed it is judged on (the paper's appendix H).

    For each held-out seed the local score of the highest mean area on the other seeds is taken, and compared there;
    all on the same seeds, as in :func:`axis_table`.

    Returns:
        A row for each network, treatment and held-out seed: ``chosen``, its ``auc``, and in points of area
        ``behind_oracle`` (the best local score of that seed itself, never above 0), ``over_target`` (the seed's best
        target score), ``over_taylor``, ``over_chip``; missing where there is no such method. Empty for one seed.
    """
    rows: list[dict[str, Any]] = []
    for network, treatment, own in _families(auc, trials):
        local = {c: a for c, a in own.items() if axis_of(c) == "local"}
        seeds = sorted({s for areas in local.values() for s in areas})
        for seed in seeds if len(seeds) > 1 else ():
            chosen = max(local, key=lambda c: _mean(a for s, a in local[c].items() if s != seed))
            area = local[chosen][seed]

            def over(criteria: Iterable[str], own: Areas = own, seed: int = seed, area: float = area) -> float:
                found = [own[c][seed] for c in criteria if c in own]
                return 100 * (area - max(found)) if found else float("nan")

            rows.append(
                {
                    "network": network,
                    "treatment": treatment,
                    "held_out": seed,
                    "chosen": chosen,
                    "auc": area,
                    "behind_oracle": over(local),
                    "over_target": over(c for c in own if axis_of(c) == "target"),
                    "over_taylor": over(["taylor"]),
                    "over_chip": over(["chip"]),
                }
            )
    return pd.DataFrame(rows)


def selector_summary(selector: pd.DataFrame) -> pd.DataFrame:
    """Sum the selector up over networks and held-out seeds (appendix H: ahead on 52, 53 and 43 of 53).

    Args:
        selector: of :func:`selector_table`, of one or several results folders.

    Returns:
        A row for each treatment and rival (best target score, CHIP, Taylor, and the best local score of the seed
        itself, which nothing is ahead of): on how many of the ``held_out`` seeds that have the rival the chosen score
        is ahead (``positive``), and by how many ``points`` of area on average.

    Example:
        >>> row = {"network": "a", "treatment": "bn", "held_out": 1, "over_target": 3.0, "over_chip": float("nan"),
        ...        "over_taylor": -1.0, "behind_oracle": 0.0}
        >>> selector_summary(pd.DataFrame([row])).values.tolist()
        [['bn', 'chosen - best target', 1, 1, 3.0], ['bn', 'chosen - taylor', 0, 1, -1.0],
         ['bn', 'chosen - best local of the seed', 0, 1, 0.0]]
    """
    rows: list[list[Any]] = []
    for treatment in selector.treatment.unique() if len(selector) else ():
        own = selector[selector.treatment == treatment]
        for column, comparison in SELECTED.items():
            points = own[column].dropna()
            if len(points):
                rows.append([treatment, comparison, int((points > 0).sum()), len(points), float(points.mean())])
    return pd.DataFrame(rows, columns=["treatment", "comparison", "positive", "held_out", "points"])


def _is_score(criterion: str) -> bool:
    """Whether it scores a layer from its statistics, and does not look at logits or consumers."""
    return parse_expression(criterion)[0] in SCORES


def _families(auc: AucResult, trials: pd.DataFrame) -> Iterable[tuple[str, str, Areas]]:
    """Give each network's areas by treatment, by criterion; those alone that have an area on all of its seeds."""
    for network, areas in auc.areas.items():
        methods = trials[(trials.network == network)].drop_duplicates("method").set_index("method")
        by_treatment: dict[str, Areas] = {}
        for method, own in areas.items():
            row = methods.loc[method]
            by_treatment.setdefault(str(row.treatment), {})[str(row.criterion)] = own
        for treatment, found in by_treatment.items():
            seeds = sorted({seed for own in found.values() for seed in own})
            whole = {c: {seed: own[seed] for seed in seeds} for c, own in found.items() if len(own) == len(seeds)}
            yield network, treatment, whole


def _best(areas: Areas, axis: str | None = None) -> str | None:
    own = {c: a for c, a in areas.items() if axis in (None, axis_of(c))}
    return max(own, key=lambda c: _mean(own[c].values())) if own else None


def _mean(values: Iterable[float]) -> float:
    numbers: Sequence[float] = list(values)
    return sum(numbers) / len(numbers)
