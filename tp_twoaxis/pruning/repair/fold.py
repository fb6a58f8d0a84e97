"""What kept channels say about removed ones, and how that is written into a layer's weights. Tensors only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tp_twoaxis.damping import damped_factor

# a fit from many rows needs no more than protection against rounding; from few rows it shrinks towards no change
LEAST_RIDGE, NOISE_RIDGE, LARGEST_RIDGE = 1e-6, 1e-2, 0.1


def ridge_for(rows: int, width: int) -> float:
    """Choose the ridge of a fit of ``width`` numbers from ``rows`` rows; relative to their mean variance.

    ``1e-6 + 0.01 (width / rows)^2``, at most 0.1 (ours): next to nothing where rows abound, so that exact
    dependences are found exactly, and a real shrinkage where the covariance is of deficient rank.

    Example:
        >>> ridge_for(64_000, 64) < 2e-6, ridge_for(512, 2048)
        (True, 0.1)
    """
    return min(LARGEST_RIDGE, LEAST_RIDGE + NOISE_RIDGE * (width / max(rows, 1)) ** 2)


def ridge_regression(covariance: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Solve ``(S_xx + ridge t I) A = S_xy``, t the mean variance.

    Args:
        covariance: [K, K] float64, of the predictors.
        cross: [K, D] float64, of predictors with targets.
        ridge: relative, dimensionless, above 0.

    Returns:
        [K, D]; zeros where no predictor varies.

    Raises:
        TwoAxisError: the ridge is not positive.

    Example:
        >>> s = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> ridge_regression(s, s[:, :1], 1e-12).round(decimals=6).tolist()
        [[1.0], [0.0]]
    """
    factor = damped_factor(covariance, ridge)
    return torch.zeros_like(cross) if factor is None else torch.cholesky_solve(cross, factor)


@dataclass(frozen=True)
class Fold:
    """Removed channels as affine functions of kept ones, ``x_D = A' x_K + shift + rest``.

    Attributes:
        kept: [K] int64, channels that stay.
        removed: [D] int64, channels that leave.
        weights: [K, D] float64, A; zeros when only means are folded.
        shift: [D] float64, ``m_D - A' m_K``.
        residual: [D, D] float64, covariance of the rest.
        variance: [D] float64, of the removed channels.
    """

    kept: Tensor
    removed: Tensor
    weights: Tensor
    shift: Tensor
    residual: Tensor
    variance: Tensor

    @property
    def explained(self) -> Tensor:
        """Share of each removed channel's variance that the kept ones supply, [D] in [0, 1]; 1 where it has none."""
        share = 1.0 - self.residual.diagonal() / self.variance.clamp_min(torch.finfo(torch.float64).tiny)
        return torch.where(self.variance > 0, share, torch.ones_like(share)).clamp(0.0, 1.0)


def affine_fold(mean: Tensor, covariance: Tensor, removed: Tensor, *, ridge: float) -> Fold:
    """Predict removed channels from kept ones: ``A = (S_KK + ridge t I)^-1 S_KD``.

    Args:
        mean: [C] float64.
        covariance: [C, C] float64.
        removed: [C] bool.
        ridge: relative to the kept channels' mean variance; ``inf`` folds means alone.

    Returns:
        The fold with its residual ``S_DD - A' S_KD - S_DK A + A' S_KK A``.

    Example:
        >>> s = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)  # x1 = 2 x0 + 3
        >>> m = torch.tensor([1.0, 5.0], dtype=torch.float64)
        >>> fold = affine_fold(m, s, torch.tensor([False, True]), ridge=1e-12)
        >>> [round(t.item(), 6) for t in (fold.weights, fold.shift, fold.explained)]
        [2.0, 3.0, 1.0]
    """
    kept, lost = (~removed).nonzero()[:, 0], removed.nonzero()[:, 0]
    s_kk, s_kd, s_dd = covariance[kept][:, kept], covariance[kept][:, lost], covariance[lost][:, lost]
    weights = torch.zeros_like(s_kd) if ridge == float("inf") else ridge_regression(s_kk, s_kd, ridge)
    half = s_kd - s_kk @ weights / 2  # S_DD - A'half - half'A is the residual, and symmetric to the last bit
    product = weights.T @ half
    return Fold(kept, lost, weights, mean[lost] - weights.T @ mean[kept], s_dd - product - product.T, s_dd.diagonal())


def fold_weight(weight: Tensor, fold: Fold) -> tuple[Tensor, Tensor]:
    """Write a fold into a layer that reads the channels: ``W_K + W_D A'`` at each tap, and ``W_D shift``.

    Inside an image this gives the output that predicted channels would give. Where zero padding cuts a kernel
    off, the shift of the cut taps is counted too; least squares over patches has no such error.

    Args:
        weight: [O, C, taps], of the dense layer.
        fold: of its inputs.

    Returns:
        The weight [O, K, taps] and what to add to the bias [O], float64.

    Example:
        >>> nothing = torch.zeros(1, 1, dtype=torch.float64)
        >>> fold = Fold(torch.tensor([0]), torch.tensor([1]), nothing + 2, nothing[0] + 3, nothing, nothing[0])
        >>> [t.tolist() for t in fold_weight(torch.tensor([[[1.0], [10.0]]]), fold)]
        [[[[21.0]]], [30.0]]
    """
    wide = weight.double()
    left, gone = wide[:, fold.kept], wide[:, fold.removed]
    return left + torch.einsum("odt,kd->okt", gone, fold.weights), torch.einsum("odt,d->o", gone, fold.shift)


def output_error(weight: Tensor, fold: Fold) -> Tensor:
    """Predict the variance of a layer's output error after a fold, [O] float64.

    ``sum over taps of w_D R w_D'`` with R the residual: what the taps miss is taken to be uncorrelated between
    positions. Exact for layers of one tap; as neighbours do agree, too small for others.

    Args:
        weight: [O, C, taps], of the dense layer.
        fold: of its inputs.
    """
    gone = weight.double()[:, fold.removed]
    return torch.einsum("odt,de,oet->o", gone, fold.residual, gone).clamp_min(0.0)
