"""The same criterion, one step of pruning later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.importance.entry import Importance
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.store import CalibrationStatistics


@dataclass(frozen=True)
class Interim:
    """A network between two steps of pruning, and the images to look at it with.

    Attributes:
        model: what is left of the network, repaired.
        loader: yields ``(images, labels)`` or images; None where there is none.
        max_images: use at most so many; None reads the loader to its end.
        progress: show progress bars.
        written: layer -> share of the channels that it wrote in the dense network and that are gone, in [0, 1).
        read: layer -> likewise of the channels that it read.
    """

    model: nn.Module
    loader: Iterable[Any] | None = None
    max_images: int | None = 5000
    progress: bool = True
    written: Mapping[str, float] = field(default_factory=dict)
    read: Mapping[str, float] = field(default_factory=dict)

    def images(self) -> Iterable[Any]:
        """Give the loader.

        Raises:
            TwoAxisError: there is none.
        """
        if self.loader is None:
            raise TwoAxisError("statistics are gathered anew after each step: expected loader=..., got none; pass it")
        return self.loader

    def recalibrated(
        self,
        stats: CalibrationStatistics,
        *,
        gradients: bool,
        consumers: bool,
        loader: Iterable[Any] | None = None,
    ) -> CalibrationStatistics:
        """Gather statistics like others, of the model as it is: the same layers and target.

        Args:
            stats: of an earlier state of the model.
            gradients: see :func:`~tp_twoaxis.calibrate`.
            consumers: likewise.
            loader: instead of this interim's.

        Example:
            >>> import torch
            >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 4))
            >>> data = [(torch.randn(32, 3, 5, 5), torch.randint(4, (32,)))]
            >>> stats = calibrate(net, data, target="correct_logit", layers=["0"], progress=False)
            >>> Interim(net, data, progress=False).recalibrated(stats, gradients=False, consumers=False)
            CalibrationStatistics(1 layers, 32 images, target='correct_logit')
        """
        return calibrate(
            self.model,
            self.images() if loader is None else loader,
            target=stats.target,
            layers=stats,
            max_images=self.max_images,
            gradients=gradients,
            consumers=consumers,
            progress=self.progress,
        )


def renewed(importance: Importance, interim: Interim) -> Importance:
    """Give an importance that holds for the network as it is now.

    An importance with a method ``renewed(interim)`` is asked for what takes its place: ours return a copy with new
    statistics and leave themselves as they were. Any other is called again as it is, as the host's pruners do.

    Example:
        >>> from tp_twoaxis.importance.weight_baselines import RandomImportance
        >>> importance = RandomImportance(seed=1)
        >>> renewed(importance, Interim(nn.Linear(2, 2))) is importance
        True
    """
    method: Callable[[Interim], Importance] | None = getattr(importance, "renewed", None)
    return importance if method is None else method(interim)


def told(importance: Importance, interim: Interim) -> Importance:
    """Tell a new importance what earlier steps removed, if it has a method ``told(interim)`` to ask for it."""
    method: Callable[[Interim], Importance] | None = getattr(importance, "told", None)
    return importance if method is None else method(interim)


class RebuiltImportance:
    """An importance that is built anew after every step of pruning, as one given by name is.

    Args:
        importance: of the first step.
        build: makes the next one for the network as it is then; see :func:`told`.

    Example:
        >>> import torch
        >>> first = RebuiltImportance(lambda group: torch.zeros(2), lambda interim: lambda group: torch.ones(2))
        >>> first(None), renewed(first, Interim(nn.Linear(2, 2)))(None)
        (tensor([0., 0.]), tensor([1., 1.]))
    """

    def __init__(self, importance: Importance, build: Callable[[Interim], Importance]) -> None:
        self.importance = importance
        self.build = build
        self.own_channels_only = getattr(importance, "own_channels_only", False)

    def __call__(self, group: Any) -> Any:
        """Rank a group as the importance of this step does."""
        return self.importance(group)

    def renewed(self, interim: Interim) -> RebuiltImportance:
        """Build the next step's."""
        return RebuiltImportance(self.build(interim), self.build)
