"""What pruning results say of the paper's claims C5 to C9: families of criteria compared at equal MACs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tp_twoaxis.benchmark.report import make_report
from tp_twoaxis.benchmark.results import CONFIG
from tp_twoaxis.diagnostics.evidence import Claim, Estimate
from tp_twoaxis.errors import TwoAxisError

# comparison of the benchmark's table of axes -> claim, the paper's number
COMPARED = {
    "best local - best target": ("C5: the best local score is ahead of the best target score", "+8.0, +6.6, +10.1"),
    "best local - taylor": ("C6: the best local score is ahead of Taylor saliency", "+37.2, +1.1, +12.2"),
    "best hybrid - best local": (
        "C7: allocating by one axis and ranking by the other is ahead of one axis",
        "+2.0 (VGG)",
    ),
    "best norm and local - magnitude": ("C8: local scores with the norm are ahead of magnitude", "by architecture"),
    "best local - random": ("C9: the best local score is ahead of random channels", "on 3 of 3"),
    "best local - fpgm": ("C9: the best local score is ahead of FPGM", "by architecture"),
    "best local - bn-scale": ("C9: the best local score is ahead of BatchNorm's scales", "by architecture"),
    "best local - chip": ("C9: the best local score is ahead of CHIP", "on 3 of 3"),
}


def pruning_claims(folders: Sequence[str | Path]) -> list[Claim]:
    """Judge C5 to C9 from results of ``tp-twoaxis bench``, network by network.

    Args:
        folders: of results, or of tables that ``tp-twoaxis report`` wrote; their criteria were pruned to equal MACs.

    Returns:
        A claim for each network, treatment and comparison that the results hold. Numbers are differences of areas
        under curves of accuracy, in points, with Student's interval over seeds. "Best" is chosen on the same seeds, so
        that a family of more members has an advantage; the benchmark's own report tells how much.

    Raises:
        TwoAxisError: a folder holds no results.
    """
    axes = [_axes(Path(folder)) for folder in folders]
    return [
        Claim(
            f"{COMPARED[row.comparison][0]} ({row.network}, {row.treatment})",
            COMPARED[row.comparison][1],
            Estimate(row.points, row.low, row.high),
            above=0.0,
            note=f"{row.first} less {row.second}, points of area, {row.seeds} seeds",
        )
        for table in axes
        for row in table.itertuples(index=False)
        if row.comparison in COMPARED
    ]


def _axes(folder: Path) -> pd.DataFrame:
    if (folder / CONFIG).is_file():
        return make_report(folder).axes
    written = folder / "axes.csv"
    if not written.is_file():
        raise TwoAxisError(
            f"{folder}: expected results of `tp-twoaxis bench`, or the axes.csv of a report; got neither"
        )
    return pd.read_csv(written)
