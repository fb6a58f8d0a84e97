"""Repair-aware selection: how far the logits move when a group's weakest channels leave and are repaired, per MAC."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, partial
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from tp_twoaxis.dependency.flops import count_macs
from tp_twoaxis.dependency.groups import Member, group_consumers, members, model_of, root_layer, root_size
from tp_twoaxis.errors import StaleStatisticsError, TwoAxisError, check_name
from tp_twoaxis.importance.constant_channels import rank_first
from tp_twoaxis.importance.distortion import Distortion, Patches
from tp_twoaxis.importance.pruning_state import PruningState
from tp_twoaxis.importance.two_axis import TwoAxisImportance
from tp_twoaxis.reconstruction.greedy import Reading, greedy_reconstruction
from tp_twoaxis.runtime.layers import CHANNEL_LAYERS, in_channels_of, out_channels_of
from tp_twoaxis.statistics.store import CalibrationStatistics

Cost = Literal["macs", "channels"]
RECONSTRUCTION = "reconstruction"
# rise of the scores over a group, beside their mean, where all slopes agree: the order stays that of the ranking
TIE = 1e-3


class AnticipatingImportance(tp.importance.Importance):  # type: ignore[misc]
    """Channels go first where the repaired network is least distorted for the MACs that they free.

    For each group, the channels are put in order by a score of the local axis (or by the consumers' reconstruction
    losses, ``"reconstruction"``). Then the dense network is run on a few images, without labels, while the first
    eighth, two eighths, ... of that order are missing and each consumer is fitted to those that remain, as ``patch``
    repair would fit it (where patches are too large, as ``ridge`` would): a curve of the logits' distortion. The
    importance is the curve's slope, made monotone by its lower convex hull, over the MACs that a channel frees. So a
    global threshold takes the next channel where it costs least for each MAC saved, as far as groups do not depend on
    each other.

    That is a normalisation between layers that is measured instead of chosen. Others were tried on two CIFAR-10
    ResNet-20s (conv shortcuts / option A) with half the MACs and ``sequential`` repair, accuracy in % on 2,000 training
    images held out of calibration (``benchmarks/anticipation.py``, one seed, so +-1):

    ==================================================================  ===========
    greedy reconstruction losses against each other as they are         71.8 / 75.3
    ... over their layer's mean                                         82.3 / 88.9
    hull, which does not anticipate, over its layer's mean              86.1 / 88.3
    losses by noise of a tenth of the outputs' power, over MACs         88.4 / 84.8
    ... of a hundredth                                                  89.5 / 85.0
    measured curves over MACs, order by hull                            89.2 / 90.0
    ... by reconstruction                                               89.8 / 91.0
    ==================================================================  ===========

    Losses as they are, relative to the consumers' outputs, empty the last blocks: a layer's relative error says
    nothing of what the network makes of it. Weights by noise measure that: how far do the predicted classes
    diverge when a consumer's outputs are disturbed? In the limit of little noise that is Fisher information. Such
    weights empty single blocks too (7 of 64 channels stay), presumably because noise is independent over pixels and
    consumers, as the errors of a reconstruction are not. A curve is measured with those very errors.

    The table has order and curves from reconstruction at channel level. With those from whole patches, which it takes,
    ``sequential`` keeps as much on test images: 86.3 / 86.3 % at half the MACs against 86.0 / 86.4, 80.0 / 80.6 against
    79.4 / 80.9 at 35 % (``benchmarks/results/cifar10_repair``, two seeds). They were chosen on held-out training
    images, where they were 0.3 to 0.8 points better, and more than that on one of the networks with ``joint``.

    Cost: ``levels`` passes over ``images`` for each group and one for the patches, once for all shares. It pays where
    forward passes are cheap; for large networks on a CPU take fewer of both, or ``hull``.

    Args:
        stats: from ``calibrate(consumers=True)``.
        ranking: the order inside groups: a score's name, or ``"reconstruction"``, which is
            :func:`~tp_twoaxis.reconstruction.greedy.greedy_reconstruction` (and ``capture`` where nothing but
            ``nn.MultiheadAttention`` reads a group). Of heads that lose channels it sees the values, not the queries.
        loader: yields ``(images, labels)`` or images; labels are not used. None: those of ``prune_to_flops``.
        model: the dense model; copied. Default that of the first group that is ranked.
        cost: what a channel's slope is divided by: ``"macs"``, or ``"channels"`` for pruners that count channels.
        levels: points of each curve; each takes one pass over the images.
        images: how many to measure on.
        max_images: no more than that either.
        progress: show progress bars on stderr.

    Raises:
        TwoAxisError: here, a bad argument, no images, or statistics without inputs; on a call, see
            :class:`~tp_twoaxis.importance.two_axis.TwoAxisImportance`.
        StaleStatisticsError: on a call: the model was pruned or trained after calibration.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        >>> loader = [torch.randn(32, 3, 8, 8)]
        >>> stats = calibrate(net, loader, target=None, consumers=True, progress=False)
        >>> importance = AnticipatingImportance(stats, loader=loader, progress=False)
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> importance(graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))).shape
        torch.Size([8])
    """

    own_channels_only = True
    """With this :func:`~tp_twoaxis.prune_to_flops` ranks a group's own channels where they share their root layer with
    another group: both could not be missing alone."""

    def __init__(
        self,
        stats: CalibrationStatistics,
        ranking: str = RECONSTRUCTION,
        *,
        loader: Iterable[Any] | None = None,
        model: nn.Module | None = None,
        cost: Cost = "macs",
        levels: int = 8,
        images: int = 512,
        max_images: int | None = None,
        progress: bool = True,
    ) -> None:
        check_name("cost", cost, get_args(Cost))
        if levels < 1 or images < 2:
            raise TwoAxisError(f"anticipating: expected levels >= 1 and images >= 2, got {levels} and {images}")
        if not stats.consumers:
            raise TwoAxisError(
                "anticipating: expected statistics of what layers read, got some without; gather them with "
                "calibrate(model, loader, consumers=True)"
            )
        self.stats = stats
        self.ranking = ranking
        self.loader = loader
        self.cost = cost
        self.levels = levels
        self.images = images
        self.max_images = max_images
        self.progress = progress
        # a producer's score also checks that the statistics are of the model as it is
        self._ranked = TwoAxisImportance(stats, "capture" if ranking == RECONSTRUCTION else ranking)
        self._measured_on: Distortion | None = None
        if model is not None and loader is not None:
            self._measure_on(model)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(ranking={self.ranking!r}, cost={self.cost!r}, levels={self.levels})"

    def _measure_on(self, model: nn.Module) -> Distortion:
        """Copy the model and read the images, once."""
        if self.loader is None:
            raise TwoAxisError("anticipating: expected loader=... with images to measure on, got none; pass it")
        if self._measured_on is None:
            self._measured_on = Distortion(
                model,
                self.stats,
                self.loader,
                images=self.images,
                max_images=self.max_images,
                progress=self.progress,
            )
        return self._measured_on

    @property
    def _distortion(self) -> Distortion:
        assert self._measured_on is not None
        return self._measured_on

    @property
    def is_ready(self) -> bool:
        """Whether it has images; if not, :func:`~tp_twoaxis.prune_to_flops` measures on those of its loader."""
        return self.loader is not None

    def build(self, state: PruningState) -> AnticipatingImportance:
        """Make the importance for a network as it is now, measured on that; this one stays as it is."""
        model, loader = state.images(self.loader)
        extras = {"consumers", *self.stats.extras}
        return AnticipatingImportance(
            self.stats if state.is_dense else state.like(self.stats, loader).statistics(*extras),
            self.ranking,
            loader=loader,
            model=model,
            cost=self.cost,
            levels=self.levels,
            images=self.images,
            max_images=state.max_images,
            progress=state.progress,
        )

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Rank a group's root channels.

        Args:
            group: a ``torch_pruning`` group, full or partial.

        Returns:
            [len(group[0].idxs)] float32 on the CPU, finite, not negative; None for a group without consumers.
        """
        try:
            ranks = self._ranked(group)
        except StaleStatisticsError as error:
            raise StaleStatisticsError(
                f"{str(error).partition(';')[0]}; remove channels in steps with prune_to_flops(steps=...), or call "
                "calibrate(consumers=True) again and make another importance"
            ) from error
        consumers = [*group_consumers(group), *_attention(group)]
        if ranks is None or not consumers:
            return None
        self._measure_on(model_of(group))
        names = {module: name for name, module in model_of(group).named_modules()}
        measure = partial(self._measure, group, consumers, names, ranks)
        order, counts, distortions = self._distortion.once(self._key(group, names), measure)
        scores = torch.empty(len(order), dtype=torch.float64)
        scores[order] = slopes_of(counts, distortions, len(order)) / self._price(group, names)
        constant = self.constant_channels(group)
        return (rank_first(scores, constant) if bool(constant.any()) else scores).float()

    def constant_channels(self, group: Any) -> Tensor:
        """Find the root channels that are constant in all layers that write them, [len(group[0].idxs)] bool."""
        return self._ranked.constant_channels(group)

    def curve(self, group: Any) -> tuple[list[int], list[float]]:
        """Return what was measured for a group: numbers of missing channels, and the logits' distortion at each.

        Raises:
            TwoAxisError: the group was not ranked yet.
        """
        names = {module: name for name, module in model_of(group).named_modules()}
        key = self._key(group, names)

        def missing() -> Any:
            raise TwoAxisError(f"{key[0]}: expected a group that was ranked before, got a new one; call it first")

        _, counts, distortions = missing() if self._measured_on is None else self._distortion.once(key, missing)
        return list(counts), list(distortions)

    def _key(self, group: Any, names: dict[nn.Module, str]) -> tuple[Any, ...]:
        """Key of a group's measurement: its root layer first."""
        return names[root_layer(group)], tuple(group[0].idxs), self.ranking, self.levels

    def _measure(
        self, group: Any, consumers: list[Member], names: dict[nn.Module, str], ranks: Tensor
    ) -> tuple[Tensor, list[int], list[float]]:
        """Return a group's channels [size] in order of leaving, and its curve: how many are missing, the distortion."""
        size = root_size(group)
        order = ranks.double().argsort(stable=True)
        patches = self._distortion.patches(names[member.module] for member in consumers)
        mixing = [m for m in consumers if not isinstance(m.module, nn.MultiheadAttention)]
        if self.ranking == RECONSTRUCTION and mixing:
            order, _ = greedy_reconstruction([self._reading(member, names, patches) for member in mixing], size)
        counts = sorted({0, *(round(level * size / self.levels) for level in range(1, self.levels)), max(size - 1, 0)})
        distortions = []
        for count in counts:
            gone = torch.zeros(size, dtype=torch.bool)
            gone[order[:count]] = True
            missing: dict[str, Tensor] = {}
            for member in consumers:
                inputs = torch.zeros(in_channels_of(member.module), dtype=torch.bool)
                inputs[member.channels[gone[member.roots]]] = True
                name = names[member.module]
                missing[name] = inputs | missing.get(name, torch.zeros_like(inputs))
            distortions.append(self._distortion(missing, patches) if count else 0.0)
        return order, counts, distortions

    def _reading(self, member: Member, names: dict[nn.Module, str], patches: dict[str, Patches]) -> Reading:
        name = names[member.module]
        entry = self.stats[name]
        power = float(entry.variance.sum())
        power = power if power > 0 else 1.0
        weight = self._distortion.layers[name].weight
        assert isinstance(weight, Tensor)
        weight = weight.detach().cpu().double()
        if name in patches:
            flat, own = weight.flatten(1), patches[name].fitted[1]
            return Reading(own, flat, member.channels, member.roots, power, flat.shape[1] // weight.shape[1])
        if isinstance(member.module, _ConvTransposeNd) and member.module.groups == 1:
            weight = weight.transpose(0, 1)
        taps = weight.reshape(len(weight), weight.shape[1], -1).transpose(1, 2)  # [O, taps, I]
        inputs = in_channels_of(member.module)
        if taps.shape[2] < inputs:  # each block of outputs reads its own inputs
            blocks = inputs // taps.shape[2]
            apart = torch.zeros(blocks, taps.shape[0] * taps.shape[1] // blocks, blocks, taps.shape[2]).to(taps)
            apart[torch.arange(blocks), :, torch.arange(blocks)] = taps.reshape(blocks, -1, taps.shape[2])
            taps = apart
        return Reading(entry.input_covariance, taps.reshape(-1, inputs), member.channels, member.roots, power)

    def _price(self, group: Any, names: dict[nn.Module, str]) -> float:
        """Share of the dense network's MACs that goes with a root channel, on average; 1 where channels count."""
        if self.cost == "channels":
            return 1.0
        macs, total = self._macs
        freed = 0.0
        for member in members(group):
            share = macs.get(names.get(member.module, ""), 0) / total
            if share and isinstance(member.module, CHANNEL_LAYERS):
                width = out_channels_of(member.module) if member.is_producer else in_channels_of(member.module)
                freed += share * len(member.channels) / width
        return max(freed / root_size(group), 1e-12)

    @cached_property
    def _macs(self) -> tuple[dict[str, float], float]:
        def count() -> tuple[dict[str, float], float]:
            counted = count_macs(self._distortion.network, self._distortion.example)
            return dict(counted.by_module), float(max(counted.total, 1))

        macs: tuple[dict[str, float], float] = self._distortion.once("macs", count)
        return macs


def slopes_of(counts: list[int], values: list[float], size: int) -> Tensor:
    """Slope of a curve at each of its steps, never falling.

    The curve is made non-decreasing, then convex from below; its slopes hold at the middle of their segments and are
    interpolated in between.

    Args:
        counts: where the curve was measured, ascending from 0.
        values: what was measured there.
        size: steps; those beyond the last count have its slope.

    Returns:
        [size] float64, ascending, also where all slopes agree (a thousandth of their mean over the whole group).

    Example:
        >>> slopes_of([0, 2, 4], [0.0, 2.0, 6.0], 4).round(decimals=2).tolist()
        [1.0, 1.25, 1.75, 2.0]
    """
    x, y = np.asarray(counts, dtype=np.float64), np.maximum.accumulate(np.asarray(values, dtype=np.float64))
    hull = [0]
    for i in range(1, len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    if len(hull) < 2:
        return torch.zeros(size, dtype=torch.float64)
    x, y = x[hull], y[hull]
    slopes = np.interp(np.arange(size) + 0.5, (x[1:] + x[:-1]) / 2, np.diff(y) / np.diff(x))
    return torch.from_numpy(slopes + TIE * slopes.mean() * np.arange(size) / size)


def _attention(group: Any) -> list[Member]:
    """Find attention that reads a group's channels inside its own module."""
    return [m for m in members(group) if m.is_consumer and isinstance(m.module, nn.MultiheadAttention)]
