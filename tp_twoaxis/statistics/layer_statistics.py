"""Statistics of one layer, of what it writes and of what it reads: moments in, covariances and correlations out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.row_blocks import row_blocks
from tp_twoaxis.statistics.moments import CoMoments
from tp_twoaxis.statistics.pooling import Pooling

# activations of a constant channel scatter by rounding alone; below this share of mean^2 it is no signal
CONSTANT, CONSTANT_FLOAT64 = 1e-13, 1e-28


@dataclass
class LayerStatistics:
    """Statistics of one layer's C output channels; float64 tensors on the CPU.

    Attributes:
        name: the layer's name in the model.
        kind: its class, for example ``"Conv2d"``.
        shape: its weight's shape when it was calibrated.
        fingerprint: hash of its weights then.
        weight_power: [C] squared norm of each channel's weights, without bias.
        rows: moments of (image, position) rows, C wide.
        pooled: moments of outputs averaged over positions, one row an image.
        cross: moments of pooled outputs with the task variables, or None.
        task: moments of the task variables, shared by all layers, or None.
        columns: task variable -> its columns ``(start, stop)``.
        target: the default task variable, or None.
        inputs: moments of the (image, position) rows that the layer reads, C_in wide, or None: of positions of
            the input as it is given, without the zeros of padding. See ``calibrate(consumers=True)``.
        gradients: moments of first-order saliencies, one row an image, or None without ``gradients=True``.
        dtype: of the values that the layer wrote, which decides from when on a spread is one of rounding.
        pooling: ``"mean"``, or ``"cls"`` where pooled values of tokens are the first token's.

    Example:
        >>> from torch import nn
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
        >>> layer = calibrate(net, [(torch.randn(64, 8), torch.randint(4, (64,)))], progress=False)["1"]
        >>> layer.num_channels, layer.num_rows, layer.target_correlation("margin").shape
        (4, 64, torch.Size([4]))
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    fingerprint: str
    weight_power: Tensor
    rows: CoMoments
    pooled: CoMoments
    cross: CoMoments | None = None
    task: CoMoments | None = None
    columns: dict[str, tuple[int, int]] = field(default_factory=dict)
    target: str | None = None
    inputs: CoMoments | None = None
    gradients: CoMoments | None = None
    dtype: torch.dtype = torch.float32
    pooling: Pooling = "mean"

    @property
    def num_channels(self) -> int:
        """C."""
        return len(self.weight_power)

    @property
    def num_rows(self) -> int:
        """(image, position) rows behind the covariance; sampled ones stand for all of ``rows.weight``."""
        return self.rows.count

    @property
    def num_images(self) -> int:
        """Images behind the pooled values."""
        return self.pooled.count

    @property
    def mean(self) -> Tensor:
        """Mean output of each channel over all images and positions, [C]; over sampled rows where pooled is no mean."""
        return self.pooled.mean if self.pooling == "mean" else self.rows.mean

    @property
    def covariance(self) -> Tensor:
        """Covariance of the outputs over images and positions, [C, C]."""
        return self.rows.covariance

    @property
    def variance(self) -> Tensor:
        """Diagonal of the covariance, [C]; exactly 0 for channels that are constant up to rounding."""
        return self._variance(self.rows)

    @property
    def correlation(self) -> Tensor:
        """Correlation of the outputs, [C, C], diagonal 1; 0 between a constant channel and any other."""
        return _correlation(self.covariance, self.variance)

    @property
    def pooled_correlation(self) -> Tensor:
        """Correlation of the pooled outputs over images, [C, C], diagonal 1."""
        return _correlation(self.pooled.covariance, self._variance(self.pooled))

    @property
    def num_input_rows(self) -> int:
        """(image, position) rows behind the input's covariance."""
        return self._input_moments().count

    @property
    def input_mean(self) -> Tensor:
        """Mean of each channel that the layer reads, [C_in].

        Raises:
            TwoAxisError: inputs were not recorded.
        """
        return self._input_moments().mean

    @property
    def input_covariance(self) -> Tensor:
        """Covariance of the channels that the layer reads, [C_in, C_in].

        Raises:
            TwoAxisError: inputs were not recorded.
        """
        return self._input_moments().covariance

    def _input_moments(self) -> CoMoments:
        if self.inputs is None:
            raise TwoAxisError(
                f"{self.name}: what the layer reads was not recorded; call calibrate(consumers=True) (it leaves out "
                "nn.MultiheadAttention and inputs of more than 8192 numbers)"
            )
        return self.inputs

    @property
    def saliency(self) -> Tensor:
        """First-order Taylor saliency of each channel's output, mean over images, [C] in nats, not negative.

        ``mean_i |sum_p a_ip dL_i/da_ip|``; see :class:`~tp_twoaxis.statistics.gradients.OutputSaliency`.

        Raises:
            TwoAxisError: no gradients were gathered.
        """
        if self.gradients is None:
            raise TwoAxisError(
                f"{self.name}: expected statistics with gradients, got some without; "
                "gather them with calibrate(gradients=True), which needs labels"
            )
        return self.gradients.mean

    def _variance(self, moments: CoMoments) -> Tensor:
        variance = moments.variance
        least = (CONSTANT_FLOAT64 if self.dtype == torch.float64 else CONSTANT) * moments.mean.square()
        return torch.where(variance > least, variance, torch.zeros_like(variance))

    def target_correlation(self, name: str | None = None) -> Tensor:
        """Correlation of each pooled channel with a task variable.

        Args:
            name: the task variable; default the calibration's target.

        Returns:
            [C]; of ``one_vs_rest`` [C, K], a column a class. 0 where either side is constant.

        Raises:
            TwoAxisError: the variable was not recorded.
        """
        name = name or self.target
        if name not in self.columns or self.cross is None or self.task is None:
            recorded = ", ".join(self.columns) or "none: it ran with target=None"
            raise TwoAxisError(
                f"{self.name}: task variable {name!r} was not recorded (recorded: {recorded}); "
                "call calibrate() with labels and a target"
            )
        start, stop = self.columns[name]
        spread = torch.outer(self._variance(self.pooled), self._variance(self.task)[start:stop]).sqrt()
        covariance = self.cross.covariance[:, start:stop]
        rho = torch.where(spread > 0, covariance / spread, torch.zeros_like(spread)).clamp(-1.0, 1.0)
        return rho if name == "one_vs_rest" else rho[:, 0]


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
        self.dtype = layer.dtype
        self.rows = layer._input_moments()
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
            f"what a layer reads, got one that needs {what}; take site='producer' for it, or score='capture'"
        )


def _correlation(covariance: Tensor, variance: Tensor) -> Tensor:
    rho = torch.empty_like(covariance)
    for start, rows in row_blocks(covariance):
        spread = torch.outer(variance[start : start + len(rows)], variance).sqrt()
        rho[start : start + len(rows)] = torch.where(spread > 0, rows / spread, 0.0).clamp(-1.0, 1.0)
    return rho.fill_diagonal_(1.0)
