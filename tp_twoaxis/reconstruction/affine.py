"""Removed channels predicted linearly from kept ones, and the prediction absorbed into a layer's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.factorization import regularised_factor

# many rows: the ridge only protects against rounding; few rows: it shrinks the fit towards no change
LEAST_RIDGE, NOISE_RIDGE, LARGEST_RIDGE = 1e-6, 1e-2, 0.1
# relative ridges that are tried where images are held out; the last reconstructs means alone
RIDGES = (*(10.0**power for power in range(-6, 3)), float("inf"))


def ridge_for(rows: int, width: int) -> float:
    """Choose the ridge of a fit of ``width`` numbers from ``rows`` rows; relative to their mean variance.

    ``1e-6 + 0.01 (width / rows)^2``, at most 0.1 (ours): negligible with many rows, so that exact dependences are
    found exactly, and a substantial shrinkage where the covariance is rank-deficient.

    Example:
        >>> ridge_for(64_000, 64) < 2e-6, ridge_for(512, 2048)
        (True, 0.1)
    """
    return min(LARGEST_RIDGE, LEAST_RIDGE + NOISE_RIDGE * (width / max(rows, 1)) ** 2)


def ridge_factor(covariance: Tensor, ridge: float) -> Tensor | None:
    """Factor ``S + ridge t I`` as ``L L'``, with t the mean variance; where rounding asks for it with a larger ridge.

    Args:
        covariance: [K, K] float64.
        ridge: relative to the mean variance, > 0.

    Returns:
        L [K, K], lower triangular; None where nothing varies.

    Raises:
        TwoAxisError: the ridge is not positive.

    Example:
        >>> ridge_factor(torch.eye(2), 3.0).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    if not ridge > 0.0:
        raise TwoAxisError(f"ridge: expected a positive number relative to the mean variance, got {ridge}")
    mean_variance = float(covariance.diagonal().mean()) if len(covariance) else 0.0
    if mean_variance <= 0.0:
        return None
    return regularised_factor(covariance, ridge * mean_variance)


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
    factor = ridge_factor(covariance, ridge)
    return torch.zeros_like(cross) if factor is None else torch.cholesky_solve(cross, factor)


@dataclass(frozen=True)
class AffineReconstruction:
    """Removed channels as affine functions of kept ones, ``x_D = A' x_K + shift + e``.

    Attributes:
        kept: [K] int64, channels that stay.
        removed: [D] int64, channels that are removed.
        weights: [K, D] float64, A; zeros when only means are reconstructed.
        shift: [D] float64, ``m_D - A' m_K``.
        residual: [D, D] float64, covariance of the prediction error e.
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
        """Share of each removed channel's variance that the kept ones predict, [D] in [0, 1]; 1 where it has none."""
        share = 1.0 - self.residual.diagonal() / self.variance.clamp_min(torch.finfo(torch.float64).tiny)
        return torch.where(self.variance > 0, share, torch.ones_like(share)).clamp(0.0, 1.0)


def affine_reconstruction(mean: Tensor, covariance: Tensor, removed: Tensor, *, ridge: float) -> AffineReconstruction:
    """Predict removed channels from kept ones: ``A = (S_KK + ridge t I)^-1 S_KD``.

    Args:
        mean: [C] float64.
        covariance: [C, C] float64.
        removed: [C] bool.
        ridge: relative to the kept channels' mean variance; with ``inf`` only means are reconstructed, A = 0.

    Returns:
        The reconstruction, with error covariance ``S_DD - A' S_KD - S_DK A + A' S_KK A``.

    Example:
        >>> s = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)  # x1 = 2 x0 + 3
        >>> m = torch.tensor([1.0, 5.0], dtype=torch.float64)
        >>> found = affine_reconstruction(m, s, torch.tensor([False, True]), ridge=1e-12)
        >>> [round(t.item(), 6) for t in (found.weights, found.shift, found.explained)]
        [2.0, 3.0, 1.0]
    """
    kept, lost = (~removed).nonzero()[:, 0], removed.nonzero()[:, 0]
    s_kk, s_kd, s_dd = covariance[kept][:, kept], covariance[kept][:, lost], covariance[lost][:, lost]
    weights = torch.zeros_like(s_kd) if ridge == float("inf") else ridge_regression(s_kk, s_kd, ridge)
    half = s_kd - s_kk @ weights / 2  # S_DD - A'half - half'A is the residual, and symmetric to the last bit
    product = weights.T @ half
    shift, residual = mean[lost] - weights.T @ mean[kept], s_dd - product - product.T
    return AffineReconstruction(kept, lost, weights, shift, residual, s_dd.diagonal())


def held_out_error(weight: Tensor, found: AffineReconstruction, mean: Tensor, covariance: Tensor) -> float:
    """Mean squared error of a layer's outputs on other images, after :func:`absorb_into_weight`; summed over outputs.

    As in :func:`output_error`, errors are taken to be uncorrelated between taps.

    Args:
        weight: [O, C, taps], of the dense layer.
        found: the reconstruction of its inputs.
        mean: [C] float64, of its inputs on those images.
        covariance: [C, C] float64, the same.

    Example:
        >>> s = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
        >>> found = affine_reconstruction(s[0], s, torch.tensor([False, True]), ridge=1e-12)
        >>> round(held_out_error(torch.ones(1, 2, 1), found, s[0], s), 6)
        0.0
    """
    rows = weight.double()[:, found.removed]
    kept, removed, a = found.kept, found.removed, found.weights
    cross = a.T @ covariance[kept][:, removed]
    error = covariance[removed][:, removed] - cross - cross.T + a.T @ covariance[kept][:, kept] @ a
    offset = mean[removed] - a.T @ mean[kept] - found.shift
    squares = torch.einsum("odt,de,oet->", rows, error, rows)
    return float(squares) + float(torch.einsum("odt,d->o", rows, offset).square().sum())


def absorb_into_weight(weight: Tensor, reconstruction: AffineReconstruction) -> tuple[Tensor, Tensor]:
    """Absorb a reconstruction into a consumer's weight: ``W_K + W_D A'`` at each tap, and ``W_D shift``.

    Inside an image this gives the output that predicted channels would give. Where zero padding cuts a kernel
    off, the shift of the cut taps is counted too; least squares over patches has no such error.

    Args:
        weight: [O, C, taps], of the dense layer.
        reconstruction: of its inputs.

    Returns:
        The weight [O, K, taps] and what to add to the bias [O], float64.

    Example:
        >>> nil = torch.zeros(1, 1, dtype=torch.float64)
        >>> found = AffineReconstruction(torch.tensor([0]), torch.tensor([1]), nil + 2, nil[0] + 3, nil, nil[0])
        >>> [t.tolist() for t in absorb_into_weight(torch.tensor([[[1.0], [10.0]]]), found)]
        [[[[21.0]]], [30.0]]
    """
    wide = weight.double()
    w_k, w_d = wide[:, reconstruction.kept], wide[:, reconstruction.removed]
    absorbed = w_k + torch.einsum("odt,kd->okt", w_d, reconstruction.weights)
    return absorbed, torch.einsum("odt,d->o", w_d, reconstruction.shift)


def output_error(weight: Tensor, reconstruction: AffineReconstruction) -> Tensor:
    """Predict the variance of a layer's output error after :func:`absorb_into_weight`, [O] float64.

    ``sum over taps of w_D R w_D'`` with R the error covariance: prediction errors are taken to be uncorrelated
    between taps. Exact for layers of one tap; since neighbouring positions are correlated, too small for others.

    Args:
        weight: [O, C, taps], of the dense layer.
        reconstruction: of its inputs.
    """
    w_d = weight.double()[:, reconstruction.removed]
    return torch.einsum("odt,de,oet->o", w_d, reconstruction.residual, w_d).clamp_min(0.0)
