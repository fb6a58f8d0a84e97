"""The ridge of a least-squares fit, chosen by the error on images that the fit did not see."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tp_twoaxis.reconstruction.affine import ridge_for
from tp_twoaxis.reconstruction.patch_moments import PatchMoments

# ridges that are tried first, relative to the mean variance, then the decades beside the best one
COARSE_RIDGES = (1e-6, 1e-4, 1e-2, 1.0, 1e2)


@dataclass(frozen=True)
class RidgeFit:
    """A change of a layer's weights, and how it was chosen.

    Attributes:
        ridge: relative to the mean variance of the predictors; ``inf`` where only means change, nan where nothing does.
        change: [B, P, O] float64.
        shift: [B, O] float64, change of the outputs at predictors of zero.
        factor: [B, P, P] Cholesky factor, of the best finite ridge.
        error: mean squared error on held-out rows after the change; nan without such rows.
        unchanged: the same before it.
    """

    ridge: float
    change: Tensor
    shift: Tensor
    factor: Tensor
    error: float = math.nan
    unchanged: float = math.nan


def ridge_fit(fit: PatchMoments, ridge: float) -> RidgeFit:
    """Solve ``(S_xx + ridge t I) A = S_xy`` in each block, t the mean variance of its predictors.

    Args:
        fit: with a symmetric scatter.
        ridge: > 0.

    Example:
        >>> moments = PatchMoments(1, 1, 1)
        >>> moments.update(torch.tensor([[[0.0]], [[2.0]]]), torch.tensor([[[1.0]], [[5.0]]]))
        >>> found = ridge_fit(moments, 1e-12)
        >>> round(found.change.item(), 6), round(found.shift.item(), 6)
        (2.0, 1.0)
    """
    factor = factor_with(fit, ridge)
    change = torch.cholesky_solve(fit.cross, factor)
    return RidgeFit(ridge, change, shift_of(fit, change), factor)


def choose_ridge(fit: PatchMoments, held_out: PatchMoments) -> RidgeFit:
    """Choose the ridge whose solution has the least error on held-out rows; or change the means alone, or nothing.

    Rows of one image resemble each other, so the number of rows says little about how far a fit may be trusted; other
    images do. (Ours; with rows of independent images it is the usual choice of a ridge by validation.)

    Args:
        fit: moments of the fitted images.
        held_out: the same of other images.

    Example:
        >>> moments = PatchMoments(1, 1, 1)
        >>> moments.update(torch.tensor([[[0.0]], [[2.0]]]), torch.tensor([[[1.0]], [[5.0]]]))
        >>> opposite = PatchMoments(1, 1, 1)
        >>> opposite.update(torch.tensor([[[0.0]], [[2.0]]]), torch.tensor([[[-1.0]], [[-5.0]]]))
        >>> choose_ridge(moments, moments).ridge, choose_ridge(moments, opposite).ridge
        (1e-07, nan)
    """
    fit.symmetrize()
    held_out.symmetrize()
    tried: dict[float, float] = {}
    best: RidgeFit | None = None

    def attempt(ridge: float) -> None:
        nonlocal best
        found = ridge_fit(fit, ridge)
        tried[ridge] = held_out.squared_error(found.change, found.shift)
        if best is None or tried[ridge] < tried[best.ridge]:
            best = found

    for ridge in COARSE_RIDGES:
        attempt(ridge)
    assert best is not None
    for ridge in (best.ridge / 10, best.ridge * 10):
        attempt(ridge)
    nothing = torch.zeros_like(fit.cross)
    unchanged = held_out.squared_error(nothing, torch.zeros_like(fit.target_mean))
    means = held_out.squared_error(nothing, fit.target_mean)
    error = tried[best.ridge]
    if error < min(means, unchanged):
        return RidgeFit(best.ridge, best.change, best.shift, best.factor, error, unchanged)
    if means < unchanged:
        return RidgeFit(math.inf, nothing, fit.target_mean.clone(), best.factor, means, unchanged)
    return RidgeFit(math.nan, nothing, torch.zeros_like(fit.target_mean), best.factor, unchanged, unchanged)


def default_ridge_fit(fit: PatchMoments) -> RidgeFit:
    """Fit with the ridge that :func:`~tp_twoaxis.reconstruction.affine.ridge_for` takes from the number of rows."""
    return ridge_fit(fit.symmetrize(), ridge_for(fit.count, fit.mean.shape[1]))


def factor_with(fit: PatchMoments, ridge: float) -> Tensor:
    """Factor ``S_xx + ridge t I`` of each block times the number of rows; 1 is added where nothing varies."""
    mean_scatter = fit.scatter.diagonal(dim1=1, dim2=2).mean(1)
    added = torch.where(mean_scatter > 0, ridge * mean_scatter, 1.0)
    regularised = fit.scatter.clone()
    regularised.diagonal(dim1=1, dim2=2).add_(added[:, None])
    factor: Tensor = torch.linalg.cholesky(regularised)
    return factor


def shift_of(fit: PatchMoments, change: Tensor) -> Tensor:
    """Give the shift [B, O] with which the fitted rows' mean error is zero."""
    return fit.target_mean - torch.einsum("bpo,bp->bo", change, fit.mean)
