"""Criteria of others that look at activations: what the consumers of a channel read.

The tensor is the same for all of them: the input of each convolution or linear layer that reads the group's
channels. It is the value after BatchNorm, activation, addition and pooling, so it is defined alike for plain
chains, residual streams, expansions around a depthwise convolution (its projection reads) and transformer MLPs.
Several consumers of one tensor agree; after a flattening layer a channel's features are averaged. A group without
consumers holds the model's outputs: it is declined, and Torch-Pruning leaves it whole. Channels that are constant there
leave first, whatever their size (:mod:`~tp_twoaxis.importance.constant_channels`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from tp_twoaxis.dependency.groups import Member, group_consumers, model_of, root_name
from tp_twoaxis.errors import TwoAxisError, listing
from tp_twoaxis.importance.base import GatheredImportance, Part
from tp_twoaxis.scores.adjacent import adjacent_information
from tp_twoaxis.statistics.activations import (
    ActivationStatistics,
    AdjacentMoments,
    InputMoments,
    gather_activations,
)
from tp_twoaxis.statistics.nuclear_norms import ChannelIndependence

CHIP_IMAGES = 640
"""Images that CHIP averages over: the five batches of 128 of its authors."""


class ConsumerImportance(GatheredImportance):
    """Base: a score of every channel that a layer reads, from that layer's accumulator."""

    accumulator: ClassVar[type[Any]]
    """Takes in what a layer reads; see :func:`~tp_twoaxis.statistics.activations.gather_activations`."""

    def gather(
        self, model: nn.Module, loader: Iterable[Any], *, max_images: int | None, progress: bool
    ) -> ActivationStatistics[Any]:
        """Accumulate what every layer reads; labels are not used."""
        return gather_activations(model, loader, self.accumulator, max_images=max_images, progress=progress)

    def _parts(self, group: Any) -> list[Part]:
        return [(self._scores(name)[member.channels], member.roots) for name, member in self._recorded(group)]

    def _varying(self, group: Any) -> list[Part]:
        records = self.statistics.records
        return [(records[name].varying[member.channels], member.roots) for name, member in self._recorded(group)]

    def _recorded(self, group: Any) -> list[tuple[str, Member]]:
        """List the consumers that score a group's channels, with their names."""
        names = {module: name for name, module in model_of(group).named_modules()}
        consumers = group_consumers(group)
        records = self.statistics.records
        known = [m for m in consumers if names.get(m.module) in records]
        if consumers and not known:
            raise TwoAxisError(
                f"group of {root_name(group)}: none of the layers that read its channels "
                f"({listing(names[m.module] for m in consumers)}) ran on the calibration images; run the whole model, "
                "or put the layer into ignored_layers"
            )
        return [(names[member.module], member) for member in self._chosen(known, names)]

    def _chosen(self, consumers: list[Member], names: dict[nn.Module, str]) -> list[Member]:
        return consumers

    def _scores(self, name: str) -> Tensor:
        raise NotImplementedError


class ActivationRMSImportance(ConsumerImportance):
    """Root mean square of the value that the consumers read, over images and positions.

    Args:
        statistics: from :meth:`calibrate`.
        group_reduction: over the layers that read a channel: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: Torch-Pruning's names.
        loader: gather anew from it when the statistics are stale, instead of raising.

    Example:
        >>> import torch, torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> importance = ActivationRMSImportance.calibrate(net, [torch.randn(16, 3, 8, 8)], progress=False)
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> importance(graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))).shape
        torch.Size([8])
    """

    accumulator = InputMoments

    def _scores(self, name: str) -> Tensor:
        moments: InputMoments = self.statistics.records[name]
        return moments.root_mean_square


class VBPImportance(ConsumerImportance):
    """Variance-based pruning (Berisha et al. 2025): variance of the value that the consumers read.

    A channel of small variance is nearly its mean, which a bias of the consumer can stand for; that shift of
    the mean is a repair (``bias``), not part of the criterion.

    Args:
        statistics: from :meth:`calibrate`.
        group_reduction: over the layers that read a channel: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: Torch-Pruning's names.
        loader: gather anew from it when the statistics are stale, instead of raising.

    Example:
        >>> import torch, torch_pruning as tp
        >>> net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
        >>> importance = VBPImportance.calibrate(net, [torch.randn(16, 6)], progress=False)
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 6))
        >>> importance(graph.get_pruning_group(net[0], tp.prune_linear_out_channels, list(range(8)))).shape
        torch.Size([8])
    """

    accumulator = InputMoments

    def _scores(self, name: str) -> Tensor:
        moments: InputMoments = self.statistics.records[name]
        return moments.variance


class CHIPImportance(ConsumerImportance):
    """CHIP, channel independence (Sui et al. 2021): drop of the nuclear norm when a channel's map is zeroed.

    For an image the maps that a consumer reads form a matrix [C, positions]; a channel's score is the matrix's
    nuclear norm less that of the matrix with the channel's row set to zero, averaged over the images (640 by
    default). Consumers that see more than one position go first: behind global pooling a map is a single number.

    Args:
        statistics: from :meth:`calibrate`.
        group_reduction: over the layers that read a channel: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: Torch-Pruning's names.
        loader: gather anew from it when the statistics are stale, instead of raising.

    Example:
        >>> import torch, torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> importance = CHIPImportance.calibrate(net, [torch.randn(16, 3, 8, 8)], progress=False)
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> importance(graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))).shape
        torch.Size([8])
    """

    accumulator = ChannelIndependence

    def gather(
        self, model: nn.Module, loader: Iterable[Any], *, max_images: int | None, progress: bool
    ) -> ActivationStatistics[Any]:
        """Accumulate nuclear-norm drops of what every layer reads, of at most 640 images; labels are not used."""
        images = CHIP_IMAGES if max_images is None else min(max_images, CHIP_IMAGES)
        return super().gather(model, loader, max_images=images, progress=progress)

    def _chosen(self, consumers: list[Member], names: dict[nn.Module, str]) -> list[Member]:
        maps = [m for m in consumers if self.statistics.records[names[m.module]].positions > 1]
        return maps or consumers

    def _scores(self, name: str) -> Tensor:
        independence: ChannelIndependence = self.statistics.records[name]
        return independence.mean


class MIPPImportance(ConsumerImportance):
    """MIPP in a Gaussian adjacent-layer form, after Westphal et al. 2024.

    The published method keeps the channels that preserve the mutual information between the activations of adjacent
    layers, and estimates it without a distribution. Here a consumer's inputs and outputs are taken as jointly
    Gaussian: a channel's score is the information between it and all of the consumer's outputs, in nats; see
    :func:`~tp_twoaxis.scores.adjacent.adjacent_information` for the formula and
    :class:`~tp_twoaxis.statistics.activations.AdjacentMoments` for the rows.

    Of the forms tried on a CIFAR-10 ResNet-20 at half the MACs (1,024 calibration images, accuracy on 1,500 other
    training images), this one gave 0.479 with a noise of 0.1 and 0.447 with 0.01; what the information loses when
    the channel alone leaves, ``I(X; Y) - I(X without k; Y)``, gave 0.364 to 0.381.

    Args:
        statistics: from :meth:`calibrate`.
        noise: variance of the observation noise on the outputs, relative to their mean variance.
        group_reduction: over the layers that read a channel: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: Torch-Pruning's names.
        loader: gather anew from it when the statistics are stale, instead of raising.

    Example:
        >>> import torch, torch_pruning as tp
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> importance = MIPPImportance.calibrate(net, [torch.randn(16, 3, 8, 8)], progress=False)
        >>> graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
        >>> importance(graph.get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))).shape
        torch.Size([8])
    """

    accumulator = AdjacentMoments

    def __init__(
        self, statistics: ActivationStatistics[AdjacentMoments], *, noise: float = 0.1, **options: Any
    ) -> None:
        super().__init__(statistics, **options)
        self.noise = noise

    def _chosen(self, consumers: list[Member], names: dict[nn.Module, str]) -> list[Member]:
        fitting = [m for m in consumers if not self.statistics.records[names[m.module]].too_wide]
        if consumers and not fitting:
            raise TwoAxisError(
                f"{listing(names[m.module] for m in consumers)}: expected a layer whose covariances fit into 1 GiB, "
                f"got {consumers[0].module}; put the layers before it into ignored_layers or take another criterion"
            )
        return fitting

    def _scores(self, name: str) -> Tensor:
        moments: AdjacentMoments = self.statistics.records[name]
        return adjacent_information(
            moments.input_variance, moments.cross_covariance, moments.output_covariance, noise=self.noise
        )
