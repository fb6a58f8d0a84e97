"""A layer's weights without some of its inputs: fitted to what the dense layer computes from whole patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tp_twoaxis.reconstruction.affine import LEAST_RIDGE, ridge_regression
from tp_twoaxis.reconstruction.ridge import COARSE_RIDGES

# a ridge is chosen by the error of so many outputs; of wider layers by that of as many random mixtures of them
JUDGED_OUTPUTS = 64


@dataclass(frozen=True)
class Patches:
    """Moments of what one output of a layer is computed from: channel by channel, each with all taps.

    Attributes:
        fitted: mean [C_in taps] and covariance [C_in taps, C_in taps], float64.
        held_out: the same of other images, to choose the ridge of a fit; None if there are none.
    """

    fitted: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor] | None

    def refit(self, weight: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
        """Fit the weights on what remains, with the ridge that serves the layer best on the images held out.

        With K kept and D missing numbers the change of the kept weights is ``W_D S_DK (S_KK + ridge t I)^-1``, t the
        mean variance: what :func:`~tp_twoaxis.reconstruction.affine.absorb_into_weight` makes of the best prediction
        of D from K, at the cost of as many right-hand sides as the layer has outputs.

        Args:
            weight: [O, C_in taps], of the layer.
            missing: [C_in taps] bool.

        Returns:
            [O, C_in taps] float64, zero where inputs are missing, and what to add to the bias, [O] float64.

        Example:
            >>> s = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)  # x1 = 2 x0
            >>> patches = Patches((torch.zeros(2).double(), s), None)
            >>> weight, shift = patches.refit(torch.ones(1, 2), torch.tensor([False, True]))
            >>> weight.round(decimals=4).tolist(), shift.tolist()
            ([[3.0, 0.0]], [0.0])
        """
        weight = weight.double()
        mean, covariance = self.fitted
        kept, gone = (~missing).nonzero()[:, 0], missing.nonzero()[:, 0]
        rows = covariance[kept]
        own, cross, lost = rows[:, kept], rows[:, gone], weight[:, gone]
        ridge = LEAST_RIDGE
        if self.held_out is not None:
            judged = _mixtures(lost)
            products = cross @ judged.T
            errors = {}
            for candidate in COARSE_RIDGES:
                change = ridge_regression(own, products, candidate)
                errors[candidate] = self._held_out_error(kept, gone, change, judged)
            ridge = min(errors, key=lambda candidate: errors[candidate])
        change = ridge_regression(own, cross @ lost.T, ridge)
        refitted = torch.zeros_like(weight)
        refitted[:, kept] = weight[:, kept] + change.T
        return refitted, lost @ mean[gone] - change.T @ mean[kept]

    def _held_out_error(self, kept: Tensor, gone: Tensor, change: Tensor, lost: Tensor) -> float:
        """Mean squared error of a layer's outputs on the images held out, summed over outputs.

        Args:
            kept: [K] int64.
            gone: [D] int64.
            change: [K, O], of the kept weights.
            lost: [O, D], the missing weights.
        """
        assert self.held_out is not None
        held_mean, held_covariance = self.held_out
        error = held_covariance.new_empty(len(kept) + len(gone), change.shape[1])
        error[kept], error[gone] = change, -lost.T
        # the fit makes the mean error of its own images zero
        offset = error.T @ (held_mean - self.fitted[0])
        return float((error * (held_covariance @ error)).sum()) + float(offset.square().sum())


def _mixtures(weight: Tensor) -> Tensor:
    """Mix outputs with random signs where there are many, so that summed squared errors keep their expectation."""
    outputs = len(weight)
    if outputs <= JUDGED_OUTPUTS:
        return weight
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (JUDGED_OUTPUTS, outputs), generator=generator, dtype=torch.int8)
    return (2.0 * signs.to(weight) - 1.0) @ weight / math.sqrt(JUDGED_OUTPUTS)
