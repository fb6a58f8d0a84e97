"""What a layer reads, under the names of what a layer writes, so that scores of outputs work on inputs too."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.statistics.layer_statistics import LayerStatistics


class InputStatistics(LayerStatistics):
    """Statistics of the C_in channels that a layer reads; float64 tensors on the CPU.

    Number, mean, covariance, variance and correlation of the channels are those of the input's (image, position)
    rows. Pooled values, correlations with the task and weight norms are not recorded at inputs: asking for
    them is an error.

    Args:
        layer: of ``calibrate(consumers=True)``.

    Raises:
        TwoAxisError: here, the layer's inputs were not recorded; later, a quantity that inputs do not have.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> stats = calibrate(net, [torch.randn(16, 3, 8, 8)], target=None, consumers=True, progress=False)
        >>> read = InputStatistics(stats["2"])
        >>> read.num_channels, read.correlation.shape, bool(read.mean.min() > 0)
        (8, torch.Size([8, 8]), True)
    """

    def __init__(self, layer: LayerStatistics) -> None:
        self.name = f"input of {layer.name}"
        self.kind = layer.kind
        self.shape = layer.shape
        self.fingerprint = layer.fingerprint
        self.rows = layer._read()
        self.columns = {}

    def __repr__(self) -> str:
        return f"InputStatistics({self.name}, {self.num_channels} channels, {self.num_rows} rows)"

    def __getattr__(self, name: str) -> NoReturn:
        # reached only for what __init__ left out
        if name in ("pooled", "weight_power"):
            raise self._unrecorded({"pooled": "pooled values", "weight_power": "weight norms"}[name])
        raise AttributeError(name)

    @property
    def num_channels(self) -> int:
        """C_in."""
        return len(self.rows.mean)

    @property
    def mean(self) -> Tensor:
        """Mean input of each channel over the rows, [C_in]."""
        return self.rows.mean

    @property
    def saliency(self) -> Tensor:
        """Not recorded at inputs.

        Raises:
            TwoAxisError: always.
        """
        raise self._unrecorded("first-order saliencies")

    def target_correlation(self, name: str | None = None) -> Tensor:
        """Not recorded at inputs.

        Raises:
            TwoAxisError: always.
        """
        raise self._unrecorded("correlations with the task")

    def _unrecorded(self, what: str) -> TwoAxisError:
        return TwoAxisError(
            f"{self.name}: expected a score of means, variances and correlations, which are all that is recorded of "
            f"what a layer reads, got one that asks for {what}; take site='producer' for it, or score='capture'"
        )
