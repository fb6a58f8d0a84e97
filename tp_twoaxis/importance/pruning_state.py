"""What a criterion may look at while it is built: a network at one moment of pruning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from tp_twoaxis.errors import TwoAxisError, check_name
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.given_statistics import check_statistics
from tp_twoaxis.statistics.pooling import Pooling
from tp_twoaxis.statistics.recorder import Positions
from tp_twoaxis.statistics.store import CalibrationStatistics
from tp_twoaxis.statistics.targets import TARGETS

Need = Literal["statistics", "gradients", "consumers", "images", "labels"]
"""``statistics``: those of :func:`~tp_twoaxis.calibrate`; ``gradients``, ``consumers``: what it records besides;
``images``: the model and images; ``labels``: the model and images with labels, for a backward pass that may leave
gradients on the model."""
EXTRAS: tuple[Need, ...] = ("gradients", "consumers")


class MissingInputError(TwoAxisError):
    """A criterion needs something that its state does not have; the criterion's name is put in front."""


@dataclass
class PruningState:
    """A network at one moment of pruning, and what a criterion may look at to rank its channels.

    Attributes:
        model: the network as it is; None where a criterion has to do with statistics or weights alone.
        loader: yields ``(images, labels)`` or images; None where there are none.
        stats: statistics of the network as it is; default they are gathered when first needed.
        target: task variable of statistics that are gathered, as for :func:`~tp_twoaxis.calibrate`.
        layers: layers that are then recorded; default all.
        positions: as for ``calibrate``.
        pooling: as for ``calibrate``.
        max_images: use at most so many; None reads the loader to its end.
        seed: of criteria that draw random numbers.
        progress: show progress bars on stderr.
        removed_outputs: layer -> share of the dense network's output channels that earlier steps removed, in [0, 1);
            empty for the dense network.
        removed_inputs: layer -> the same share of its input channels.

    Raises:
        TwoAxisError: there is no such target.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 4))
        >>> data = [(torch.randn(32, 3, 5, 5), torch.randint(4, (32,)))]
        >>> state = PruningState(net, data, target="correct_logit", layers=["0"], progress=False)
        >>> state.statistics("consumers")
        CalibrationStatistics(1 layers, 32 images, target='correct_logit')
        >>> state.statistics() is state.statistics("consumers")  # gathered once
        True
    """

    model: nn.Module | None = None
    loader: Iterable[Any] | None = None
    stats: CalibrationStatistics | None = None
    target: str | None = "margin"
    layers: Iterable[str] | None = None
    positions: Positions = "auto"
    max_images: int | None = 5000
    seed: int = 0
    progress: bool = True
    removed_outputs: Mapping[str, float] = field(default_factory=dict)
    removed_inputs: Mapping[str, float] = field(default_factory=dict)
    pooling: Pooling = "mean"
    _gathered: list[tuple[float, CalibrationStatistics]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.stats is not None:
            check_statistics(self.stats)
        if self.target is not None:
            check_name("target", self.target, TARGETS, more=" or None")

    def statistics(
        self, *extras: Need, also: Iterable[Need] = (), target: bool = True, enough: int | None = None
    ) -> CalibrationStatistics:
        """Give statistics of the network; the only place that turns needs into ``calibrate()``'s flags.

        Args:
            extras: what they must hold besides: ``"gradients"``, ``"consumers"``.
            also: extras that are gathered if a pass is made anyway, because somebody else needs them.
            target: whether a pass records the task; without, the model need not be a classifier.
            enough: images that suffice; None: all that may be read.

        Raises:
            TwoAxisError: there are no statistics and nothing to gather them from, or those that there are hold less.
        """
        for extra in extras:
            check_name("statistics", extra, EXTRAS)
        flags = "".join(f", {extra}=True" for extra in EXTRAS if extra in extras)
        if self.stats is not None:
            if lacking := [extra for extra in extras if extra not in self.stats.extras]:
                raise MissingInputError(
                    f"expected statistics with {' and '.join(lacking)}, got some without; gather them with "
                    f"calibrate(model, loader{flags}) or tp-twoaxis calibrate --score CRITERION"
                    + (", which need labels" if "gradients" in lacking else "")
                )
            return self.stats
        limits = [limit for limit in (self.max_images, enough) if limit is not None]
        most = min(limits, default=None)
        for limit, gathered in self._gathered:
            recorded = set(extras) <= set(gathered.extras) and (gathered.target or not target or not self.target)
            if recorded and limit >= (math.inf if most is None else most):
                return gathered
        labels = " with labels" if "gradients" in extras else ""
        model, images = self._required(
            f"stats=calibrate(model, loader{flags}), or model=... and loader=...{labels}", self.loader
        )
        wanted = {*extras, *also}
        stats = calibrate(
            model,
            images,
            target=self.target if target else None,
            layers=self.layers,
            positions=self.positions,
            pooling=self.pooling,
            max_images=most,
            gradients="gradients" in wanted,
            consumers="consumers" in wanted,
            progress=self.progress,
        )
        self._gathered.append((math.inf if most is None else most, stats))
        return stats

    def images(self, loader: Iterable[Any] | None = None, *, labels: bool = False) -> tuple[nn.Module, Iterable[Any]]:
        """Give the model and images to run it on.

        Args:
            loader: instead of this state's, if it is not None.
            labels: whether labels are needed, for the message.

        Raises:
            TwoAxisError: either is missing.
        """
        what = "model=... and loader=..." + (" with labels" if labels else "")
        return self._required(what, self.loader if loader is None else loader)

    def like(self, stats: CalibrationStatistics, loader: Iterable[Any] | None = None) -> PruningState:
        """Copy the state so that it gathers statistics as others were: of the same layers, with the same target.

        Args:
            stats: of another state of the network.
            loader: instead of this state's, if it is not None.
        """
        images = self.loader if loader is None else loader
        pooling = next((layer.pooling for layer in stats.layers.values()), self.pooling)
        as_others: dict[str, Any] = {"target": stats.target, "layers": list(stats), "pooling": pooling}
        return replace(self, stats=None, loader=images, _gathered=[], **as_others)

    def after_step(self, outputs: Mapping[str, float], inputs: Mapping[str, float]) -> PruningState:
        """Give the state of the network when channels were removed from it, with nothing gathered yet.

        Args:
            outputs: layer -> share of the dense network's output channels that are gone by now.
            inputs: layer -> the same of its input channels.
        """
        known = self.known_statistics
        state = self if known is None else self.like(known)
        return replace(state, stats=None, removed_outputs=outputs, removed_inputs=inputs, _gathered=[])

    @property
    def known_statistics(self) -> CalibrationStatistics | None:
        """Statistics that are at hand: those given, or the first that were gathered."""
        return self.stats or next((stats for _, stats in self._gathered), None)

    @property
    def is_dense(self) -> bool:
        """Whether no step removed anything yet."""
        return not self.removed_outputs and not self.removed_inputs

    def _required(self, what: str, loader: Iterable[Any] | None) -> tuple[nn.Module, Iterable[Any]]:
        if self.model is None or loader is None:
            raise MissingInputError(f"expected {what}, got neither or only one; pass them")
        return self.model, loader


def iterated_once(loader: Iterable[Any] | None) -> bool:
    """Whether images can be read but once, as from a generator."""
    return isinstance(loader, Iterator)
