"""Scores that weigh several quantities of one axis against each other, each standardised within its layer.

Every function takes a layer's statistics and gives [C] signed numbers, larger keeps. A weighted sum of z-scores
orders the channels of a layer, and says nothing between layers: its zero is the layer's mean, its unit the layer's own
deviation, so that a layer of nearly equal channels has as many low scores as one with many weak ones. No normaliser
brings that back. How many channels each layer loses is therefore decided by capture, or by task information on the
target axis (:attr:`~tp_twoaxis.scores.named_scores.NamedScore.allocation`), unless a normaliser is chosen.

Percentages in this package's ``scores`` are accuracies of two CIFAR-10 ResNet-20, conv shortcuts / option A, without
fine-tuning, on 2,000 training images that are not among the 2,000 that calibrated; one seed, so +-1 point for the
images alone. Half the MACs are kept, and BatchNorm is re-estimated on 1,000 images unless stated otherwise. Weights
were chosen under a normaliser that is named with them. ``capture`` over its mean has 58.0 / 65.5 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tp_twoaxis.scores import hull, local, target
from tp_twoaxis.statistics.layer_statistics import LayerStatistics


def z_scores(values: Tensor, active: Tensor | None = None) -> Tensor:
    """Standardise a quantity within a layer, ``z(x) = (x - mean) / deviation`` over the channels that vary.

    Args:
        values: [C].
        active: [C] bool, channels that vary; the others do not count and get 0. Default all.

    Returns:
        [C], mean 0 and deviation 1 over the active channels; 0 where they are all alike up to rounding.

    Example:
        >>> z_scores(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])).tolist()
        [-1.0, 1.0, 0.0]
    """
    active = torch.ones(len(values), dtype=torch.bool, device=values.device) if active is None else active
    chosen = values[active]
    out = torch.zeros_like(values)
    if len(chosen) < 2:
        return out
    spread = chosen.std(correction=0)
    # values that differ by rounding alone must not be blown up to a deviation of 1
    if spread > 1e-9 * chosen.abs().max():
        out[active] = (chosen - chosen.mean()) / spread
    return out


def composite_local(layer: LayerStatistics, capture: float = 1.0, overlap: float = 0.3) -> Tensor:
    """Capture against overlap, ``a z(I_k) - b z(R_k)``.

    Weights are ours, from one calibration seed. With ``softmax`` and a = 1: 54.7 / 67.3 % at b = 0,
    59.6 / 66.8 % at b = 0.3, so the overlap helps on conv shortcuts and on option A it does not. Other normalisers at
    b = 0.3 (BatchNorm from 2,000 images, where ``softmax`` has 59.7 / 66.9 %): softplus over its mean 52.2 / 63.9 %,
    rank quantiles 47.4 / 61.4 %, ``standarization`` 48.2 / 44.7 %, ``gaussian`` 60.8 % on option A.

    Args:
        layer: statistics.
        capture: a, at least 0.
        overlap: b, at least 0.
    """
    return capture * _capture(layer) - overlap * _overlap(layer)


def norm_local(layer: LayerStatistics, capture: float = 1.0, overlap: float = 0.3, norm: float = 0.3) -> Tensor:
    """Weight norm, capture and overlap, ``a z(ln |w_k|) + b z(I_k) - c z(R_k)``: the mixed-magnitude family.

    Its weights are ours, from one calibration seed, with ``softmax``: 43.1 / 56.9 % at a = 1, 56.3 / 66.8 % at a = 0.3,
    and without the norm, which is :func:`composite_local`, 59.6 / 66.8 %.

    Args:
        layer: statistics.
        capture: b, at least 0.
        overlap: c, at least 0.
        norm: a, at least 0.
    """
    # a channel that varies has weights, so the logarithm is finite where it counts
    log_norm = 0.5 * layer.weight_power.clamp_min(torch.finfo(torch.float64).tiny).log()
    return norm * z_scores(log_norm, layer.variance > 0) + composite_local(layer, capture, overlap)


def compact_hull(layer: LayerStatistics, support: float = 1.0) -> Tensor:
    """Capture less compact peer support, ``z(I_k) - c z(K_k)`` with ``K_k = E_k(H_k) / |H_k|``.

    A channel that one peer replaces has K near 1, one that needs ten or cannot be replaced has K below 0.1. The
    paper's safe-to-remove score is the negative of this at c = 1; K is ours, since its text lost the formula.
    44.5 / 53.5 % with ``softmax``.

    Args:
        layer: statistics.
        support: c, at least 0.
    """
    active = layer.variance > 0
    hulls = hull.greedy_hulls(layer.correlation, active=active)
    # |H| = 0 only where there are no peers, and then E = 0
    return _capture(layer) - support * z_scores(hulls.explanation / hulls.size.clamp_min(1), active)


def composite_pid(layer: LayerStatistics, partners: int = 10, rule: target.PartnerRule = "task-mi") -> Tensor:
    """Task information, target excess and target redundancy, ``z(M_k) + z(X_k) - z(Rt_k)``.

    19.4 / 37.3 % with ``softmax``, 22.9 / 21.6 % with ``gaussian``, from one calibration seed: the normaliser is better
    on option A alone.

    Args:
        layer: statistics.
        partners: of the excess, how many a channel.
        rule: which they are; see :func:`~tp_twoaxis.scores.target.target_excess`.
    """
    active = layer.variance > 0
    redundancy = target.target_redundancy(target.task_information(layer.target_correlation()[active]))
    return pid_no_red(layer, partners, rule) - torch.zeros_like(layer.variance).masked_scatter(
        active, z_scores(redundancy)
    )


def pid_no_red(layer: LayerStatistics, partners: int = 10, rule: target.PartnerRule = "task-mi") -> Tensor:
    """Task information and target excess, ``z(M_k) + z(X_k)``.

    Its allocation is that of :func:`composite_pid`, not measured on its own.

    Args:
        layer: statistics.
        partners: of the excess, how many a channel.
        rule: which they are; see :func:`~tp_twoaxis.scores.target.target_excess`.
    """
    active = layer.variance > 0  # constant channels are nobody's partners
    correlation = layer.target_correlation()[active]
    pooled = layer.pooled_correlation[active][:, active]
    excess = target.target_excess(correlation, pooled, partners=partners, rule=rule)
    both = z_scores(target.task_information(correlation)) + z_scores(excess)
    return torch.zeros_like(layer.variance).masked_scatter(active, both)


def _capture(layer: LayerStatistics) -> Tensor:
    return z_scores(local.input_capture(layer.variance), layer.variance > 0)


def _overlap(layer: LayerStatistics) -> Tensor:
    active = layer.variance > 0
    return z_scores(local.peer_overlap(layer.correlation, active), active)
