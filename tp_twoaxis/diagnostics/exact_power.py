"""Whether signal powers from outputs are those of an explicit covariance of the patches that are read (C4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from tp_twoaxis.diagnostics.axis_coordinates import cell_correlation, relative_depths
from tp_twoaxis.diagnostics.evidence import EvidenceInputs, NotApplicableError
from tp_twoaxis.reconstruction.patches import patch_rows, patch_size
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.layers import blocks_of, channel_layers, channel_weight
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.scores.local import rayleigh_quotient
from tp_twoaxis.statistics.calibration import calibrate
from tp_twoaxis.statistics.moments import float64_device
from tp_twoaxis.statistics.recorder import Positions

# the paper's bound: a patch covariance of this many inputs x taps takes 10 MiB
LARGEST_EXACT = 1152
# the comparison is of arithmetic on the same images, so that a few of them are enough; ours
EXACT_IMAGES = 64
BLOCK_NUMBERS = 2**22


class PatchCovariance:
    """Covariance of the patches that a layer's outputs are computed from, padding included, at all positions.

    Args:
        layer: a convolution that is not transposed.

    Example:
        >>> conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        >>> patches = PatchCovariance(conv)
        >>> patches.update(torch.randn(8, 2, 5, 5), 25)
        >>> patches.covariance.shape, patches.power.shape
        (torch.Size([2, 9, 9]), torch.Size([4]))
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.rows = 0
        self._sum: Tensor | float = 0.0
        self._products: Tensor | float = 0.0

    def update(self, x: Tensor, positions: int) -> None:
        """Take in what the layer reads, [n, C_in, *spatial], of which it makes so many output positions an image."""
        everywhere = torch.arange(positions, device=x.device)
        step = max(1, BLOCK_NUMBERS // (positions * blocks_of(self.layer) * patch_size(self.layer)))
        for images in torch.split(x, step):
            rows = patch_rows(images, self.layer, everywhere).flatten(0, 1).transpose(0, 1)
            rows = rows.to(float64_device(x.device), torch.float64)
            self.rows += rows.shape[1]
            self._sum = self._sum + rows.sum(1)
            self._products = self._products + rows.transpose(1, 2) @ rows

    @property
    def covariance(self) -> Tensor:
        """Of the patches of each block of channels, [blocks, patch, patch] float64."""
        mean = torch.as_tensor(self._sum) / self.rows
        return torch.as_tensor(self._products) / self.rows - mean[:, :, None] * mean[:, None]

    @property
    def power(self) -> Tensor:
        """Signal power ``w' S w`` of each channel of the layer, [C]."""
        covariance = self.covariance
        weight = channel_weight(self.layer).to(covariance).reshape(len(covariance), -1, covariance.shape[-1])
        return ((weight @ covariance) * weight).sum(-1).flatten()


def exact_power_table(inputs: EvidenceInputs, images: int = EXACT_IMAGES) -> pd.DataFrame:
    """Compare input power along the weights from an explicit patch covariance with that of the outputs (C4).

    Args:
        inputs: with the images of the calibration.
        images: how many of them are compared on.

    Returns:
        A row for each cell of at most 1,152 inputs x taps and each choice of positions, ``all`` and ``sampled`` (as
        many as ``calibrate(positions="auto")`` takes of so many images), with the columns ``layer``, ``depth``,
        ``positions``, ``rho`` (Spearman, of the exact Rayleigh quotient ``w' S w / |w|^2`` with the streaming one) and
        ``largest_difference`` (relative, over channels).

    Raises:
        NotApplicableError: every convolution is larger, or there is none.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> images = [(torch.randn(128, 3, 6, 6), torch.randint(8, (128,)))]
        >>> inputs = EvidenceInputs(net, calibrate(net, images, progress=False), images, progress=False)
        >>> bool(exact_power_table(inputs).largest_difference.max() < 1e-4)
        True
    """
    depths, network = relative_depths(inputs.cells()), unwrap(inputs.model)
    layers = {
        name: layer
        for name, layer in channel_layers(network, inputs.cells()).items()
        if patch_size(layer) <= LARGEST_EXACT and not isinstance(layer, _ConvTransposeNd)
    }
    if not layers:
        raise NotApplicableError(f"no convolution has at most {LARGEST_EXACT} inputs x taps; none is compared exactly")
    exact = {name: PatchCovariance(layer) for name, layer in layers.items()}
    with forward_pass(network, inputs.calibration, what="patches", max_images=images, progress=inputs.progress) as run:
        for name, layer in layers.items():
            run.hook(layer, _observer(exact[name]))
        for _ in run:
            pass
    choices: dict[str, Positions] = {"all": "all", "sampled": "auto"}
    rows: list[dict[str, Any]] = []
    for label, positions in choices.items():
        streaming = calibrate(
            network,
            inputs.calibration,
            target=None,
            layers=layers,
            max_images=images,
            positions=positions,
            progress=inputs.progress,
        )
        for name in layers:
            power = streaming[name].weight_power
            quotient = rayleigh_quotient(exact[name].power.cpu(), power)
            found = rayleigh_quotient(streaming[name].variance, power)
            varies = found > 0
            difference = ((found - quotient).abs() / quotient)[varies]
            rows.append(
                {
                    "layer": name,
                    "depth": depths[name],
                    "positions": label,
                    "rho": cell_correlation(quotient[varies], found[varies]),
                    "largest_difference": float(difference.max()) if len(difference) else math.nan,
                }
            )
    return pd.DataFrame(rows)


def _observer(patches: PatchCovariance) -> Callable[..., None]:
    def hook(layer: nn.Module, read: tuple[Tensor, ...], output: Tensor) -> None:
        patches.update(read[0], output.shape[2:].numel())

    return hook
