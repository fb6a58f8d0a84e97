"""Scores as Torch-Pruning importances: one finite number a root channel, or a clear error."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from tp_twoaxis.dependency.groups import group_consumers, members, model_of, module_names, root_name, root_size
from tp_twoaxis.errors import StaleStatisticsError, TwoAxisError, check_name, listing
from tp_twoaxis.importance.base import GroupImportance, merge_repeats, reduce_members
from tp_twoaxis.importance.constant_channels import constant_roots, normalize_varying
from tp_twoaxis.importance.normalize import Normalizer
from tp_twoaxis.importance.pruning_state import PruningState
from tp_twoaxis.runtime.fingerprints import ModelFingerprints
from tp_twoaxis.runtime.layers import CHANNEL_LAYERS
from tp_twoaxis.scores.named_scores import (
    DEFAULT_SCORE,
    Score,
    check_hull_options,
    entry_of,
    evaluate,
    find_score,
    hull_refined,
)
from tp_twoaxis.scores.quantiles import assign_by_rank
from tp_twoaxis.statistics.given_statistics import check_statistics
from tp_twoaxis.statistics.layer_statistics import InputStatistics, LayerStatistics
from tp_twoaxis.statistics.store import CalibrationStatistics

Site = Literal["producer", "consumer"]
Ours = TypeVar("Ours", bound="TwoAxisImportance")


class LayerPart(NamedTuple):
    """A calibrated layer that gives scores to a group: its name, its channels [n] and their root positions [n]."""

    name: str
    channels: Tensor
    roots: Tensor


class TwoAxisImportance(GroupImportance):
    """Any score of either axis as a Torch-Pruning importance.

    Drops into ``BasePruner``, ``MetaPruner``, ``GroupNormPruner`` and ``BNScalePruner``, with their
    ``global_pruning``, ``isomorphic``, ``round_to`` and ``pruning_ratio_dict``. For a group it scores calibrated
    layers on the chosen site, reduces to the root channels, and normalises.

    - ``site="producer"``: what every layer that writes the group's channels writes, before BatchNorm, activation
      and addition. A residual stream has several producers, and none of them sees their sum.
    - ``site="consumer"``: the input of the convolutions and linear layers that read the channels, after BatchNorm,
      activation and addition: the tensor that the producers make together. It needs ``calibrate(consumers=True)``, and
      a score of means, variances and correlations. Features behind a flattening layer are averaged over each channel;
      around a depthwise convolution the projection reads; in a pre-norm transformer the stream is read behind
      LayerNorm, so its scale is the norm's. A group without consumers is declined: Torch-Pruning leaves it whole.

    The default is the best of what was measured on two CIFAR-10 ResNet-20s (``benchmarks/coupled_groups.py``): accuracy
    on held-out training images with 0.7, 0.5 and 0.35 of the MACs kept and BatchNorm re-estimated, mean of the three
    and of capture, variance and hull over their mean, with conv shortcuts / with zero-padded ones:

    ========  ======  =============
    site      reduce  accuracy
    ========  ======  =============
    producer  mean    0.595 / 0.652
    producer  sum     0.595 / 0.438
    producer  max     0.565 / 0.582
    producer  first   0.478 / 0.539
    consumer  mean    0.557 / 0.565
    ========  ======  =============

    ``sum`` equals ``mean`` under a normaliser that divides, unless channels of a group have unequally many producers,
    as behind padding. With 0.7 kept the consumer's site is ahead on the first network (by 0.003 to 0.036) and behind
    on the second (by 0.019 to 0.045); with less it is behind on both.

    Statistics describe one state of one model. Each call checks that the model is still in it: the group's
    own layers by their weights, all others by shape and by their parameters' version. So a second iterative
    step, or pruning after training, raises instead of ranking by what is no longer true; with ``loader``
    it recalibrates instead. A group's own layers are those that write its channels, and at the consumer's site those
    that read them; BatchNorms in between are not remembered, so calibrate again after changing them alone.

    Args:
        stats: from :func:`~tp_twoaxis.calibrate`.
        score: a name in ``tp_twoaxis.scores.SCORES`` or a function ``LayerStatistics -> [C]``, larger keeps. Why the
            default is what it is: :data:`~tp_twoaxis.scores.named_scores.DEFAULT_SCORE`. A score with a parameter
            ``removed`` gets the share of the layer's channels that earlier steps removed, see :meth:`with_removed`.
        group_reduction: over the layers that write, or read, a channel: ``mean``, ``sum``, ``max`` or ``first``.
        normalizer: Torch-Pruning's names; see :func:`~tp_twoaxis.importance.normalize.normalize`. ``"auto"`` is what
            ``SCORES`` has beside the score: ``"median"``, and for scores that only order the channels of a layer the
            values of another one (:attr:`~tp_twoaxis.scores.named_scores.NamedScore.allocation`). For functions it is
            ``"median"``. None compares the scores as they are.
        site: ``producer`` or ``consumer``: whose view of the channels is scored.
        loader: recalibrate from it when the statistics are stale, instead of raising.

    Raises:
        TwoAxisError: here, an unknown score, reduction, normaliser or site; on a call: a group without calibrated
            layers; the site's statistics were not recorded, or the score needs more than they hold.
        StaleStatisticsError: on a call: the model was pruned or trained after calibration.

    Example:
        >>> import torch_pruning as tp
        >>> import tp_twoaxis
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 4))
        >>> loader = [(torch.randn(32, 3, 8, 8), torch.randint(4, (32,)))]
        >>> stats = tp_twoaxis.calibrate(net, loader, progress=False)
        >>> pruner = tp.pruner.BasePruner(
        ...     net, torch.randn(1, 3, 8, 8), importance=TwoAxisImportance(stats), pruning_ratio=0.5,
        ...     ignored_layers=[net[4]])
        >>> pruner.step()
        >>> net[0].out_channels, net[2].out_channels
        (8, 4)
    """

    axis: ClassVar[str | None] = None
    """The axis that a score given by name must be of; None takes any."""

    def __init__(
        self,
        stats: CalibrationStatistics,
        score: str | Score = DEFAULT_SCORE,
        *,
        group_reduction: str = "mean",
        normalizer: Normalizer = "auto",
        site: Site = "producer",
        loader: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(group_reduction=group_reduction, normalizer="median" if normalizer == "auto" else normalizer)
        check_name("site", site, get_args(Site))
        check_statistics(stats)
        if isinstance(score, str):
            find_score(score, self.axis)
        self.stats = stats
        self.score = score
        self.normalizer = normalizer
        self.site = site
        self.loader = loader
        self._removed: Mapping[str, float] = {}
        self._scores: dict[str, Tensor] = {}
        self._fingerprints: ModelFingerprints | None = None

    def __repr__(self) -> str:
        score = getattr(self.score, "func", self.score)
        name = score if isinstance(score, str) else getattr(score, "__name__", "function")
        site = "" if self.site == "producer" else f", site={self.site!r}"
        allocation = "" if self._allocation is None else f", allocation={self._allocation.__name__!r}"
        return f"{type(self).__name__}(score={name!r}, normalizer={self._normalizer!r}{allocation}{site})"

    def layer_statistics(self, name: str) -> LayerStatistics:
        """Give the statistics that are scored at a layer: of its outputs, or, at the consumer's site, of its inputs."""
        return self.stats[name] if self.site == "producer" else InputStatistics(self.stats[name])

    def layer_scores(self, name: str) -> Tensor:
        """Score one layer's channels, before reduction and normalisation.

        Returns:
            [C] float64 on the CPU; [C_in] at the consumer's site.
        """
        if name not in self._scores:
            score: Callable[..., Tensor] = find_score(self.score) if isinstance(self.score, str) else self.score
            if name in self._removed and _takes_removed(score):
                score = partial(score, removed=self._removed[name])
            self._scores[name] = evaluate(score, self.layer_statistics(name))
        return self._scores[name]

    def with_removed(self: Ours, state: PruningState) -> Ours:
        """Copy the importance for a network from which earlier steps removed channels.

        Args:
            state: of the network; the shares that are gone on the side that is scored count.
        """
        made = copy.copy(self)
        made._removed = state.removed_outputs if self.site == "producer" else state.removed_inputs
        made._scores, made._fingerprints = {}, None
        return made

    def build(self: Ours, state: PruningState) -> Ours:
        """Copy the importance for a network as it is now, with new statistics; this one stays as it is.

        Args:
            state: the network; its loader counts where this importance has none of its own.
        """
        made = self.with_removed(state)
        made.stats = state.like(self.stats, self.loader).statistics(*self.stats.extras)
        return made

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Rank a group's root channels.

        Args:
            group: a ``torch_pruning`` group, full or partial.

        Returns:
            [len(group[0].idxs)] float32 on the CPU, finite; None at the consumer's site for a group without consumers.
        """
        size, (parts, producers) = root_size(group), self._layer_parts(group)
        if not parts:
            return None
        self._check(model_of(group), {part.name for part in [*producers, *parts]})
        return normalize_varying(self._root_scores(parts, size), self._constant(parts, size), self._normalizer).float()

    def constant_channels(self, group: Any) -> Tensor:
        """Find the root channels that are constant in all layers that are scored, [len(group[0].idxs)] bool.

        Only a call, which ranks the channels, checks that the statistics hold for the model as it is.
        """
        return self._constant(self._layer_parts(group)[0], root_size(group))

    def _layer_parts(self, group: Any) -> tuple[list[LayerPart], list[LayerPart]]:
        """Find the calibrated layers that give scores to a group, and those that write its channels."""
        names = module_names(group)
        producers = self._producers(group, names)
        return (producers if self.site == "producer" else self._consumers(group, names)), producers

    def _producers(self, group: Any, names: dict[nn.Module, str]) -> list[LayerPart]:
        """List the calibrated producers of a group's channels."""
        producers = [m for m in members(group) if m.is_producer and isinstance(m.module, CHANNEL_LAYERS)]
        known = [
            LayerPart(names[m.module], m.channels, m.roots) for m in producers if names.get(m.module) in self.stats
        ]
        if not known and self.site == "producer":
            raise TwoAxisError(
                f"group of {root_name(group)}: none of the layers that write its channels was calibrated "
                f"({listing(names[m.module] for m in producers if m.module in names) or 'it has no such layer'}); "
                "calibrate with them in layers=, or put them into ignored_layers"
            )
        return known

    def _root_scores(self, parts: list[LayerPart], size: int) -> Tensor:
        """Reduce the scores of a group's layers, [size] float64, before normalisation."""
        scores = self._reduced(parts, size, self.layer_scores)
        allocation = self._allocation
        if allocation is None:
            return scores
        values = self._reduced(parts, size, lambda name: evaluate(allocation, self.layer_statistics(name)))
        varying = ~self._constant(parts, size)
        return torch.zeros_like(values).masked_scatter(varying, assign_by_rank(values[varying], scores[varying]))

    def _constant(self, parts: list[LayerPart], size: int) -> Tensor:
        varying = [(self.layer_statistics(part.name).variance[part.channels] > 0, part.roots) for part in parts]
        return constant_roots(varying, size)

    def _reduced(self, parts: list[LayerPart], size: int, quantity: Callable[[str], Tensor]) -> Tensor:
        """Reduce a quantity of layers as scores are, [size] float64."""
        scored = [(quantity(part.name)[part.channels], part.roots) for part in parts]
        if self.site == "consumer":
            # as many features as a map has pixels stand for one channel; together they weigh as much as a map
            scored = [merge_repeats(scores, roots, "mean") for scores, roots in scored]
        return reduce_members(scored, size, self.group_reduction)

    @property
    def _normalizer(self) -> Normalizer:
        entry = entry_of(self.score)
        return self.normalizer if self.normalizer != "auto" else entry.normalizer if entry else "median"

    @property
    def _allocation(self) -> Score | None:
        entry = entry_of(self.score)
        return entry.allocation if entry and self.normalizer == "auto" else None

    def _consumers(self, group: Any, names: dict[nn.Module, str]) -> list[LayerPart]:
        """List the consumers of a group's channels whose inputs were recorded."""
        consumers = [LayerPart(names[m.module], m.channels, m.roots) for m in group_consumers(group)]
        known = [p for p in consumers if p.name in self.stats and self.stats[p.name].inputs is not None]
        missing = root_size(group) - len({int(root) for part in known for root in part.roots})
        if consumers and missing:
            advice = (
                "record them with layers= (nn.MultiheadAttention and inputs of more than 8192 numbers cannot be), or "
                "take site='producer' for this model"
                if self.stats.consumers
                else "call calibrate(consumers=True)"
            )
            raise TwoAxisError(
                f"group of {root_name(group)}: site='consumer' expects recorded inputs of the layers that read "
                f"its channels ({listing(part.name for part in consumers)}), got none for {missing} of "
                f"{root_size(group)} channels; {advice}"
            )
        return known

    def _check(self, model: nn.Module, own: set[str]) -> None:
        try:
            self._verify(model, own)
        except StaleStatisticsError as error:
            if self.loader is None:
                raise StaleStatisticsError(
                    f"{error}, or build the importance with loader=... to recalibrate between steps"
                ) from None
            state = PruningState(model, self.loader, progress=False).like(self.stats)
            self.stats = state.statistics(*self.stats.extras)
            self._scores, self._fingerprints = {}, None
            self._verify(model, own)

    def _verify(self, model: nn.Module, own: set[str]) -> None:
        self._fingerprints = self._fingerprints or self.stats.fingerprints()
        # hashing weights costs a pass over them: the group's own layers always, others when their version moved
        self._fingerprints.verify(model, [model.get_submodule(name) for name in own])


def _takes_removed(score: Score) -> bool:
    if isinstance(score, partial) and "removed" in score.keywords:
        return False  # it was set by hand
    try:
        return "removed" in inspect.signature(score).parameters
    except ValueError:  # a function without a signature
        return False


class LocalImportance(TwoAxisImportance):
    """A score of the local axis, the default of :class:`TwoAxisImportance` among them.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
        >>> LocalImportance(calibrate(net, [torch.randn(64, 8)], progress=False))
        LocalImportance(score='capture', normalizer='median')
    """

    axis: ClassVar[str | None] = "local"


class TargetImportance(TwoAxisImportance):
    """A score of the target axis: task information by default.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
        >>> TargetImportance(calibrate(net, [(torch.randn(64, 8), torch.randint(4, (64,)))], progress=False))
        TargetImportance(score='task-mi', normalizer='median')
    """

    axis: ClassVar[str | None] = "target"

    def __init__(self, stats: CalibrationStatistics, score: str | Score = "task-mi", **options: Any) -> None:
        super().__init__(stats, score, **options)


class HullImportance(TwoAxisImportance):
    """Hull-refined variance ``P_k (1 - c E_k(H))``: what a few peers can supply counts less.

    As the criterion ``hull`` it orders the channels, and capture decides how many of each group leave.

    Args:
        stats: from :func:`~tp_twoaxis.calibrate`.
        strength: c in [0, 1]; 0 is the plain variance.
        peers: size of the explaining peer set.
        options: of :class:`TwoAxisImportance`.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
        >>> importance = HullImportance(calibrate(net, [torch.randn(64, 8)], progress=False), strength=1.0)
        >>> importance.layer_scores("1").shape
        torch.Size([4])
    """

    def __init__(self, stats: CalibrationStatistics, *, strength: float = 0.5, peers: int = 8, **options: Any) -> None:
        check_hull_options(strength, peers)
        super().__init__(stats, partial(hull_refined, strength=strength, peers=peers), **options)
        self.strength = strength
        self.peers = peers
