"""Repair-aware selection: how far the logits move when a group's weakest channels leave and are repaired, per MAC."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from tp_twoaxis.dependency.groups import Member, group_consumers, members, model_of, root_layer, root_size
from tp_twoaxis.errors import StaleStatisticsError, TwoAxisError, check_name
from tp_twoaxis.importance.constant_channels import rank_first
from tp_twoaxis.importance.curve_measurement import RemovalOrder, measure_curves
from tp_twoaxis.importance.distortion import Distortion
from tp_twoaxis.importance.distortion_curves import DistortionCurve, DistortionCurves
from tp_twoaxis.importance.pruning_state import PruningState
from tp_twoaxis.importance.two_axis import TwoAxisImportance
from tp_twoaxis.reconstruction.greedy import Reading, greedy_reconstruction
from tp_twoaxis.reconstruction.patch_removal import Patches
from tp_twoaxis.runtime.layers import CHANNEL_LAYERS, in_channels_of, out_channels_of
from tp_twoaxis.statistics.store import CalibrationStatistics

Cost = Literal["macs", "channels"]
RECONSTRUCTION = "reconstruction"
# images of the statistics, which tell constant channels, and serve where patches are too wide to be fitted
ENOUGH_IMAGES = 256


class AnticipatingImportance(tp.importance.Importance):  # type: ignore[misc]
    """Channels go first where the repaired network is least distorted for the MACs that they free.

    For each group, the channels are put in order by a score of the local axis (or by the consumers' reconstruction
    losses, ``"reconstruction"``). Then the dense network is run on a few images, without labels, while the first
    quarter, two quarters, ... of that order are missing and each consumer is fitted to those that remain, as ``patch``
    repair would fit it (where patches have more than 2,048 numbers, as ``ridge`` would): a curve of the logits'
    distortion, kept in :attr:`curves`. The importance is the curve's slope, made monotone by its lower convex hull,
    over the MACs that a channel frees. So a global threshold takes the next channel where it costs least for each MAC
    saved, as far as groups do not depend on each other.

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

    The table has order and curves from reconstruction at channel level, with eight points each over up to 512 images.
    It takes those from whole patches, which were chosen on held-out training images; what they keep with each repair is
    in ``benchmarks/results/cifar10_repair``.

    Cost, once for all shares: a pass over the images that are fitted, for the patches of all layers; for each group
    and each of ``levels`` points, the part of the network from the group's first consumer on, over 32 images, or 16
    where ``passes`` allow no more; and linear algebra, cubic in a layer's width.
    :func:`~tp_twoaxis.prune_to_flops` has the curves of all groups measured together: then more images, 128 at most,
    are added only while two halves of them disagree about the groups' widths, up to ``passes`` in all
    (:func:`~tp_twoaxis.importance.curve_measurement.measure_curves`). Groups that are ranked one by one take all
    ``images``.

    Args:
        stats: from ``calibrate(consumers=True)``.
        ranking: the order inside groups: a score's name, or ``"reconstruction"``, which is
            :func:`~tp_twoaxis.reconstruction.greedy.greedy_reconstruction` (and ``capture`` where nothing but
            ``nn.MultiheadAttention`` reads a group). Of heads that lose channels it sees the values, not the queries.
        loader: yields ``(images, labels)`` or images; labels are not used. None: those of ``prune_to_flops``.
        model: the dense model; copied. Default that of the first group that is ranked.
        cost: what a channel's slope is divided by: ``"macs"``, or ``"channels"`` for pruners that count channels.
        levels: points of each curve.
        images: how many to measure on at most; up to three times as many others are read for the fits.
        passes: bound on the cost of the curves, in passes of one image through the whole network.
        max_images: read no more than that.
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
        levels: int = 4,
        images: int = 128,
        passes: float = 2000,
        max_images: int | None = None,
        progress: bool = True,
    ) -> None:
        check_name("cost", cost, get_args(Cost))
        if levels < 1 or images < 2 or not passes > 0:
            raise TwoAxisError(
                f"anticipating: expected levels >= 1, images >= 2 and passes > 0, got {levels}, {images} and {passes}"
            )
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
        self.passes = passes
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
    def per_macs(self) -> bool:
        """Whether scores are per MAC: under another budget groups are then compared by what that counts instead."""
        return self.cost == "macs"

    @property
    def is_ready(self) -> bool:
        """Whether it has images; if not, :func:`~tp_twoaxis.prune_to_flops` measures on those of its loader."""
        return self.loader is not None

    def build(self, state: PruningState) -> AnticipatingImportance:
        """Make the importance for a network as it is now, measured on that; this one stays as it is."""
        model, loader = state.images(self.loader)
        extras = {"consumers", *self.stats.extras}
        return AnticipatingImportance(
            self.stats if state.is_dense else state.like(self.stats, loader).statistics(*extras, enough=ENOUGH_IMAGES),
            self.ranking,
            loader=loader,
            model=model,
            cost=self.cost,
            levels=self.levels,
            images=self.images,
            passes=self.passes,
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
        ranks, consumers = self._ranks(group), _consumers(group)
        if ranks is None or not consumers:
            return None
        self._measure_on(model_of(group))
        key = self._key(group)
        if key not in self._distortion.known:
            self._measure([(group, ranks)])
        order, curve = self._distortion.known[key]
        scores = torch.empty(order.size, dtype=torch.float64)
        scores[order.order] = curve.slopes() / self._cost(order.macs)
        constant = self.constant_channels(group)
        return (rank_first(scores, constant) if bool(constant.any()) else scores).float()

    def prepare_groups(self, groups: list[Any]) -> None:
        """Measure the curves of groups that will be ranked together, which takes fewer images than one by one.

        Args:
            groups: of ``torch_pruning``, full or partial, all of one model.
        """
        wanted = []
        for group in groups:
            ranks = self._ranks(group)
            if ranks is not None and _consumers(group):
                distortion = self._measure_on(model_of(group))
                if self._key(group) not in distortion.known:
                    wanted.append((group, ranks))
        if wanted:
            self._measure(wanted)

    def constant_channels(self, group: Any) -> Tensor:
        """Find the root channels that are constant in all layers that write them, [len(group[0].idxs)] bool."""
        return self._ranked.constant_channels(group)

    @property
    def curves(self) -> DistortionCurves:
        """What was measured so far: a curve for each group, in the order of their ranking."""
        known = {} if self._measured_on is None else self._measured_on.known
        return DistortionCurves([curve for _, curve in known.values()])

    def curve(self, group: Any) -> DistortionCurve:
        """Return what was measured for a group.

        Raises:
            TwoAxisError: the group was not ranked yet.
        """
        key = self._key(group)
        if self._measured_on is None or key not in self._measured_on.known:
            raise TwoAxisError(f"{key[0]}: expected a group that was ranked before, got a new one; call it first")
        found: DistortionCurve = self._measured_on.known[key][1]
        return found

    def _ranks(self, group: Any) -> Tensor | None:
        """Rank by the score that orders the group, or would if it could be reconstructed; also checks the model."""
        try:
            return self._ranked(group)
        except StaleStatisticsError as error:
            raise StaleStatisticsError(
                f"{str(error).partition(';')[0]}; remove channels in steps with prune_to_flops(steps=...), or call "
                "calibrate(consumers=True) again and make another importance"
            ) from error

    def _key(self, group: Any) -> tuple[Any, ...]:
        """Key of a group's measurement: its root layer first."""
        names = {module: name for name, module in model_of(group).named_modules()}
        return names[root_layer(group)], tuple(group[0].idxs), self.ranking, self.levels

    def _measure(self, groups: list[tuple[Any, Tensor]]) -> None:
        """Put each group's channels in order, and measure the curves of all."""
        distortion = self._distortion
        names = {module: name for name, module in model_of(groups[0][0]).named_modules()}
        distortion.refits.patches(names[m.module] for group, _ in groups for m in _consumers(group))
        orders = [self._order(group, names, ranks) for group, ranks in groups]
        curves = measure_curves(orders, distortion, levels=self.levels, passes=self.passes)
        distortion.refits.forget()
        for (group, _), order, curve in zip(groups, orders, curves, strict=True):
            distortion.known[self._key(group)] = order, curve

    def _order(self, group: Any, names: dict[nn.Module, str], ranks: Tensor) -> RemovalOrder:
        consumers = _consumers(group)
        order = ranks.double().argsort(stable=True)
        mixing = [m for m in consumers if not isinstance(m.module, nn.MultiheadAttention)]
        if self.ranking == RECONSTRUCTION and mixing:
            patches = self._distortion.refits.patches(names[m.module] for m in mixing)
            order, _ = greedy_reconstruction([self._reading(m, names, patches) for m in mixing], root_size(group))
        inputs: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
        for member in consumers:
            part = member.channels, member.roots, in_channels_of(member.module)
            inputs.setdefault(names[member.module], []).append(part)
        cost = self._cost(self._macs_of_a_channel(group, names))
        return RemovalOrder(names[root_layer(group)], order, inputs, self._layer_shares(group, names), cost)

    def _reading(self, member: Member, names: dict[nn.Module, str], patches: Mapping[str, Patches]) -> Reading:
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

    def _macs_of_a_channel(self, group: Any, names: dict[nn.Module, str]) -> float:
        """Share of the dense network's MACs that goes with a root channel, on average."""
        return sum(share * sum(parts) for share, parts in self._layer_shares(group, names)) / root_size(group)

    def _layer_shares(self, group: Any, names: dict[nn.Module, str]) -> tuple[tuple[float, tuple[float, ...]], ...]:
        """Give each layer's share of the dense network's MACs and the parts of its sides that the group holds."""
        counted = self._distortion.macs
        parts: dict[nn.Module, list[float]] = {}
        for member in members(group):
            if isinstance(member.module, CHANNEL_LAYERS):
                width = out_channels_of(member.module) if member.is_producer else in_channels_of(member.module)
                parts.setdefault(member.module, []).append(len(member.channels) / width)
        shares = {module: counted.by_module.get(names.get(module, ""), 0) / max(counted.total, 1) for module in parts}
        return tuple((shares[module], tuple(own)) for module, own in parts.items() if shares[module])

    def _cost(self, macs: float) -> float:
        """What a channel's distortion is divided by."""
        return 1.0 if self.cost == "channels" else max(macs, 1e-12)


def _consumers(group: Any) -> list[Member]:
    """Find the layers that read a group's channels, attention that reads them inside its own module included."""
    attention = [m for m in members(group) if m.is_consumer and isinstance(m.module, nn.MultiheadAttention)]
    return [*group_consumers(group), *attention]
