"""Which repairs there are, and what each of them needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from tp_twoaxis.borrow import unwrap
from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.pruning.repair.batch_norm import batch_norms
from tp_twoaxis.statistics.store import CalibrationStatistics

WEIGHTS = ("bias", "ridge", "patch", "sequential", "joint")
REPAIRS = ("bn", *WEIGHTS)
"""All repairs: ``bn`` re-estimates BatchNorm; of the others each contains the ones before it."""


def check_repair(
    repair: Iterable[str], model: nn.Module, loader: Iterable[Any] | None, stats: CalibrationStatistics | None = None
) -> tuple[str, ...]:
    """Check a repair request before anything is removed.

    Args:
        repair: names, in any order.
        model: the dense model.
        loader: of the images to repair from.
        stats: statistics of the model, if there are any.

    Returns:
        The repairs to run; ``bn`` is dropped for models without BatchNorm.

    Raises:
        TwoAxisError: an unknown repair, or one that needs a loader or statistics of inputs and has none.

    Example:
        >>> check_repair(("bn",), nn.Linear(2, 2), None)
        ()
    """
    wanted = tuple(dict.fromkeys((repair,) if isinstance(repair, str) else repair))
    unknown = [name for name in wanted if name not in REPAIRS]
    if unknown:
        raise TwoAxisError(f"repair: expected any of {', '.join(REPAIRS)} or (), got {unknown[0]!r}")
    if not batch_norms(unwrap(model)):
        wanted = tuple(name for name in wanted if name != "bn")
    folds = [name for name in wanted if name in WEIGHTS]
    if loader is None and folds and set(wanted) <= {"bias", "ridge"}:
        if stats is not None and stats.consumers:
            return wanted
        raise TwoAxisError(
            f"repair {folds[-1]!r} needs to know what each layer reads: pass stats=calibrate(model, loader, "
            "consumers=True), or loader=..."
        )
    if wanted and loader is None:
        raise TwoAxisError(
            f"repair {wanted[0]!r} needs images: pass loader=..., or repair=() to leave the network as cut"
        )
    if folds and isinstance(loader, Iterator):
        raise TwoAxisError(
            f"repair {folds[0]!r} reads the images more than once: expected a list or a DataLoader, got "
            f"{type(loader).__name__}; pass list(loader)"
        )
    return wanted
