"""The paper's comparisons of families: best local against best target score and the baselines, and its selector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from tp_twoaxis.benchmark.protocol import paired_interval
from tp_twoaxis.benchmark.tables import Areas, AucResult
from tp_twoaxis.importance import CRITERIA
from tp_twoaxis.importance.criterion import parse_expression

MAGNITUDES = ("l1", "l2")
COMPARISONS = ["network", "treatment", "comparison", "first", "second", "points", "low", "high", "seeds"]


def axis_of(criterion: str) -> str:
    """Give the axis of a criterion: as its row says, or ``baseline`` for everything that is not ours.

    Example:
        >>> axis_of("capture"), axis_of("norm-local"), axis_of("task-mi"), axis_of("taylor")
        ('local', 'mixed', 'target', 'baseline')
    """
    # by the name alone: a report needs no plug-in that the trials needed
    name = parse_expression(criterion)[0]
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
        magnitude, minus every baseline, and mixed and hybrids minus best local; ``points`` is the mean paired
        difference of areas times 100, ``low`` and ``high`` Student's 95 % interval over seeds (missing for one seed).
    """
    rows = []
    for network, treatment, own in _families(auc, trials):
        local, target, mixed, both = (_best(own, axis) for axis in ("local", "target", "mixed", "both"))
        others = [("best local - best target", target)]
        magnitude = _best({c: a for c, a in own.items() if c in MAGNITUDES})
        others += [("best local - magnitude", magnitude)]
        others += [(f"best local - {c}", c) for c in own if axis_of(c) == "baseline" and c not in MAGNITUDES]
        pairs = [(name, local, other) for name, other in others]
        pairs += [("best mixed - best local", mixed, local), ("best hybrid - best local", both, local)]
        for name, first, second in pairs:
            if first is None or second is None:
                continue
            seeds = list(own[first])
            gap = paired_interval([100 * own[first][s] for s in seeds], [100 * own[second][s] for s in seeds])
            rows.append([network, treatment, name, first, second, *gap, len(seeds)])
    return pd.DataFrame(rows, columns=COMPARISONS)


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
