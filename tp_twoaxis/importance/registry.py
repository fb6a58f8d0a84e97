"""Every criterion by name: ours, and the baselines to compare with."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance.baselines import FPGMImportance
from tp_twoaxis.importance.groups import root_size
from tp_twoaxis.importance.two_axis import TwoAxisImportance
from tp_twoaxis.scores.registry import SCORES
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.gradients import accumulate_gradients
from tp_twoaxis.statistics.store import CalibrationStatistics

Importance = Callable[[Any], Tensor]


class RandomImportance(tp.importance.Importance):  # type: ignore[misc]
    """Uniform scores in [0, 1) from a generator of its own; the host's class draws from the global one.

    Scores depend on the seed and on the group alone, not on which groups were asked for before.

    Args:
        seed: equal seeds give equal scores.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))
        >>> torch.equal(RandomImportance(seed=1)(group), RandomImportance(seed=1)(group))
        True
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, group: Any) -> Tensor:
        """Draw one number a root channel; [len(group[0].idxs)] float32 on the CPU."""
        # the numbers of the channels are part of the name: a layer that is narrower in a later step is drawn anew
        name = f"{self.seed} {group[0].dep.target.name} {list(map(int, group[0].idxs))}"
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
        return torch.rand(root_size(group), generator=torch.Generator().manual_seed(key))


@dataclass(frozen=True)
class ImportanceEntry:
    """A named criterion.

    Attributes:
        needs: ``"stats"``: calibration statistics (or a model and a loader to make them); ``"labels"``: a model
            and a loader with labels, for a backward pass; ``"none"``: weights alone.
        summary: what it is, in one line.
        build: makes the importance; of ``"stats"`` entries from the statistics, of ``random`` from the seed.
    """

    needs: Literal["stats", "labels", "none"]
    summary: str
    build: Callable[..., Importance]


def _ours(name: str) -> ImportanceEntry:
    # minus an overlap is below 0, which a division by the mean would turn around
    normalizer = "standarization" if name == "low-overlap" else "mean"
    build = partial(TwoAxisImportance, score=name, normalizer=normalizer)
    return ImportanceEntry("stats", f"{SCORES[name].summary} ({SCORES[name].axis} axis)", build)


IMPORTANCES: dict[str, ImportanceEntry] = {name: _ours(name) for name in SCORES} | {
    "l1": ImportanceEntry("none", "L1 norm of the group's weights", partial(tp.importance.MagnitudeImportance, p=1)),
    "l2": ImportanceEntry(
        "none", "squared L2 norm of the group's weights", partial(tp.importance.MagnitudeImportance, p=2)
    ),
    "taylor": ImportanceEntry("labels", "first-order Taylor expansion of the loss", tp.importance.TaylorImportance),
    "fpgm": ImportanceEntry("none", "summed distance to the layer's other filters (He et al. 2019)", FPGMImportance),
    "random": ImportanceEntry("none", "uniform random numbers, fixed by the seed", RandomImportance),
    "bn-scale": ImportanceEntry(
        "none", "BatchNorm's scale (Liu et al. 2017); groups without one stay whole", tp.importance.BNScaleImportance
    ),
    "lamp": ImportanceEntry(
        "none", "layer-adaptive magnitude (Lee et al. 2021), by channel", tp.importance.LAMPImportance
    ),
}


def find_importance(name: str) -> ImportanceEntry:
    """Look a criterion up without building it.

    Args:
        name: one of :data:`IMPORTANCES`.

    Raises:
        TwoAxisError: no such criterion; the message lists all names and those near it.

    Example:
        >>> find_importance("taylor").needs
        'labels'
    """
    if name not in IMPORTANCES:
        near = difflib.get_close_matches(name, IMPORTANCES, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; choose one of them"
        raise TwoAxisError(f"score: expected one of {', '.join(IMPORTANCES)}, got {name!r}{hint}")
    return IMPORTANCES[name]


def make_importance(
    name: str,
    *,
    stats: CalibrationStatistics | None = None,
    model: nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Importance:
    """Build any criterion, ready to be handed to Torch-Pruning or :func:`~tp_twoaxis.prune_to_flops`.

    ``taylor`` runs a backward pass over the loader and **leaves the gradients on the model**, where the host
    reads them at every call; call ``model.zero_grad()`` once the model is pruned.

    Args:
        name: one of :data:`IMPORTANCES`.
        stats: calibration statistics, for entries that need them; without, they are gathered here from
            ``model`` and ``loader`` (at most 5,000 images).
        model: the model to prune.
        loader: yields ``(images, labels)``.
        seed: of ``random``; the others do not use it.
        progress: show progress bars on stderr.

    Returns:
        A Torch-Pruning importance: group -> one score a root channel, larger keeps.

    Raises:
        TwoAxisError: the name is unknown, or what the criterion needs is not given.

    Example:
        >>> type(make_importance("l1")).__name__
        'MagnitudeImportance'
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
        >>> make_importance("capture", model=net, loader=[torch.randn(64, 8)], progress=False)
        TwoAxisImportance(score='capture', normalizer='mean')
    """
    entry = find_importance(name)
    if entry.needs == "stats":
        if stats is None:
            network, images = _required(
                name, model, loader, "stats=calibrate(model, loader), or model=... and loader=..."
            )
            stats = calibrate(network, images, progress=progress)
        return entry.build(stats)
    if entry.needs == "labels":
        network, images = _required(name, model, loader, "model=... and loader=... with labels")
        accumulate_gradients(network, images, progress=progress)
    return entry.build(seed=seed) if entry.build is RandomImportance else entry.build()


def _required(
    name: str, model: nn.Module | None, loader: Iterable[Any] | None, what: str
) -> tuple[nn.Module, Iterable[Any]]:
    if model is None or loader is None:
        raise TwoAxisError(f"importance {name!r}: expected {what}, got neither or only one; pass them")
    return model, loader
