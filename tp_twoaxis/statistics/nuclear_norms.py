"""How much of an image's feature maps hangs on one channel: drops of the nuclear norm (Sui et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tp_twoaxis.runtime.layers import in_channels_of
from tp_twoaxis.statistics.activations import InputMoments

# trapezoid rule in ln s; the integrand's singularities lie pi/2 off the real axis: error exp(-pi^2 / step) = 2e-11
_STEP = 0.4
_SMALLEST, _LARGEST = math.log(1e-10), math.log(1e5)
# maps of a batch are decomposed in parts of about this many numbers
_BLOCK_NUMBERS = 2**20


def nuclear_norm_drops(maps: Tensor) -> Tensor:
    """Drop of the nuclear norm of each image's maps when one channel's row is set to zero.

    With ``A = V diag(sigma) U'`` and ``n_k = 1 - sum_i V_ki^2``, the drop ``|A|_* - |A without row k|_*`` is

        ``1/pi int_0^inf -ln(n_k + sum_i V_ki^2 s^2 / (s^2 + sigma_i^2)) ds``,

    which follows from ``tr G^(1/2) = 1/pi int s^-1/2 (G + s)^-1 G`` and the determinant of a rank-one change.
    So one decomposition of the smaller Gram matrix serves all channels: O(C P min(C, P)) instead of C
    decompositions of that cost.

    Args:
        maps: [..., C, P]: images, channels, positions.

    Returns:
        [..., C] float64, not negative, accurate to about 1e-7 of the image's largest singular value.

    Example:
        >>> maps = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> [round(x, 6) for x in nuclear_norm_drops(maps).tolist()]
        [1.0, 2.0, 0.0]
    """
    maps = maps.double()
    channels, positions = maps.shape[-2:]
    if channels <= positions:
        power, vectors = torch.linalg.eigh(maps @ maps.mT)
        share = vectors.square()
        left = torch.zeros(share.shape[:-1], dtype=share.dtype, device=share.device)
    else:
        # a basis of the column space first: vectors from the small Gram matrix alone would lose their right angles
        basis, triangle = torch.linalg.qr(maps)
        power, turned = torch.linalg.eigh(triangle @ triangle.mT)
        share = (basis @ turned).square()
        left = (1.0 - share.sum(-1)).clamp_min(0.0)
    power = power.clamp_min(0.0)
    scale = power[..., -1:].clamp_min(1e-300).sqrt()
    nodes = torch.arange(_SMALLEST, _LARGEST, _STEP, dtype=power.dtype, device=power.device).exp()
    relative = power / scale.square()
    fractions = nodes.square() / (nodes.square() + relative[..., None])
    logarithms = -(left[..., None] + share @ fractions).clamp(1e-300, 1.0).log()
    # beyond the last node the integrand is |a_k|^2 / s^2 to first order
    tail = (share @ relative[..., None])[..., 0] / nodes[-1] / math.exp(_STEP / 2)
    drops: Tensor = scale * ((logarithms * nodes).sum(-1) * _STEP + tail) / math.pi
    return drops


class ChannelIndependence:
    """Mean over images of :func:`nuclear_norm_drops` of what a layer reads.

    Args:
        layer: a convolution or linear layer.

    Attributes:
        images: images seen.
        positions: of the widest maps seen; with one position a map is a number and the nuclear norm of the
            maps is their Euclidean norm.

    Example:
        >>> independence = ChannelIndependence(nn.Conv2d(2, 1, 1))
        >>> independence.update(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), torch.zeros(1, 2, 1))
        >>> [round(x, 6) for x in independence.mean.tolist()]
        [3.0, 1.0]
    """

    def __init__(self, layer: nn.Module) -> None:
        self.images = 0
        self.positions = 0
        self._total = torch.zeros(in_channels_of(layer), dtype=torch.float64)
        self._moments = InputMoments(layer)

    @property
    def mean(self) -> Tensor:
        """Mean drop an image, [C_in] float64."""
        return self._total / max(self.images, 1)

    @property
    def finite(self) -> bool:
        """Whether all numbers so far are finite."""
        return bool(torch.isfinite(self._total).all())

    @property
    def varying(self) -> Tensor:
        """Which channels are not constant up to rounding, [C_in] bool."""
        return self._moments.varying

    def update(self, read: Tensor, written: Tensor) -> None:
        """Take in one call of the layer; what it wrote is not looked at."""
        self._moments.update(read, written)
        self.positions = max(self.positions, read.shape[1])
        self.images += len(read)
        for part in torch.split(read, max(1, _BLOCK_NUMBERS // max(read[0].numel(), 1))):
            if bool(torch.isfinite(part).all()):
                self._total += nuclear_norm_drops(part.mT).sum(0).cpu()
            else:
                self._total += torch.nan  # a decomposition would raise; the layer is named once all batches ran
