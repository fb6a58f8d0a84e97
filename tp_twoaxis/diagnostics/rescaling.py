"""Which rankings change when convolutions are rescaled before their BatchNorm and the network does not (table 7)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tp_twoaxis.diagnostics.axis_coordinates import relative_depths
from tp_twoaxis.diagnostics.cell_figures import panels, strips
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, EvidenceInputs, NotApplicableError, Section
from tp_twoaxis.diagnostics.rank_agreement import FEWEST_CHANNELS
from tp_twoaxis.diagnostics.run_aggregates import best_estimate, share_estimate
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.layers import channel_weight, out_channels_of
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.statistics.moments import float64_device

# images that logits and variances are compared on; ours
IMAGES = 256
EXACT_IMAGES = 32
# float64 leaves this much of the logits' size at most, where the two networks are one function
EXACT = 1e-9
LARGEST_EXPONENT = 2.0
QUANTITIES = {
    "norm": "weight norm",
    "folded_norm": "weight norm with BatchNorm folded in",
    "variance": "variance before BatchNorm",
    "normalised_variance": "variance after BatchNorm",
}


def norm_pairs(model: nn.Module, batches: Iterable[Any]) -> dict[str, str]:
    """Find the convolutions whose output a BatchNorm reads as it is, by running the network on one image.

    Args:
        model: the network; it is left as it was.
        batches: images for it.

    Returns:
        Name of the convolution -> name of its BatchNorm, in the order of the network's modules. Transposed
        convolutions, and BatchNorms without running statistics, are left out.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> norm_pairs(net.eval(), [torch.randn(1, 3, 8, 8)])
        {'0': '1'}
    """
    network = unwrap(model)
    written: list[tuple[str, Tensor]] = []
    pairs: dict[str, str] = {}

    def wrote(name: str) -> Callable[..., None]:
        return lambda layer, read, output: written.append((name, output))

    def reads(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, read: tuple[Tensor, ...], output: Tensor) -> None:
            pairs.update({producer: name for producer, tensor in written if tensor is read[0]})

        return hook

    with forward_pass(network, batches, what="find BatchNorms", max_images=1) as run:
        for name, module in network.named_modules():
            if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
                run.hook(module, wrote(name))
            elif isinstance(module, _BatchNorm) and module.running_var is not None:
                run.hook(module, reads(name))
        for _ in run:
            pass
    return {name: pairs[name] for name, _ in network.named_modules() if name in pairs}


def rescaled(model: nn.Module, pairs: dict[str, str], *, seed: int = 0, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a network and rescale its convolutions, each channel by its own factor, so that its function stays.

    A channel's weights and bias are multiplied by ``s = 2^u``, u uniform in [-2, 2]; its BatchNorm's running mean
    becomes ``s m`` and its variance ``s^2 (v + eps) - eps``. In exact arithmetic the outputs are those of before.

    Args:
        model: the network; it is left as it was.
        pairs: of :func:`norm_pairs`.
        seed: of the factors.
        dtype: of the copy's numbers; default the network's own.

    Returns:
        The copy, in eval mode.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().double()
        >>> images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        >>> other = rescaled(net, {"0": "1"})
        >>> torch.allclose(other(images), net(images)), torch.allclose(other[0].weight, net[0].weight)
        (True, False)
    """
    network = copy.deepcopy(unwrap(model)).eval()
    if dtype is not None:
        network.to(float64_device(next(network.parameters()).device), dtype)
    generator = torch.Generator().manual_seed(seed)
    modules = dict(network.named_modules())
    with torch.no_grad():
        for producer, norm in pairs.items():
            layer: Any = modules[producer]
            batch_norm: Any = modules[norm]
            drawn = torch.rand(out_channels_of(layer), generator=generator, dtype=torch.float64)
            scale = 2.0 ** (LARGEST_EXPONENT * (2.0 * drawn - 1.0))
            layer.weight.copy_(layer.weight.cpu().double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
            if layer.bias is not None:
                layer.bias.copy_(layer.bias.cpu().double() * scale)
            variance = batch_norm.running_var.cpu().double()
            batch_norm.running_mean.copy_(batch_norm.running_mean.cpu().double() * scale)
            batch_norm.running_var.copy_(scale.square() * (variance + batch_norm.eps) - batch_norm.eps)
    return network


@dataclass
class Observed:
    """What a network gives on some images.

    Attributes:
        logits: [n, K] float64.
        variances: layer -> [C] float64, of its outputs over images and positions.
    """

    logits: Tensor
    variances: dict[str, Tensor] = field(default_factory=dict)


class _ChannelVariance:
    """Variance of each channel of a layer's outputs, around the first batch's means."""

    def __init__(self) -> None:
        self.rows = 0
        self.centre: Tensor | None = None
        self.sums: Any = 0.0
        self.squares: Any = 0.0

    def hook(self, layer: nn.Module, read: tuple[Tensor, ...], output: Tensor) -> None:
        # convolutions and BatchNorms both have the channels behind the images
        rows = output.detach().transpose(0, 1).flatten(1).to(float64_device(output.device), torch.float64)
        self.centre = rows.mean(1, keepdim=True) if self.centre is None else self.centre
        rows = rows - self.centre
        self.rows += rows.shape[1]
        self.sums = self.sums + rows.sum(1)
        self.squares = self.squares + rows.square().sum(1)

    @property
    def value(self) -> Tensor:
        return torch.as_tensor(self.squares / self.rows - (self.sums / self.rows) ** 2).cpu()


def observe(model: nn.Module, batches: Iterable[Any], layers: Sequence[str], images: int) -> Observed:
    """Run a network on the first images and note its logits and the variances of some layers' outputs.

    Args:
        model: a classifier; it is left as it was.
        batches: images for it.
        layers: names of convolutions and BatchNorms.
        images: how many.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> seen = observe(net, [torch.randn(8, 3, 6, 6)], ["0"], 4)
        >>> seen.logits.shape, seen.variances["0"].shape
        (torch.Size([4, 4]), torch.Size([4]))
    """
    network = unwrap(model)
    modules = dict(network.named_modules())
    variances = {name: _ChannelVariance() for name in layers}
    with forward_pass(network, batches, what="compare", max_images=images) as run:
        for name, variance in variances.items():
            run.hook(modules[name], variance.hook)
        logits = torch.cat([run.logits(batch).cpu().double() for batch in run.batches])
    return Observed(logits, {name: variance.value for name, variance in variances.items()})


def rescaling_tables(inputs: EvidenceInputs) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rescale the network and compare its outputs and its channels' rankings with those of before.

    Args:
        inputs: with images; labels are not needed.

    Returns:
        Two tables. A row for each precision (``exact``, that of a copy in float64, and the network's own) with the
        columns ``precision``, ``images``, ``largest``, ``mean`` (absolute changes of logits), ``relative_rms`` (root
        mean square of the changes over that of the logits) and ``top1_agreement``; and a row for each cell with a
        BatchNorm, columns ``layer``, ``depth`` and Kendall's tau of the varying channels before and after by ``norm``,
        ``folded_norm``, ``variance`` and ``normalised_variance``.

    Raises:
        NotApplicableError: no BatchNorm reads a convolution, or the network is another function after rescaling.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        >>> net, images = nn.Sequential(*parts).eval(), [(torch.randn(32, 3, 6, 6), torch.randint(8, (32,)))]
        >>> inputs = EvidenceInputs(net, calibrate(net, images, progress=False), images, progress=False)
        >>> logits, ranks = rescaling_tables(inputs)
        >>> logits.precision.tolist(), ranks.folded_norm.round(3).tolist()
        (['exact', 'float32'], [1.0])
    """
    cells, network = inputs.cells(), unwrap(inputs.model)
    pairs = norm_pairs(network, inputs.calibration)
    if not any(name in pairs for name in cells):
        raise NotApplicableError("no BatchNorm reads the output of a convolution; there is nothing to rescale")
    exact = [
        observe(other, inputs.calibration, [], EXACT_IMAGES)
        for other in (
            rescaled(network, {}, dtype=torch.float64),
            rescaled(network, pairs, seed=inputs.seed, dtype=torch.float64),
        )
    ]
    logits = [_logit_changes("exact", *exact)]
    if logits[0]["relative_rms"] > EXACT:
        raise NotApplicableError(
            "the network changes when convolutions are rescaled before their BatchNorm "
            f"(relative change {logits[0]['relative_rms']:.1e}): it reads a convolution's output elsewhere too"
        )
    other = rescaled(network, pairs, seed=inputs.seed)
    read = [name for name in cells if name in pairs]
    layers = [*read, *(pairs[name] for name in read)]
    before, after = (observe(model, inputs.calibration, layers, IMAGES) for model in (network, other))
    precision = str(next(network.parameters()).dtype).removeprefix("torch.")
    logits.append(_logit_changes(precision, before, after))
    depths = relative_depths(cells)
    ranks: list[dict[str, Any]] = []
    for name in read:
        active = inputs.statistics[name].variance > 0
        first, second = (
            _quantities(model, name, pairs[name], seen) for model, seen in ((network, before), (other, after))
        )
        taus = {key: _kendall(first[key][active], second[key][active]) for key in QUANTITIES}
        ranks.append({"layer": name, "depth": depths[name], **taus})
    return pd.DataFrame(logits), pd.DataFrame(ranks)


def _logit_changes(precision: str, before: Observed, after: Observed) -> dict[str, Any]:
    change = (after.logits - before.logits).abs()
    return {
        "precision": precision,
        "images": len(change),
        "largest": float(change.max()),
        "mean": float(change.mean()),
        "relative_rms": float(change.square().mean().sqrt() / before.logits.square().mean().sqrt()),
        "top1_agreement": float((after.logits.argmax(1) == before.logits.argmax(1)).double().mean()),
    }


def _quantities(network: nn.Module, producer: str, norm: str, seen: Observed) -> dict[str, Tensor]:
    modules = dict(network.named_modules())
    weight_norm = channel_weight(modules[producer]).cpu().double().norm(dim=1)
    batch_norm: Any = modules[norm]
    factor = (batch_norm.running_var.cpu().double() + batch_norm.eps).rsqrt()
    if batch_norm.affine:
        factor = factor * batch_norm.weight.detach().cpu().double().abs()
    return {
        "norm": weight_norm,
        "folded_norm": weight_norm * factor,
        "variance": seen.variances[producer],
        "normalised_variance": seen.variances[norm],
    }


def _kendall(a: Tensor, b: Tensor) -> float:
    return float(kendalltau(a.numpy(), b.numpy()).statistic) if len(a) >= FEWEST_CHANNELS else math.nan


def rescaling_claims(logits: pd.DataFrame, ranks: pd.DataFrame) -> list[Claim]:
    """Judge table 7.

    Args:
        logits: the first of :func:`rescaling_tables`.
        ranks: the second.
    """
    own = logits[logits.precision != "exact"]
    agree = round(float((own.top1_agreement * own.images).sum()))
    ours = "The paper's number is lost; the bound is ours."
    claims = [
        Claim(
            "Rescaling convolutions before their BatchNorm leaves the network's decisions as they are (top-1 "
            "agreement).",
            "",
            share_estimate(agree, int(own.images.sum())),
            above=0.98,
            note=ours,
        )
    ]
    for key, words in QUANTITIES.items():
        stays = key in ("folded_norm", "normalised_variance")
        claims.append(
            Claim(
                f"It {'keeps' if stays else 'changes'} the ranking of channels by {words} (Kendall's tau).",
                "",
                best_estimate(ranks, key),
                above=0.99 if stays else None,
                below=None if stays else 0.5,
                note=ours,
            )
        )
    return claims


def rescaling_section(inputs: EvidenceInputs) -> Section:
    """Assemble the evidence on rescaling before BatchNorm of one network; intervals are over its layers.

    Raises:
        NotApplicableError: see :func:`rescaling_tables`.
    """
    logits, ranks = rescaling_tables(inputs)
    return Section(
        "rescaling",
        "Which rankings are of the network's function, and which of how its weights happen to be scaled?",
        {"rescaling_logits": logits, "rescaling_ranks": ranks},
        rescaling_claims(logits, ranks),
        [
            Drawing(
                "rescaling",
                lambda: rescaling_figure(ranks),
                "How much of a layer's ranking of channels survives a rescaling that leaves the network's function as "
                "it is (Kendall's tau: 1 the same, 0 unrelated).",
            )
        ],
        follows="Raw scores, weight norm and input capture among them, move under a rescaling that the network does "
        "not notice. They rank channels in the scale that training left; with BatchNorm folded in, or after it, they "
        "do not depend on it.",
        fails="The factors, from a quarter to four, are artificial: training with weight decay keeps the scales of a "
        "layer's channels closer to each other.",
    )


def rescaling_figure(ranks: pd.DataFrame) -> Figure:
    """Draw the agreement of the rankings before and after.

    Args:
        ranks: the second of :func:`rescaling_tables`.

    Example:
        >>> cells = pd.DataFrame({key: [0.2, 0.3] for key in QUANTITIES})
        >>> len(rescaling_figure(cells).axes)
        1
    """
    figure, (axes,) = panels(1, 2.6)
    rows = {
        words.replace(" with BatchNorm", "\nwith BatchNorm"): ranks[key].tolist() for key, words in QUANTITIES.items()
    }
    strips(axes, rows, label="Kendall's tau, before with after")
    axes.set_xlim(min(-0.2, float(ranks[list(QUANTITIES)].min().min()) - 0.05), 1.03)
    return figure
