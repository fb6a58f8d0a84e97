"""Where the weights would go to raise either axis, and where the loss sends them (paper, proposition 1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from tp_twoaxis.diagnostics.axis_coordinates import relative_depths, task_cells
from tp_twoaxis.diagnostics.evidence import Claim, Drawing, EvidenceInputs, NotApplicableError, Section
from tp_twoaxis.diagnostics.learning import IMAGES, LAYERS, check_snapshots, models_by_epoch
from tp_twoaxis.diagnostics.learning_figures import draw_gradients, draw_gradients_by_epoch
from tp_twoaxis.diagnostics.run_aggregates import RUN, best_estimate, with_runs
from tp_twoaxis.errors import check_name
from tp_twoaxis.reconstruction.patches import padded, pooled_patches
from tp_twoaxis.runtime.forward import find_logits, forward_pass
from tp_twoaxis.runtime.layers import channel_layers, channel_weight, spread_over_depth
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.scores.information import RESOLUTION
from tp_twoaxis.statistics.targets import LABEL_FREE, LABELLED, task_variables

# cosines count as near 0 within this (ours; the paper's bounds are lost)
NEAR_ZERO = 0.2
TARGETS_OF_ONE_NUMBER = [name for name in (*LABELLED, *LABEL_FREE) if name != "one_vs_rest"]


def capture_gradient(weights: Tensor, products: Tensor) -> Tensor:
    """Slope of input capture in weight space, ``grad I = S w / (s2 + P)`` with ``P = w' S w`` (proposition 1).

    The noise floor s2 is the layer's median positive P and stands still while one channel's weights move.

    Args:
        weights: [C, d].
        products: [C, d], ``S w`` of each channel, S the covariance of the layer's patches over images and positions.

    Returns:
        [C, d] in nats a unit of weight; NaN for channels with P = 0.
    """
    power = (weights * products).sum(1)
    positive = power[power > 0]
    noise = positive.quantile(0.5) if len(positive) else power.new_tensor(math.nan)
    return torch.where((power > 0)[:, None], products / (noise + power)[:, None], math.nan)


def information_gradient(weights: Tensor, products: Tensor, covariance: Tensor, target_variance: Tensor) -> Tensor:
    """Slope of task information in weight space, at right angles to the weights (proposition 1).

    With ``a = w' c``, ``V = w' S' w`` and ``rho^2 = a^2 / (V var T)``:
    ``grad M = a / (var T V (1 - rho^2)) (c - (a / V) S' w)``; the target stands still while the weights move.

    Args:
        weights: [C, d].
        products: [C, d], ``S' w`` of each channel, S' the covariance of the pooled patches over images.
        covariance: [C, d], c, of the pooled patches with the target.
        target_variance: var T, positive.

    Returns:
        [C, d] in nats a unit of weight; NaN for channels with V = 0.
    """
    a = (weights * covariance).sum(1, keepdim=True)
    variance = (weights * products).sum(1, keepdim=True)
    unexplained = (1.0 - a.square() / (variance * target_variance)).clamp_min(RESOLUTION)
    factor = a / (target_variance * variance * unexplained)
    return torch.where(variance > 0, factor * (covariance - a / variance * products), math.nan)


@dataclass(frozen=True)
class WeightGradients:
    """Slopes in the weight space of a convolution's C channels, [C, d] float64 each.

    Attributes:
        weights: w.
        capture: of I, see :func:`capture_gradient`.
        information: of M, see :func:`information_gradient`.
        loss: of the mean cross-entropy.
    """

    weights: Tensor
    capture: Tensor
    information: Tensor
    loss: Tensor


def weight_gradients(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    target: str = "margin",
    max_images: int | None = IMAGES,
    progress: bool = True,
) -> dict[str, WeightGradients]:
    """Compute all three slopes of two-dimensional convolutions in one forward and backward pass.

    The network runs in evaluation mode, so that the loss's slope is that of the frozen network: BatchNorm's statistics
    stand still and weight decay is not in it (ours; the paper does not say). No covariance of patches is formed:
    ``S w`` is the covariance of patches and outputs, which one product gives for all channels and positions.

    Args:
        model: a classifier; afterwards it is as before, gradients included.
        loader: yields ``(images, labels)``.
        layers: names; default all ``nn.Conv2d``.
        target: a task variable of one number an image.
        max_images: read so many.
        progress: show a bar on stderr.

    Returns:
        Layer -> its slopes.

    Raises:
        NotApplicableError: there is no such convolution, or the target is the same for all images.
        TwoAxisError: labels are missing, the target is unknown, or the model raised.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        >>> slopes = weight_gradients(net, [(torch.randn(32, 3, 6, 6), torch.randint(3, (32,)))], progress=False)["0"]
        >>> slopes.information.shape, float((slopes.weights * slopes.information).sum(1).abs().max()) < 1e-6
        (torch.Size([4, 27]), True)
    """
    check_name("target", target, TARGETS_OF_ONE_NUMBER)
    network = unwrap(model)
    found = {n: m for n, m in channel_layers(network, layers).items() if isinstance(m, nn.Conv2d)}
    if not found:
        raise NotApplicableError(f"{type(network).__name__} has no two-dimensional convolution to differentiate")
    sums = {name: _Sums(layer) for name, layer in found.items()}
    with forward_pass(
        network,
        loader,
        what="gradients of the axes",
        max_images=max_images,
        labels="required",
        gradients=True,
        progress=progress,
    ) as run:
        for name, layer in found.items():
            run.hook(layer, sums[name].keep)
        for batch, output in run:
            logits = find_logits(output, network)
            assert batch.labels is not None
            labels = batch.labels.to(logits.device)
            variable = task_variables(logits, labels)[target]
            ran = [entry for entry in sums.values() if entry.written is not None]
            if not ran:
                raise NotApplicableError("none of the convolutions ran in the forward pass")
            exact = logits if logits.dtype == torch.float64 else logits.float()
            loss = F.cross_entropy(exact, labels, reduction="sum")
            outputs = [entry.written for entry in ran if entry.written is not None]
            slopes = torch.autograd.grad(loss, outputs, materialize_grads=True)
            for entry, slope in zip(ran, slopes, strict=True):
                entry.add(variable, slope)
    return {name: entry.gradients() for name, entry in sums.items() if entry.images}


class _Sums:
    """Sums over images of one convolution; values are taken relative to the first batch's, so that no digits cancel."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer
        self.images = 0
        self.written: Tensor | None = None
        self._read = torch.empty(0)
        self._totals: dict[str, Tensor] = {}
        self._shift: tuple[Tensor, Tensor, Tensor] | None = None

    def keep(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Keep what the layer reads and writes; what comes after it may change its own copy in place."""
        self._read = inputs[0].detach()
        self.written = output if output.requires_grad else output.detach().requires_grad_()
        return self.written.clone()

    @torch.no_grad()
    def add(self, variable: Tensor, slope: Tensor) -> None:
        """Add a batch: its target [n, 1] and the slope of its summed loss in what the layer wrote."""
        layer, read, written = self.layer, self._read, self.written
        assert written is not None
        blocks, positions = layer.groups, written[0, 0].numel()
        patches = pooled_patches(read, layer).double()
        pooled = written.mean((2, 3)).double().reshape(len(read), blocks, -1)
        target = variable.double()
        if self._shift is None:
            self._shift = patches.mean(0), pooled.mean(0), target.mean(0)
        x0, y0, t0 = self._shift
        patches, pooled, target = patches - x0, pooled - y0, target - t0
        rows = self._products(written - y0.reshape(1, -1, 1, 1).to(written))
        batch = {
            "patches": patches.sum(0),
            "pooled": pooled.sum(0),
            "target": target.sum(),
            "rows": rows / positions,
            "pooled_products": torch.einsum("nbd,nbo->bod", patches, pooled),
            "target_products": torch.einsum("nbd,n->bd", patches, target[:, 0]),
            "target_power": target.square().sum(),
            "loss": self._products(slope),
        }
        self._totals = batch if not self.images else {key: self._totals[key] + value for key, value in batch.items()}
        self.images += len(read)
        self.written = None

    def _products(self, values: Tensor) -> Tensor:
        """Sum of products of patches with [n, C, h, w], [blocks, O, d]: what makes a weight's gradient."""
        layer = self.layer
        x = padded(self._read, layer)
        shape, strides = layer.weight.shape, (layer.stride, 0, layer.dilation, layer.groups)
        products: Tensor = conv2d_weight(x, shape, values, *strides)  # type: ignore[no-untyped-call]
        return products.double().reshape(layer.groups, -1, layer.weight[0].numel())

    def gradients(self) -> WeightGradients:
        """The slopes, from the sums."""
        assert self._shift is not None
        n, sums = self.images, {key: value / self.images for key, value in self._totals.items()}
        patches = sums["patches"][:, None]
        # rows are relative to y0 alone, and all patches' mean is that of the pooled ones
        rows = sums["rows"] - (patches + self._shift[0][:, None]) * sums["pooled"][..., None]
        pooled = sums["pooled_products"] - patches * sums["pooled"][..., None]
        covariance = sums["target_products"] - sums["patches"] * sums["target"]
        variance = sums["target_power"] - sums["target"].square()
        if not variance > RESOLUTION * (self._shift[2].square().sum() + sums["target_power"]):
            raise NotApplicableError(f"the target is the same for all {n} images; expected one that varies")
        weights = channel_weight(self.layer).double()
        covariance = covariance[:, None].expand_as(pooled).reshape_as(weights)
        return WeightGradients(
            weights.cpu(),
            capture_gradient(weights, rows.reshape_as(weights)).cpu(),
            information_gradient(weights, pooled.reshape_as(weights), covariance, variance).cpu(),
            sums["loss"].reshape_as(weights).cpu(),
        )


def alignment_table(gradients: Mapping[str, WeightGradients], depths: Mapping[str, float]) -> pd.DataFrame:
    """Mean cosines over each layer's channels.

    Returns:
        A row a layer: layer, depth, channels (those with both slopes), ``weights`` d of a channel, then means of the
        cosines ``capture_information`` between grad I and grad M, and ``descent_capture`` and ``descent_information``
        of minus the loss's slope with either, and of the first one's absolute value. Channels without one of the two
        directions are left out. Unrelated directions have a mean absolute cosine of about ``sqrt(2 / (pi d))``,
        ``chance``.
    """
    rows = []
    for name, slopes in gradients.items():
        across = _cosines(slopes.capture, slopes.information)
        rows.append(
            {
                "layer": name,
                "depth": depths[name],
                "channels": int((~across.isnan()).sum()),
                "weights": slopes.weights.shape[1],
                "capture_information": float(across.nanmean()),
                "descent_capture": float(_cosines(-slopes.loss, slopes.capture).nanmean()),
                "descent_information": float(_cosines(-slopes.loss, slopes.information).nanmean()),
                "absolute": float(across.abs().nanmean()),
                "chance": math.sqrt(2 / (math.pi * slopes.weights.shape[1])),
            }
        )
    return pd.DataFrame(rows)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of [C, d] with its partner, [C]; NaN where either has no direction."""
    lengths = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(lengths > 0, (a * b).sum(1) / lengths, math.nan)


def gradients_by_epoch(inputs: EvidenceInputs, target: str = "margin") -> pd.DataFrame:
    """Mean cosines after each snapshot's epoch, of six layers spread over depth.

    Returns:
        :func:`alignment_table` with a column epoch.

    Raises:
        NotApplicableError: see :func:`weight_gradients` and :func:`~tp_twoaxis.diagnostics.learning.check_snapshots`.
    """
    check_snapshots(inputs)
    depths, layers = relative_depths(inputs.cells()), spread_over_depth(task_cells(inputs), LAYERS)
    parts = []
    for epoch, model in models_by_epoch(inputs):
        slopes = weight_gradients(model, inputs.calibration, layers=layers, target=target, progress=inputs.progress)
        parts.append(alignment_table(slopes, depths).assign(epoch=epoch))
    return pd.concat(parts, ignore_index=True)


def gradients_section(inputs: EvidenceInputs) -> Section:
    """Answer whether the two axes pull a channel's weights in different directions (H2, proposition 1).

    Where there are snapshots of its training, six layers spread over depth are followed over it too.

    Raises:
        NotApplicableError: see :func:`weight_gradients` and
            :func:`~tp_twoaxis.diagnostics.axis_coordinates.task_cells`.
    """
    cells = task_cells(inputs)
    target = inputs.statistics.target
    target = target if target in TARGETS_OF_ONE_NUMBER else "margin"
    slopes = weight_gradients(inputs.model, inputs.calibration, layers=cells, target=target, progress=inputs.progress)
    table = alignment_table(slopes, relative_depths(inputs.cells()))
    tables, drawings = {"gradients": table}, [Drawing("gradients", lambda: draw_gradients(table), _CAPTION)]
    without = ""
    if inputs.snapshots:
        try:
            over = gradients_by_epoch(inputs, target)
            tables["gradients_by_epoch"] = over
            drawings.append(Drawing("gradients_by_epoch", lambda: draw_gradients_by_epoch(over), _BY_EPOCH))
        except NotApplicableError as reason:  # what there is of the trained network stands
            without = f" The course of training is left out: {reason}."
    return Section(
        "gradients",
        "Do the two axes pull a channel's weights in different directions?",
        tables,
        gradient_claims(tables),
        drawings,
        follows="Training along one axis need not move a channel along the other, so that neither score stands for "
        "the other in a trained network.",
        fails="A mean cosine near 0 hides channels whose slopes agree or oppose: the table has the mean absolute "
        "cosine beside that of unrelated directions. The slopes are those of Gaussian proxies with a target that "
        "stands still, and in evaluation mode BatchNorm's statistics do so too (ours); that a direction is there does "
        "not say that training takes it." + without,
    )


def gradient_claims(tables: Mapping[str, pd.DataFrame]) -> list[Claim]:
    """Judge the directions of the axes in weight space.

    Args:
        tables: ``gradients`` and, where training was followed, ``gradients_by_epoch`` of :func:`gradients_section`; of
            several networks below each other, with the columns ``network`` and ``seed``, intervals are over models
            where a backbone has three, otherwise over layers.
    """
    table, within = tables["gradients"], f"bounds of {NEAR_ZERO} are ours"
    claims = [
        Claim(
            "the slopes of input capture and task information are close to orthogonal",
            "close to 0",
            best_estimate(table, "capture_information"),
            above=-NEAR_ZERO,
            below=NEAR_ZERO,
            note=within,
        ),
        Claim(
            "after training, descent of the loss has a small positive component along input capture",
            "small and positive",
            best_estimate(table, "descent_capture"),
            above=0.0,
            below=NEAR_ZERO,
            note=within,
        ),
    ]
    return claims + ([_claim_of_training(tables["gradients_by_epoch"])] if "gradients_by_epoch" in tables else [])


def _claim_of_training(over: pd.DataFrame) -> Claim:
    parts, epochs = [], list[str]()
    for _, run in with_runs(over).groupby(RUN, sort=False):
        first, last = (run[run.epoch == epoch].set_index("layer") for epoch in (run.epoch.min(), run.epoch.max()))
        parts.append(first.assign(turn=first.descent_information - last.descent_information))
        epochs.append(f"epoch {run.epoch.min()} less epoch {run.epoch.max()}")
    layers = pd.concat(parts)
    return Claim(
        "descent of the loss is aligned with task information at the start more than at the end",
        "at initialization only",
        best_estimate(layers, "turn"),
        above=0.0,
        note=f"{' or '.join(dict.fromkeys(epochs))}, {len(layers)} layers",
    )


_CAPTION = (
    "Mean cosine over a layer's channels, by depth: between the slopes of input capture and task information in weight "
    "space, and of the loss's descent with either. Grey: mean absolute cosine of two unrelated directions, those of a "
    "single channel."
)
_BY_EPOCH = "The same cosines over training, mean over layers spread over depth; bands are standard errors over layers."
