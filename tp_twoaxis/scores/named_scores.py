"""Scores by name: statistics of a layer -> [C], larger means keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError, check_count, check_name, is_number
from tp_twoaxis.scores import composite, hull, local, spectral, target
from tp_twoaxis.scores.quantiles import annealed_quantiles, assign_by_rank
from tp_twoaxis.statistics.layer_statistics import LayerStatistics

Score = Callable[[LayerStatistics], Tensor]


@dataclass(frozen=True)
class NamedScore:
    """A named score.

    Attributes:
        function: statistics of a layer -> [C], larger keeps.
        axis: what it looks at.
        summary: what it is, in one line.
        normalizer: makes groups comparable unless another is chosen; see :mod:`~tp_twoaxis.importance.normalize`.
        allocation: for scores that only order the channels of a layer: a score of the same axis whose values are
            assigned in that order, unless a normaliser is chosen. It then decides how many channels each group loses,
            and this one which. Weighted sums of z-scores have no zero and no unit that layers share; what peers can
            supply depends on how redundant a layer is as a whole.
        mixed: whether it looks at weights beside the statistics of its axis.
        other_axis: option -> its values with which the score looks at the other axis too.
    """

    function: Score
    axis: Literal["local", "target"]
    summary: str
    normalizer: str = "median"
    allocation: Score | None = None
    mixed: bool = False
    other_axis: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def axis_with(self, options: Mapping[str, Any]) -> Literal["local", "target", "mixed", "both"]:
        """Say what the score looks at with some options.

        Example:
            >>> SCORES["norm-local"].axis_with({}), SCORES["spectral-rs"].axis_with({"affinity": "S"})
            ('mixed', 'both')
        """
        if any(options.get(option) in values for option, values in self.other_axis.items()):
            return "both"
        return "mixed" if self.mixed else self.axis


def capture(layer: LayerStatistics, noise_power: float | None = None) -> Tensor:
    """Input capture ``I_k`` in nats (equation 1).

    Args:
        layer: statistics.
        noise_power: the noise floor, a variance above 0; default the layer's median power.
    """
    return local.input_capture(layer.variance, noise_power)


def relative_variance(layer: LayerStatistics) -> Tensor:
    """Output variance over the mean of its layer's varying channels: the raw scale before a BatchNorm has no meaning.

    Layers of one group are averaged. Over its median, a layer with a few channels of thousands of times that, as the
    stem of a MobileNetV1 is, would outweigh the others.
    """
    varying = layer.variance > 0
    return layer.variance / layer.variance[varying].mean() if bool(varying.any()) else torch.zeros_like(layer.variance)


def conditional_variance(layer: LayerStatistics) -> Tensor:
    """Output variance that all peers together leave unexplained, ``P_k (1 - E_k)``; the variance given all of them.

    For Gaussian channels it is the error of the best prediction of a channel from its peers, and ``1 / (S^-1)_kk`` of
    their covariance S. ``P_k`` is relative to the layer's mean. Where a layer has more channels than inputs all of it
    is 0 but for the ridge of :func:`~tp_twoaxis.scores.hull.full_explanation`: :func:`hull_refined` counts a few peers.
    """
    active = layer.variance > 0
    return relative_variance(layer) * (1.0 - hull.full_explanation(layer.correlation, active=active))


def low_overlap(layer: LayerStatistics) -> Tensor:
    """Minus the mean peer overlap ``R_k`` in nats: what peers share most goes first (equation 2)."""
    return -local.peer_overlap(layer.correlation, layer.variance > 0)


def hull_refined(layer: LayerStatistics, strength: float = 0.5, peers: int = 8) -> Tensor:
    """Variance less the part that a few peers can supply, ``P_k (1 - c E_k(H_8))``; ours.

    It orders a layer's channels, and capture decides how many leave; by its own values over their median the VGG of
    :data:`DEFAULT_SCORE` keeps 68.1 / 59.7 instead of 71.0 / 61.3 %, the ResNet with conv shortcuts 83.6 / 51.7 instead
    of 84.6 / 56.3 (with variances over their medians). ``P_k`` is relative to the layer's mean; c = 0.5 was the best of
    0, 0.5 and 1 on a ResNet-20, see :func:`~tp_twoaxis.scores.hull.greedy_hulls` for the peers.
    """
    check_hull_options(strength, peers)
    hulls = hull.greedy_hulls(layer.correlation, active=layer.variance > 0, max_size=peers)
    explained = hulls.path[:, -1] if hulls.path.shape[1] else torch.zeros_like(layer.variance)
    return relative_variance(layer) * (1.0 - strength * explained)


def check_hull_options(strength: float, peers: int) -> None:
    """Refuse options of :func:`hull_refined` that are out of range.

    Raises:
        TwoAxisError: naming the option.

    Example:
        >>> check_hull_options(0.5, 8)
    """
    if not (is_number(strength) and 0.0 <= strength <= 1.0):
        raise TwoAxisError(f"strength: expected a number in [0, 1], got {strength!r}; 0.5 is usual")
    check_count("peers", peers, least=0)


def cap_a(layer: LayerStatistics, overlap: float = 0.3, removed: float = 0.0) -> Tensor:
    """Capture, assigned in an order whose overlap penalty is annealed away, ``z(I) - (1 - t) b z(R)``; ours.

    With iterative pruning t is the share removed so far. In one shot nothing is removed when the scores are computed,
    so the layer is emptied in thought, and t follows each channel's own place in that order
    (:func:`~tp_twoaxis.scores.quantiles.annealed_quantiles`). Annealing from overlap alone, ``(1 - t)(-z(R)) + t
    z(I)``, does not look at the signal until most channels are gone: 28.2 / 29.5 %, against 44.7 / 56.5 % this way at b
    = 1 and 59.3 / 65.2 % at b = 0.3 (protocol: :mod:`~tp_twoaxis.scores.composite`).

    Args:
        layer: statistics.
        overlap: b, at least 0.
        removed: share of the layer's channels that earlier steps removed, in [0, 1);
            :func:`~tp_twoaxis.prune_to_flops` with ``steps`` sets it.
    """
    active = layer.variance > 0
    capture = local.input_capture(layer.variance)[active]
    shared = local.peer_overlap(layer.correlation, active)[active]
    late = composite.z_scores(capture)
    quantiles = annealed_quantiles(late - overlap * composite.z_scores(shared), late, removed=removed)
    return torch.zeros_like(layer.variance).masked_scatter(active, assign_by_rank(capture, quantiles))


def task_mi(layer: LayerStatistics) -> Tensor:
    """Task information ``M_k`` in nats about the calibration's target (equation 3)."""
    return target.task_information(layer.target_correlation())


def target_redundancy(layer: LayerStatistics) -> Tensor:
    """Target redundancy ``mean_j min(M_k, M_j)`` in nats (equation 4)."""
    active = layer.variance > 0  # constant channels are nobody's peers
    information = task_mi(layer)
    return torch.zeros_like(information).masked_scatter(active, target.target_redundancy(information[active]))


def target_excess(layer: LayerStatistics, partners: int = 10, rule: target.PartnerRule = "task-mi") -> Tensor:
    """Target excess over some partners, in nats (equation 5).

    Args:
        layer: statistics.
        partners: how many a channel.
        rule: which they are; see :func:`~tp_twoaxis.scores.target.target_excess`.
    """
    active = layer.variance > 0  # constant channels are nobody's partners
    correlation, pooled = layer.target_correlation()[active], layer.pooled_correlation[active][:, active]
    excess = target.target_excess(correlation, pooled, partners=partners, rule=rule)
    return torch.zeros_like(layer.variance).masked_scatter(active, excess)


SCORES: dict[str, NamedScore] = {
    "capture": NamedScore(capture, "local", "input capture I_k"),
    "variance": NamedScore(relative_variance, "local", "output variance over its layer's mean"),
    "conditional-variance": NamedScore(
        conditional_variance, "local", "variance that all peers leave unexplained", allocation=capture
    ),
    "low-overlap": NamedScore(low_overlap, "local", "minus the mean peer overlap R_k", allocation=capture),
    "composite-local": NamedScore(composite.composite_local, "local", "capture less overlap", allocation=capture),
    "norm-local": NamedScore(
        composite.norm_local, "local", "weight norm and capture less overlap", allocation=capture, mixed=True
    ),
    "hull": NamedScore(hull_refined, "local", "variance less what the best 8 peers can supply", allocation=capture),
    "compact-hull": NamedScore(
        composite.compact_hull, "local", "capture less compact peer support", allocation=capture
    ),
    "cap-a": NamedScore(cap_a, "local", "capture, in an order annealed from overlap to capture"),
    "spectral-rs": NamedScore(
        spectral.spectral_rs,
        "local",
        "capture, by rank in spectral clusters of R",
        other_axis={"affinity": ("S", "RS")},
    ),
    "task-mi": NamedScore(task_mi, "target", "task information M_k"),
    "target-redundancy": NamedScore(target_redundancy, "target", "Gaussian MMI redundancy"),
    "target-excess": NamedScore(target_excess, "target", "pairwise target excess X_k"),
    "composite-pid": NamedScore(
        composite.composite_pid, "target", "task information and excess less redundancy", allocation=task_mi
    ),
    "pid-no-red": NamedScore(composite.pid_no_red, "target", "task information and excess", allocation=task_mi),
    "spectral-pid-rs": NamedScore(
        spectral.spectral_pid_rs, "target", "task information and excess, by rank in spectral clusters"
    ),
}

DEFAULT_SCORE = "capture"
"""The score where none is named.

Top-1 accuracy in % with two shares of the MACs kept (0.8 and 0.65 on ImageNet, 0.7 and 0.5 on CIFAR-10), BatchNorm
re-estimated and nothing fine-tuned, on training images that did not calibrate: 300 of ImageNet, 1,000 of CIFAR-10, so
+-2.9 and +-1.6 (``benchmarks/default_score.py``, all scores in ``benchmarks/results/default_score.md``). Left: accuracy
over the dense network's, mean over all. ``softmax`` is norm-local by that normaliser, ``mean`` capture over its mean:

==================  ===========  ===========  ===========  ===========  ===========  ===========
network             capture      norm-local   hull         mean         softmax      l2
==================  ===========  ===========  ===========  ===========  ===========  ===========
left                73.6         73.3         72.9         70.2         67.0         60.5
MobileNetV1-0.75    66.7 / 37.3  64.3 / 39.3  67.7 / 34.7  67.7 / 35.0  23.0 / 6.7   51.3 / 7.0
EfficientNet-Lite0  46.7 / 22.0  55.0 / 21.0  46.3 / 18.7  38.3 / 14.0  49.3 / 15.0  25.3 / 1.3
ResNet-20, conv     83.7 / 58.4  81.5 / 56.1  84.6 / 56.3  83.1 / 53.0  80.9 / 50.5  81.3 / 46.7
ResNet-20, A        86.1 / 62.7  87.7 / 62.6  85.7 / 63.1  84.7 / 59.8  84.4 / 63.8  66.6 / 36.0
VGG-16, a quarter   74.2 / 60.9  73.7 / 61.6  71.0 / 61.3  71.7 / 42.3  75.9 / 61.1  62.8 / 53.1
ViT, small          44.1 / 37.7  42.9 / 35.3  44.4 / 38.0  44.0 / 41.6  43.5 / 40.9  43.6 / 36.9
ConvNeXt, small     45.1 / 43.5  44.9 / 42.9  45.1 / 43.3  45.1 / 43.6  45.6 / 44.2  45.9 / 45.1
==================  ===========  ===========  ===========  ===========  ===========  ===========

The first three are within their errors of each other over all; capture is the plainest, costs least, and any site and
normaliser suit it. It is behind norm-local on EfficientNet-Lite0 at 0.8, and behind the mean on the transformer at half
the MACs; transformer and ConvNeXt were trained briefly. On 300 other images of ImageNet, by which nothing was chosen,
it keeps 59.3 / 23.3 and 46.3 / 16.3 %, ``softmax`` 22.7 / 3.0 and 40.0 / 10.3.
:func:`~tp_twoaxis.select_score` tells which suits a network.
"""


def find_score(name: str, axis: str | None = None) -> Score:
    """Look a score up.

    Args:
        name: one of :data:`SCORES`.
        axis: accept only scores of this axis.

    Raises:
        TwoAxisError: no such score, or one of the other axis; the message lists the valid names.

    Example:
        >>> find_score("capture").__name__
        'capture'
    """
    valid = [key for key, entry in SCORES.items() if axis in (None, entry.axis)]
    check_name("score", name, valid, more=f" ({axis} axis)" if axis else "")
    return SCORES[name].function


def entry_of(score: str | Score) -> NamedScore | None:
    """Find the row of a score, with options set or not; None for functions that have no name.

    Example:
        >>> from functools import partial
        >>> entry_of(partial(hull_refined, strength=1.0)) is SCORES["hull"], entry_of(lambda layer: layer.variance)
        (True, None)
    """
    if isinstance(score, str):
        return SCORES[score]
    function = score.func if isinstance(score, partial) else score
    return next((entry for entry in SCORES.values() if entry.function is function), None)


def evaluate(score: Score, layer: LayerStatistics) -> Tensor:
    """Score a layer's channels; constant channels get the layer's minimum.

    Returns:
        [C] float64.

    Raises:
        TwoAxisError: the score is not one finite number a channel.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> layer = calibrate(net, [torch.randn(64, 8)], progress=False, target=None)["1"]
        >>> evaluate(capture, layer).shape
        torch.Size([4])
    """
    values = torch.as_tensor(score(layer), dtype=torch.float64)
    if values.shape != (layer.num_channels,) or not bool(torch.isfinite(values).all()):
        got = list(values.shape) if values.shape != (layer.num_channels,) else "values that are not finite"
        raise TwoAxisError(
            f"{layer.name}: expected one finite score for each of {layer.num_channels} channels, got {got} "
            f"from {getattr(score, '__name__', score)}"
        )
    return torch.where(layer.variance > 0, values, values.min())
