"""Joint second moments of what a layer reads and what it writes, on a common coarse grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tp_twoaxis.statistics.layers import num_channels
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.reader_inputs import InputMoments, num_inputs

CELLS = 16
# float64 numbers in a layer's accumulators: 1 GiB
MAX_NUMBERS = 2**27


class AdjacentMoments:
    """Variances of a layer's inputs, covariance of its outputs, and the covariance between the two.

    A row is one image and one of at most 16 cells: positions, in their order in memory, are cut into equally
    many cells on both sides and averaged, so that a stride or padding does not shift the two against
    each other by more than a cell. For maps the cells are bands of rows of the image.

    Args:
        layer: a convolution or linear layer.

    Attributes:
        too_wide: the accumulators would take more than 1 GiB; nothing is accumulated then.

    Example:
        >>> moments = AdjacentMoments(nn.Conv2d(3, 5, 3))
        >>> moments.update(torch.randn(4, 64, 3), torch.randn(4, 36, 5))
        >>> moments.rows, moments.input_variance.shape, moments.output_covariance.shape, moments.cross_covariance.shape
        (64, torch.Size([3]), torch.Size([5, 5]), torch.Size([3, 5]))
    """

    def __init__(self, layer: nn.Module) -> None:
        read, written = num_inputs(layer), num_channels(layer)
        self.too_wide = (read + written) * written > MAX_NUMBERS
        self._inputs = InputMoments(layer)
        self._outputs = CoMoments(0 if self.too_wide else written)
        self._cross = CoMoments(*((0, 0) if self.too_wide else (read, written)))

    @property
    def rows(self) -> int:
        """Rows seen: images times cells."""
        return self._outputs.count

    @property
    def input_variance(self) -> Tensor:
        """[C_in] float64."""
        return self._inputs.variance

    @property
    def output_covariance(self) -> Tensor:
        """[C_out, C_out] float64."""
        return self._outputs.covariance

    @property
    def cross_covariance(self) -> Tensor:
        """[C_in, C_out] float64."""
        return self._cross.covariance

    @property
    def finite(self) -> bool:
        """Whether all numbers so far are finite."""
        return self._inputs.finite and bool(torch.isfinite(self._outputs.scatter).all())

    def update(self, read: Tensor, written: Tensor) -> None:
        """Take in one call of the layer."""
        if self.too_wide:
            return
        cells = min(CELLS, read.shape[1], written.shape[1])
        x, y = (F.adaptive_avg_pool1d(side.mT.float(), cells).mT.cpu() for side in (read, written))
        self._inputs.update(x, y)
        self._outputs.update(y)
        self._cross.update(x, y)
