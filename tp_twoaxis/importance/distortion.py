"""How far a network's logits move when channels leave and their consumers are refitted: measured, not modelled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from tqdm.auto import tqdm

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.reconstruction.affine import (
    LEAST_RIDGE,
    AffineReconstruction,
    absorb_into_weight,
    affine_reconstruction,
    held_out_error,
    ridge_for,
)
from tp_twoaxis.reconstruction.patches import fits, patch_rows, patch_size, positions_of
from tp_twoaxis.reconstruction.ridge import COARSE_RIDGES
from tp_twoaxis.runtime.batches import image_batches
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.kernels import kernel_input
from tp_twoaxis.runtime.layers import blocks_of, channel_axis, flatten_positions, weight_blocks
from tp_twoaxis.runtime.model_state import unwrap
from tp_twoaxis.runtime.weights import add_bias, cannot_refit, write_weight
from tp_twoaxis.statistics.moments import CoMoments, float64_device
from tp_twoaxis.statistics.store import CalibrationStatistics

# images that run at a time
BATCH = 128
# images that are read at most, in units of those that distortion is measured on
FITTED_IMAGES = 4


@dataclass(frozen=True)
class Patches:
    """Moments of what one output of a layer is computed from: channel by channel, each with all taps.

    Attributes:
        fitted: mean [C_in taps] and covariance [C_in taps, C_in taps], float64.
        held_out: the same of other images, to choose the ridge of a fit; None if there are none.
    """

    fitted: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor] | None

    def reconstruct(self, weight: Tensor, missing: Tensor) -> AffineReconstruction:
        """Predict missing numbers from the others, with the ridge that serves a layer best on the images held out.

        Args:
            weight: [O, C_in taps], of the layer.
            missing: [C_in taps] bool.
        """
        if self.held_out is None:
            return affine_reconstruction(*self.fitted, missing, ridge=LEAST_RIDGE)
        mean, covariance = self.held_out
        found = [affine_reconstruction(*self.fitted, missing, ridge=ridge) for ridge in COARSE_RIDGES]
        return min(found, key=lambda one: held_out_error(weight[..., None], one, mean, covariance))


class Distortion:
    """Measures the distortion of a dense network's logits for given missing inputs of its layers, on a few images.

    A missing input of a layer is replaced by its best affine prediction from the inputs that remain, as the ``ridge``
    repair does it, or, with moments of the layer's patches, by the least squares over patches that ``patch``
    repair uses; nothing is removed, no weight changes for longer than a call. Patches are fitted on other images than
    those on which the distortion is measured: on the same ones a wide layer before the head would look free, because
    few images are fitted by its many weights. The **distortion** is the logits' mean
    squared distance from the dense network's, relative to their variance over the images: 0 where nothing changes, 1
    where the logits hold no more than their mean, more where they mislead. Unlike a divergence between the predicted
    classes it does not vanish for a network that is sure of every calibration image.

    Copies of an object share the network, the images and all that was measured.

    Args:
        model: dense; copied.
        stats: its statistics by ``calibrate(consumers=True)``.
        loader: yields ``(images, labels)`` or images; labels are not used.
        images: measure on so many, and fit on up to three times as many others; of fewer, two fifths are measured on.
        max_images: read no more than that.
        progress: show progress bars on stderr.

    Raises:
        TwoAxisError: the loader gave no two images that the network tells apart.

    Example:
        >>> from tp_twoaxis import calibrate
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        >>> loader = [torch.randn(32, 3, 8, 8)]
        >>> stats = calibrate(net, loader, target=None, consumers=True, progress=False)
        >>> distortion = Distortion(net, stats, loader, progress=False)
        >>> distortion({"3": torch.zeros(288, dtype=torch.bool)})
        0.0
    """

    def __init__(
        self,
        model: nn.Module,
        stats: CalibrationStatistics,
        loader: Iterable[Any],
        *,
        images: int = 512,
        max_images: int | None = None,
        progress: bool = True,
    ) -> None:
        self.network = copy.deepcopy(unwrap(model)).requires_grad_(False)
        self.network.zero_grad(set_to_none=True)
        self.layers = dict(self.network.named_modules())
        self.stats = stats
        self.progress = progress
        parameter = next(self.network.parameters())
        limit = FITTED_IMAGES * images if max_images is None else min(FITTED_IMAGES * images, max_images)
        with image_batches(
            loader, max_images=limit, labels=False, description="anticipate", progress=progress
        ) as batches:
            parts = [batch.images.to(parameter.device, parameter.dtype) for batch in batches]
        read = torch.cat(parts) if parts else torch.zeros(0, 1)
        measured = spread(len(read), min(images, max(2, len(read) * 2 // 5)))
        self._batches = list(torch.split(read[measured], BATCH)) if parts else []
        self._fit_batches = list(torch.split(read[~measured], BATCH)) if len(read) > 2 else self._batches
        self.example = self._batches[0][:1] if parts else torch.zeros(0)
        self._dense = self._logits() if parts else torch.zeros(0)
        self._power = float(self._dense.var(0, correction=0).sum()) if parts else 0.0
        if not self._power > 0.0:
            raise TwoAxisError(
                f"anticipating: expected images that the network tells apart, got {len(self._dense)} with the same "
                "logits; give more images"
            )
        self._bar = tqdm(desc="anticipate", unit="pass", disable=not progress, leave=False)
        self._cache: dict[Any, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Distortion:
        return self

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return what was computed under a key, once for all copies; it must not be changed."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    @torch.no_grad()
    def patches(self, names: Iterable[str]) -> dict[str, Patches]:
        """Gather moments of the patches of some layers, in one pass over the images that are fitted.

        Layers whose patches are too large, or whose channels do not all mix, are left out.
        """
        # of every four images one is held out to choose ridges
        moments: dict[str, tuple[CoMoments, CoMoments]] = {}
        count = sum(map(len, self._fit_batches))
        seen: dict[str, int] = {}

        def hook(name: str) -> Callable[..., None]:
            def take(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
                x = kernel_input(layer, inputs, named)
                if name not in moments:
                    width, device = patch_size(layer), float64_device(x.device)
                    moments[name] = CoMoments(width, device=device), CoMoments(width, device=device)
                first = seen.get(name, 0)
                seen[name] = first + len(x)
                available = flatten_positions(output, layer, len(x), name).shape[1]
                positions = positions_of(layer, available, count, range(first, seen[name])).to(x.device)
                held_out = (torch.arange(first, seen[name]) % 4 == 3).to(x.device)
                rows = patch_rows(x, layer, positions)
                for own, chosen in zip(moments[name], (rows[~held_out], rows[held_out]), strict=True):
                    own.update(chosen.flatten(0, 2))

            return take

        wanted = [name for name in names if _has_patches(self.layers[name])]
        if not wanted:
            return {}
        with ExitStack() as stack:
            for name in wanted:
                stack.callback(self.layers[name].register_forward_hook(hook(name), with_kwargs=True).remove)
            self._logits(self._fit_batches)
        return {
            name: Patches(_described(fitted), _described(held_out) if held_out.count else None)
            for name, (fitted, held_out) in moments.items()
        }

    @torch.no_grad()
    def __call__(self, missing: dict[str, Tensor], patches: Mapping[str, Patches] | None = None) -> float:
        """Measure.

        Args:
            missing: layer name -> [C_in] bool, inputs that it has to do without.
            patches: layer name -> moments of its patches; the other layers are refitted by channels.
        """
        with ExitStack() as stack:
            for name, inputs in missing.items():
                if patches is not None and name in patches and bool(inputs.any()):
                    stack.callback(self._refit(name, inputs, patches[name]))
                elif bool(inputs.any()):
                    hook = self._predict(name, inputs)
                    stack.callback(self.layers[name].register_forward_pre_hook(hook, with_kwargs=True).remove)
            logits = self._logits()
        self._bar.update()
        return float((logits - self._dense).square().sum(1).mean()) / self._power

    def _logits(self, batches: list[Tensor] | None = None) -> Tensor:
        batches = self._batches if batches is None else batches
        with forward_pass(self.network, batches, what="anticipate") as run:
            return torch.cat([run.logits(batch).double() for batch in run.batches])

    def _refit(self, name: str, missing: Tensor, patches: Patches) -> Callable[[], None]:
        """Write the best weights without some inputs into a layer; returns what puts its own back."""
        layer = self.layers[name]
        old = layer.weight, layer.bias
        weight = weight_blocks(layer)[0].double().cpu()  # [O, C_in, taps]
        gone = missing.cpu().repeat_interleave(weight.shape[2])
        flat = weight.flatten(1)
        reconstruction = patches.reconstruct(flat, gone)
        new = torch.zeros_like(flat)
        absorbed, shift = absorb_into_weight(
            flat[..., None], reconstruction
        )  # every number of a patch is an input of one tap
        new[:, reconstruction.kept] = absorbed[..., 0]
        write_weight(layer, new)
        add_bias(layer, shift, None)

        def restore() -> None:
            layer.weight, layer.bias = old

        return restore

    def _predict(self, name: str, missing: Tensor) -> Callable[..., Any]:
        """Make a hook that replaces missing inputs by their prediction; where none was recorded, by zeros."""
        # the package that repairs is built on importances
        layer = self.layers[name]
        entry = self.stats.layers.get(name)
        parameter = next(layer.parameters())
        kept = (~missing).nonzero()[:, 0].to(parameter.device)
        gone = missing.nonzero()[:, 0].to(parameter.device)
        weights, shift = None, None
        if entry is not None and entry.inputs is not None:
            reconstruction = affine_reconstruction(
                entry.input_mean, entry.input_covariance, missing, ridge=ridge_for(entry.num_input_rows, len(missing))
            )
            weights, shift = reconstruction.weights.to(parameter), reconstruction.shift.to(parameter)
        axis = channel_axis(layer)
        read = 3 if isinstance(layer, nn.MultiheadAttention) else 1  # query, key, value

        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            changed = [completed(x) for x in inputs[:read]]
            return (*changed, *inputs[read:]), named

        def completed(x: Tensor) -> Tensor:
            x = x.movedim(axis, -1)
            known = x.index_select(-1, kept)
            predicted = known.new_zeros(*known.shape[:-1], len(gone))
            if weights is not None and shift is not None:
                predicted = known @ weights + shift
            return x.index_copy(-1, gone, predicted).movedim(-1, axis)

        return hook


def _described(moments: CoMoments) -> tuple[Tensor, Tensor]:
    return moments.mean.cpu(), moments.covariance.cpu()


def _has_patches(layer: nn.Module) -> bool:
    """Whether a layer mixes all its channels and its patch is small enough."""
    return (
        isinstance(layer, (_ConvNd, nn.Linear))
        and cannot_refit(layer) is None
        and blocks_of(layer) == 1
        and fits(layer)
    )


def spread(total: int, chosen: int) -> Tensor:
    """Choose so many of all, evenly spread: [total] bool.

    Example:
        >>> spread(5, 2).tolist()
        [False, True, False, True, False]
    """
    found = torch.zeros(total, dtype=torch.bool)
    if chosen:
        found[((torch.arange(min(chosen, total)) + 0.5) * total / min(chosen, total)).long()] = True
    return found
