"""What the demo's table shows, in two sentences, whatever it shows."""

from __future__ import annotations

import math

from tp_twoaxis.runtime.serialization import Json


def verdict(result: Json, recommended: str) -> list[str]:
    r"""Compare the recommended method with the others that have its repair, then that repair with the other one.

    Args:
        result: of the demo; its ``summary`` has a row for each method and target, all criteria with the same two
            repairs.
        recommended: a method's name.

    Returns:
        Two sentences. Standard errors are those of a difference of two independent shares of right answers; all methods
        answer the same images, so the true ones are smaller.

    Example:
        >>> row = {"target": 0.5, "standard_error": 0.01}
        >>> summary = [{**row, "method": f"{criterion}+{repair}", "criterion": criterion, "repair": repair,
        ...             "accuracy": accuracy} for criterion, repair, accuracy in
        ...            [("a", "joint", 0.9), ("b", "joint", 0.8), ("a", "bn", 0.7), ("b", "bn", 0.5)]]
        >>> print(*verdict({"summary": summary, "settings": {"targets": [0.5]}}, "a+joint"), sep="\n")
        Criteria: with joint for all, a, the default, is 10.0 points ahead of b, the best other, at 50% of the
        multiply-adds (beyond two standard errors, 2.8).
        Repairs: at 50% of the multiply-adds joint gives the criteria 20.0 to 30.0 points more than bn, and with joint
        they lie within 10.0 points of each other, so here the repair matters more than the criterion.
    """
    targets = result["settings"]["targets"]
    own = next(row for row in result["summary"] if row["method"] == recommended)
    shown = [targets[0], targets[-1]] if len(targets) > 1 else targets
    return [_criteria(result["summary"], own, shown), _repairs(result["summary"], own["repair"], targets[-1])]


def _criteria(summary: list[Json], recommended: Json, targets: list[float]) -> str:
    parts: list[str] = []
    for target in targets:
        rows = [row for row in summary if row["target"] == target and row["repair"] == recommended["repair"]]
        own = next(row for row in rows if row["method"] == recommended["method"])
        other = max((row for row in rows if row is not own), key=lambda row: row["accuracy"])
        gap = 100 * (own["accuracy"] - other["accuracy"])
        error = 200 * math.hypot(own["standard_error"], other["standard_error"])
        size = f"{abs(gap):.1f} points {'ahead of' if gap > 0 else 'behind'}" if abs(gap) >= 0.05 else "level with"
        best, unit = ("", "") if parts else (", the best other,", " of the multiply-adds")
        chance = f"{'beyond' if abs(gap) > error else 'within'} two standard errors, {error:.1f}"
        parts.append(f"{size} {other['criterion']}{best} at {target:.0%}{unit} ({chance})")
    own, repair = recommended["criterion"], recommended["repair"]
    return f"Criteria: with {repair} for all, {own}, the default, is {', and '.join(parts)}."


def _repairs(summary: list[Json], repair: str, target: float) -> str:
    rows = [row for row in summary if row["target"] == target]
    with_it = {row["criterion"]: row["accuracy"] for row in rows if row["repair"] == repair}
    other = next(row["repair"] for row in rows if row["repair"] != repair)
    without = {row["criterion"]: row["accuracy"] for row in rows if row["repair"] == other}
    gains = [100 * (with_it[criterion] - without[criterion]) for criterion in with_it]
    spread = 100 * (max(with_it.values()) - min(with_it.values()))
    low, high = min(gains), max(gains)
    if low >= 0:
        change = f"{repair} gives the criteria {low:.1f} to {high:.1f} points more than {other}"
    elif high <= 0:
        change = f"{repair} gives the criteria {-high:.1f} to {-low:.1f} points less than {other}"
    else:
        change = f"{repair} instead of {other} changes the criteria by {low:+.1f} to {high:+.1f} points"
    text = (
        f"Repairs: at {target:.0%} of the multiply-adds {change}, and with {repair} they lie within {spread:.1f} "
        "points of each other"
    )
    return text + (", so here the repair matters more than the criterion." if low > spread else ".")
