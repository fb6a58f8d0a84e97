"""Whether permuted labels change the target axis alone, and whether input powers are exact (C3, C4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from tp_twoaxis.diagnostics.axis_coordinates import (
    cell_correlation,
    local_axis,
    relative_depths,
    target_axis,
    task_cells,
)
from tp_twoaxis.diagnostics.cell_figures import against_depth, panels
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, EvidenceInputs, NotApplicableError, Section
from tp_twoaxis.diagnostics.run_aggregates import best_estimate
from tp_twoaxis.reconstruction.patches import patch_rows, patch_size
from tp_twoaxis.runtime.batches import read_batch
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.inputs import CallSignature, Inputs
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
DROPPED = 0.5


def label_permutation_table(inputs: EvidenceInputs) -> pd.DataFrame:
    """Calibrate on labels as they are and on permuted ones, with everything else the same (C3).

    Args:
        inputs: with labelled images.

    Returns:
        A row for each cell with the columns ``layer``, ``depth``, ``task_mi`` and ``task_mi_permuted`` (means over
        channels of M about the true margin, nats), ``task_mi_chance`` (1 / (2 n) nats, what unrelated channels show on
        average over n images), ``ratio`` (of the second to the first), ``local_difference`` (the
        largest of I and R over channels) and ``local_equal`` (1.0 where both are equal to the bit, else 0.0).

    Raises:
        NotApplicableError: there are no labels; see also
            :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> images = [(torch.randn(128, 3, 6, 6), torch.randint(8, (128,)))]
        >>> inputs = EvidenceInputs(net, calibrate(net, images, progress=False), images, progress=False)
        >>> label_permutation_table(inputs)[["layer", "local_equal"]].values.tolist()
        [['0', 1.0]]
    """
    cells, depths = task_cells(inputs), relative_depths(inputs.cells())
    call = CallSignature.of(unwrap(inputs.model))
    batches = [read_batch(batch, number, call=call) for number, batch in enumerate(inputs.calibration)]
    known = [labels for _, labels in batches if labels is not None]
    if len(known) < len(batches):
        raise NotApplicableError("the images have no labels; there is nothing to permute")
    together = torch.cat(known)
    shuffled = together[torch.randperm(len(together), generator=torch.Generator().manual_seed(0))]
    # both are calibrated here: statistics of another batch size or device differ in the last bits
    true, permuted = (
        calibrate(inputs.model, _labelled(batches, labels), layers=cells, max_images=None, progress=inputs.progress)
        for labels in (together, shuffled)
    )
    rows: list[dict[str, Any]] = []
    for name in cells:
        first, second = local_axis(true[name]), local_axis(permuted[name])
        real, chance = (float(target_axis(layer, "margin").task_mi.mean()) for layer in (true[name], permuted[name]))
        difference = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
        rows.append(
            {
                "layer": name,
                "depth": depths[name],
                "task_mi": real,
                "task_mi_permuted": chance,
                "task_mi_chance": 0.5 / true.num_images,
                "ratio": chance / real if real > 0 else float("nan"),
                "local_difference": difference,
                "local_equal": float(all(torch.equal(a, b) for a, b in zip(first, second, strict=True))),
            }
        )
    return pd.DataFrame(rows)


def _labelled(batches: list[tuple[Inputs, Tensor | None]], labels: Tensor) -> list[tuple[Inputs, Tensor]]:
    parts = torch.split(labels, [len(inputs) for inputs, _ in batches])
    return [(inputs, own) for (inputs, _), own in zip(batches, parts, strict=True)]


class PatchCovariance:
    """Covariance of the patches that a layer's outputs are computed from, padding included, at all positions.

    Args:
        layer: a convolution or linear layer.

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
                    "largest_difference": float(difference.max()) if len(difference) else float("nan"),
                }
            )
    return pd.DataFrame(rows)


def _observer(patches: PatchCovariance) -> Callable[..., None]:
    def hook(layer: nn.Module, read: tuple[Tensor, ...], output: Tensor) -> None:
        patches.update(read[0], output.shape[2:].numel())

    return hook


def control_claims(permuted: pd.DataFrame | None, exact: pd.DataFrame | None) -> list[Claim]:
    """Judge C3 and C4.

    Args:
        permuted: of :func:`label_permutation_table`, or None where it cannot be had.
        exact: of :func:`exact_power_table`, or None.
    """
    claims = []
    if permuted is not None:
        claims += [
            Claim(
                "Permuting the labels takes task information away (mean of M with permuted labels over M).",
                "",
                best_estimate(permuted, "ratio"),
                below=DROPPED,
                note="The paper's number is lost; the bound is ours. What stays is the bias of so many images, "
                "1 / (2 n) nats on average, and the network's confidence.",
            ),
            Claim(
                "Permuting the labels leaves capture and overlap as they are (share of layers where both are equal to "
                "the last bit).",
                "unchanged",
                best_estimate(permuted, "local_equal"),
                above=0.999,
            ),
        ]
    if exact is not None:
        words = {"all": "all positions", "sampled": "sampled positions"}
        claims += [
            Claim(
                f"Rayleigh quotients from output variances, of {words[positions]}, rank channels as those from an "
                "explicit patch covariance.",
                "> 0.999",
                best_estimate(exact[exact.positions == positions], "rho"),
                above=least,
                note="" if positions == "all" else "The bound for sampled positions is ours.",
            )
            for positions, least in (("all", 0.999), ("sampled", 0.95))
        ]
    return claims


def controls_section(inputs: EvidenceInputs) -> Section:
    """Assemble the controls C3 and C4 of one network; intervals are over its layers.

    Raises:
        NotApplicableError: neither of the two can be computed; the message is of the first.
    """
    permuted, why_not_permuted = _attempt(label_permutation_table, inputs)
    exact, why_not_exact = _attempt(exact_power_table, inputs)
    reasons = [reason for reason in (why_not_permuted, why_not_exact) if reason is not None]
    if permuted is None and exact is None:
        raise reasons[0]
    tables = {"label_permutation": permuted, "exact_power": exact}
    drawings = []
    if permuted is not None:
        drawings.append(
            Drawing(
                "label_permutation",
                lambda: permutation_figure(permuted),
                "Mean task information of the channels of each layer with the true labels and with permuted ones "
                "(logarithmic). Where the two meet, the images do not suffice to tell task information from chance.",
            )
        )
    return Section(
        "controls",
        "Does the target axis measure the task, and the local axis the input alone?",
        {name: table for name, table in tables.items() if table is not None},
        control_claims(permuted, exact),
        drawings,
        follows="The local axis may be computed without labels, from outputs alone and from some of their positions.",
        fails=" ".join(
            [
                "A margin of permuted labels still measures how confident the network is, so that it keeps some "
                f"information where a layer knows that. The exact comparison is of the first {EXACT_IMAGES} images and "
                f"of layers of at most {LARGEST_EXACT:,} inputs x taps.",
                *(f"Left out: {reason}." for reason in reasons),
            ]
        ),
    )


def _attempt(
    compute: Callable[[EvidenceInputs], pd.DataFrame], inputs: EvidenceInputs
) -> tuple[pd.DataFrame | None, NotApplicableError | None]:
    try:
        return compute(inputs), None
    except NotApplicableError as reason:
        return None, reason


def permutation_figure(permuted: pd.DataFrame) -> Figure:
    """Draw task information with true and with permuted labels.

    Args:
        permuted: of :func:`label_permutation_table`.

    Example:
        >>> cells = pd.DataFrame({"depth": [0.0, 1.0], "task_mi": [0.01, 0.02], "task_mi_permuted": [0.001, 0.001],
        ...                       "task_mi_chance": 0.0005})
        >>> permutation_figure(cells).axes[0].get_yscale()
        'log'
    """
    figure, (axes,) = panels(1, 3.0)
    chance = float(permuted.task_mi_chance.iloc[0])
    axes.axhline(chance, color="0.4", linewidth=1.0, linestyle="--", label="unrelated, $1 / (2 n)$")
    against_depth(axes, permuted, {"task_mi": "true labels", "task_mi_permuted": "permuted labels"}, mean=False)
    axes.set_yscale("log")
    axes.set_ylabel("mean task information (nats)")
    return figure
