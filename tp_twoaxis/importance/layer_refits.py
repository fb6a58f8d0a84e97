"""What takes the place of a layer that loses inputs: weights fitted to whole patches, or predicted inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.reconstruction.affine import affine_reconstruction, ridge_for
from tp_twoaxis.reconstruction.patch_removal import Patches
from tp_twoaxis.reconstruction.patches import fits, patch_rows, patch_size, positions_of
from tp_twoaxis.runtime.forward import forward_pass
from tp_twoaxis.runtime.kernels import kernel_input
from tp_twoaxis.runtime.layers import blocks_of, channel_axis, flatten_positions, weight_blocks
from tp_twoaxis.runtime.weights import add_bias, cannot_refit, write_weight
from tp_twoaxis.statistics.moments import CoMoments, float64_device
from tp_twoaxis.statistics.store import CalibrationStatistics

# numbers in a patch up to which it is fitted as a whole, and rows a number: their moments then cost no more than a few
# passes over the images; of larger ones the channels are
LARGEST_FITTED_PATCH = 2048
ROWS_PER_NUMBER, FEWEST_ROWS = 16, 2**14


@dataclass(frozen=True)
class LayerChange:
    """How a layer runs without some of its inputs: with other parameters, or behind a hook that predicts them.

    Attributes:
        layer: of the network that distortion is measured on.
        parameters: its weight and bias instead of its own, or None.
        hook: a forward pre-hook with keyword arguments, or None.
    """

    layer: nn.Module
    parameters: tuple[Any, Any] | None = None
    hook: Callable[..., Any] | None = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run a block with the layer changed."""
        if self.hook is not None:
            handle = self.layer.register_forward_pre_hook(self.hook, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()
        else:
            assert self.parameters is not None
            own = self.layer.weight, self.layer.bias
            self.layer.weight, self.layer.bias = self.parameters
            try:
                yield
            finally:
                self.layer.weight, self.layer.bias = own


class LayerRefits:
    """Changes of a network's layers that lose inputs, as repair would make them.

    A layer that mixes all its channels, with patches of at most 2,048 numbers, gets the weights that ``patch`` repair
    would fit. Of other layers each missing input is replaced by its best affine prediction from those that remain, as
    the ``ridge`` repair does it; where no statistics of its inputs were recorded, by zeros.

    Args:
        network: dense; its layers are changed while a change is applied, and only then.
        stats: its statistics by ``calibrate(consumers=True)``.
        batches: images to fit on, [n, ...] each.
    """

    def __init__(self, network: nn.Module, stats: CalibrationStatistics, batches: list[Tensor]) -> None:
        self.network = network
        self.layers = dict(network.named_modules())
        self.stats = stats
        self.batches = batches
        self._patches: dict[str, Patches] = {}

    def patches(self, names: Iterable[str]) -> Mapping[str, Patches]:
        """Give moments of the patches of some layers; those that are not known are gathered in one pass.

        Layers whose patches are too large, or whose channels do not all mix, are left out.
        """
        wanted = [name for name in names if _has_patches(self.layers[name])]
        unknown = [name for name in dict.fromkeys(wanted) if name not in self._patches]
        if unknown:
            self._patches |= self._gather(unknown)
        return {name: self._patches[name] for name in wanted if name in self._patches}

    def forget(self) -> None:
        """Free the moments."""
        self._patches.clear()

    @torch.no_grad()
    def _gather(self, names: list[str]) -> dict[str, Patches]:
        # of every four images one is held out to choose ridges
        moments: dict[str, tuple[CoMoments, CoMoments]] = {}
        count = sum(map(len, self.batches))
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
                drawn = range(first, seen[name])
                positions = positions_of(layer, available, count, drawn, ROWS_PER_NUMBER, FEWEST_ROWS).to(x.device)
                held_out = (torch.arange(first, seen[name]) % 4 == 3).to(x.device)
                rows = patch_rows(x, layer, positions)
                for own, chosen in zip(moments[name], (rows[~held_out], rows[held_out]), strict=True):
                    own.update(chosen.flatten(0, 2))

            return take

        with ExitStack() as stack:
            for name in names:
                stack.callback(self.layers[name].register_forward_hook(hook(name), with_kwargs=True).remove)
            with forward_pass(self.network, self.batches, what="anticipate") as run:
                for _ in run:
                    pass
        return {
            name: Patches(_described(fitted), _described(held_out) if held_out.count else None)
            for name, (fitted, held_out) in moments.items()
        }

    def change(self, name: str, missing: Tensor) -> LayerChange:
        """Make a layer do without some inputs.

        Args:
            name: of the layer.
            missing: [C_in] bool; at least one is true.
        """
        patches = self.patches([name]).get(name)
        return self._predict(name, missing) if patches is None else self._refit(name, missing, patches)

    def _refit(self, name: str, missing: Tensor, patches: Patches) -> LayerChange:
        layer = self.layers[name]
        own = layer.weight, layer.bias
        weight = weight_blocks(layer)[0].cpu()  # [O, C_in, taps]
        refitted, shift = patches.refit(weight.flatten(1), missing.cpu().repeat_interleave(weight.shape[2]))
        write_weight(layer, refitted)
        add_bias(layer, shift, None)
        parameters = layer.weight, layer.bias
        layer.weight, layer.bias = own
        return LayerChange(layer, parameters)

    def _predict(self, name: str, missing: Tensor) -> LayerChange:
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

        return LayerChange(layer, hook=hook)


def _described(moments: CoMoments) -> tuple[Tensor, Tensor]:
    return moments.mean.cpu(), moments.covariance.cpu()


def _has_patches(layer: nn.Module) -> bool:
    """Whether a layer mixes all its channels and its patch is small enough."""
    return (
        isinstance(layer, (_ConvNd, nn.Linear))
        and cannot_refit(layer) is None
        and blocks_of(layer) == 1
        and fits(layer, LARGEST_FITTED_PATCH)
    )
