"""The table of repairs: what each contains, what it needs and the function that does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.known_names import parse_repair
from tp_twoaxis.repair.batch_norm import batch_norms, reestimate_batch_norm
from tp_twoaxis.repair.distillation import distill
from tp_twoaxis.repair.one_shot import reconstruct_channels, refit_patches
from tp_twoaxis.repair.repair_task import Outcome, RepairTask
from tp_twoaxis.repair.sequential import refit_sequentially
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.statistics.store import CalibrationStatistics

Need = Literal["images", "consumer statistics", "batch norm"]


@dataclass(frozen=True)
class RepairStrategy:
    """A row of :data:`REPAIRS`.

    Attributes:
        name: as users give it.
        summary: one line for users.
        run: does it; returns the outcome for each consumer of removed channels that it tried to refit.
        needs: ``images`` to run on; ``consumer statistics``, which come from images where none are given;
            ``batch norm``: the model has BatchNorm, otherwise the repair is dropped.
        contains: repairs that are superfluous beside it, because it does all that they do.
        start: the repair among these whose weights it starts from, and which stay where it cannot refit a layer.
        start_images: so many images suffice for the statistics of that start; None: all.
        refits: whether it changes weights.
        renews_norms: whether it estimates BatchNorm statistics anew.
        trains: whether it takes many steps by gradients; tables keep it apart from repairs that do not.
    """

    name: str
    summary: str
    run: Callable[[RepairTask], dict[str, Outcome]]
    needs: tuple[Need, ...]
    contains: tuple[str, ...] = ()
    start: str | None = None
    start_images: int | None = None
    refits: bool = True
    renews_norms: bool = False
    trains: bool = False


def _run_batch_norm(task: RepairTask) -> dict[str, Outcome]:
    assert task.images is not None
    images = task.images
    reestimate_batch_norm(task.network, images.loader, max_images=images.max_images, progress=images.progress)
    return {}


# a sequential repair starts from ridge and goes far from it; statistics of so many images suffice for that
_START_IMAGES = 128
_STATISTICS: tuple[Need, ...] = ("consumer statistics",)
_ALL: tuple[Need, ...] = ("consumer statistics", "images")

_TABLE = (
    RepairStrategy(
        "bn",
        "re-estimate BatchNorm statistics",
        _run_batch_norm,
        ("images", "batch norm"),
        refits=False,
        renews_norms=True,
    ),
    RepairStrategy(
        "bias",
        "absorb the removed channels' means into biases",
        partial(reconstruct_channels, means_only=True),
        _STATISTICS,
    ),
    RepairStrategy(
        "ridge",
        "absorb the best affine prediction of removed channels from kept ones",
        reconstruct_channels,
        _STATISTICS,
        contains=("bias",),
    ),
    RepairStrategy(
        "patch",
        "refit each consumer by least squares over whole patches",
        refit_patches,
        _ALL,
        contains=("bias", "ridge"),
        start="ridge",
    ),
    RepairStrategy(
        "sequential",
        "refit all layers in forward order, BatchNorm included",
        refit_sequentially,
        _ALL,
        contains=("bias", "ridge", "patch"),
        start="ridge",
        start_images=_START_IMAGES,
        renews_norms=True,
    ),
    RepairStrategy(
        "joint",
        "as sequential, and reconstruct layers jointly with the one before",
        partial(refit_sequentially, joint=True),
        _ALL,
        contains=("bias", "ridge", "patch", "sequential"),
        start="ridge",
        start_images=_START_IMAGES,
        renews_norms=True,
    ),
    RepairStrategy(
        "distill",
        "as joint, then train without labels towards the dense network's features",
        distill,
        _ALL,
        contains=("bias", "ridge", "patch", "sequential", "joint"),
        start="joint",
        renews_norms=True,
        trains=True,
    ),
)
REPAIRS: dict[str, RepairStrategy] = {strategy.name: strategy for strategy in _TABLE}
"""All repairs by name."""


def refits(repairs: Iterable[str]) -> bool:
    """Whether any of these repairs changes weights, and so depends on what layers read.

    Example:
        >>> refits(("ridge", "bn")), refits(("bn",)), refits(())
        (True, False, False)
    """
    return any(REPAIRS[name].refits for name in repairs)


def check_repair(
    repair: str | Iterable[str],
    model: nn.Module,
    loader: Iterable[Any] | None,
    stats: CalibrationStatistics | None = None,
) -> tuple[str, ...]:
    """Check a repair request before anything is removed.

    Args:
        repair: as :func:`parse_repair` reads it.
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
    has_norms = bool(batch_norms(unwrap(model)))
    names = tuple(name for name in parse_repair(repair) if has_norms or "batch norm" not in REPAIRS[name].needs)
    if loader is None:
        for name in names:
            if "images" in REPAIRS[name].needs:
                raise TwoAxisError(
                    f"repair {name!r} needs images: pass loader=..., or repair=() to leave the network unrepaired"
                )
        if names and (stats is None or not stats.consumers):
            raise TwoAxisError(
                f"repair {names[-1]!r} needs to know what each layer reads: pass stats=calibrate(model, loader, "
                "consumers=True), or loader=..."
            )
    if isinstance(loader, Iterator) and refits(names):
        first = next(name for name in names if REPAIRS[name].refits)
        raise TwoAxisError(
            f"repair {first!r} reads the images more than once: expected a list or a DataLoader, got "
            f"{type(loader).__name__}; pass list(loader)"
        )
    return names


def stages_of(repairs: Iterable[str]) -> list[RepairStrategy]:
    """Arrange repairs to run: those that no other contains, each after its start; weights before BatchNorm statistics.

    Example:
        >>> [stage.name for stage in stages_of(("bn", "bias", "joint"))]
        ['ridge', 'joint', 'bn']
    """
    wanted = set(repairs)
    contained = {inner for name in wanted for inner in REPAIRS[name].contains}
    last = [strategy for strategy in REPAIRS.values() if strategy.name in wanted - contained]
    stages: dict[str, RepairStrategy] = {}
    for strategy in sorted(last, key=lambda strategy: not strategy.refits):
        chain = [strategy]
        while (start := chain[0].start) is not None:
            chain.insert(0, REPAIRS[start])
        stages |= {stage.name: stage for stage in chain}
    return list(stages.values())


def without_training(repairs: Iterable[str]) -> tuple[str, ...]:
    """Put in the place of repairs that train those that they start from.

    Example:
        >>> without_training(("distill", "bn"))
        ('joint', 'bn')
    """
    return tuple(str(REPAIRS[name].start) if REPAIRS[name].trains else name for name in repairs)
