"""Information between one input channel of a layer and the layer's outputs, both Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.scores.information import information_from_r2


def adjacent_information(
    input_variance: Tensor, cross_covariance: Tensor, output_covariance: Tensor, *, noise: float = 0.1
) -> Tensor:
    """Mutual information ``I(X_k; Y) = -1/2 ln(1 - S_kY (S_YY + s2 I)^-1 S_Yk / S_kk)`` of each input X_k.

    The outputs are observed with independent noise of variance ``s2 = noise`` times their mean variance: a linear
    layer with as many outputs as inputs would otherwise tell every input to the last digit, and all channels
    alike. One factorisation serves all channels: O(C_out^2 (C_in + C_out)).

    Args:
        input_variance: [C_in].
        cross_covariance: [C_in, C_out].
        output_covariance: [C_out, C_out].
        noise: > 0, relative to the mean variance of Y.

    Returns:
        [C_in] nats, not negative; 0 for constant channels.

    Raises:
        TwoAxisError: ``noise`` is not positive.

    Example:
        >>> one = torch.ones(1, 1)
        >>> adjacent_information(torch.ones(2), torch.tensor([[1.0], [0.0]]), one, noise=0.25).tolist()
        [0.8047..., 0.0]
    """
    if not noise > 0:
        raise TwoAxisError(f"noise: expected a number above 0, got {noise}")
    s_yy = output_covariance.double()
    floor = noise * s_yy.diagonal().mean()
    if not bool(floor > 0):
        return torch.zeros(len(input_variance), dtype=torch.float64, device=s_yy.device)
    factor = torch.linalg.cholesky(s_yy + floor * torch.eye(len(s_yy), dtype=torch.float64, device=s_yy.device))
    whitened = torch.linalg.solve_triangular(factor, cross_covariance.double().mT, upper=False)
    variance = input_variance.double()
    explained = whitened.square().sum(0) / variance.clamp_min(torch.finfo(torch.float64).tiny)
    return information_from_r2(torch.where(variance > 0, explained, 0.0))
