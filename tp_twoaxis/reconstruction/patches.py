"""The patches that a layer computes its outputs from, at all positions or at some drawn for each image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from tp_twoaxis.runtime.layers import blocks_of, flatten_positions, weight_blocks
from tp_twoaxis.statistics.sampling import sampled_positions, select_rows

# numbers in a patch (inputs x taps) up to which a layer is fitted: the normal equations then take 162 MiB, and
# their factor as much; of sequential repair up to three such layers are alive at a time
LARGEST_PATCH = 4608
# rows of a fit: this many a number of the patch, within these bounds. Narrow layers can gain from many positions of
# an image (``benchmarks/fit_rows.py``: one network of two does)
ROWS_PER_NUMBER, FEWEST_ROWS, MOST_ROWS = 64, 2**16, 2**17
# and this many where a layer has many blocks, each with a fit of its own to make
FEWEST_ROWS_OF_BLOCKS = 2**14


def patch_size(layer: nn.Module) -> int:
    """Numbers that one output of a layer is computed from: inputs of its block x taps.

    Example:
        >>> patch_size(nn.Conv2d(16, 8, 3, groups=2)), patch_size(nn.Linear(5, 2))
        (72, 5)
    """
    return int(weight_blocks(layer)[0, 0].numel())


def patch_rows(x: Tensor, layer: nn.Module, positions: Tensor) -> Tensor:
    """Gather the patches behind some outputs of a layer, padding included.

    Args:
        x: the layer's input, [n, C, *spatial] of a convolution, [n, *, C] of a linear layer.
        layer: a convolution of 1 to 3 dimensions, any stride, padding, dilation and groups, or a linear layer.
        positions: [p] int64, output positions in row-major order, or [n, p], other ones for each image.

    Returns:
        [n, p, blocks, patch] with ``patch`` ordered as in the layer's weight.

    Example:
        >>> conv, x = nn.Conv2d(2, 1, 3, padding=1, bias=False), torch.randn(4, 2, 5, 5)
        >>> rows = patch_rows(x, conv, torch.tensor([0, 7]))
        >>> torch.allclose(rows[:, :, 0] @ conv.weight.reshape(-1), conv(x).reshape(4, 25)[:, [0, 7]], atol=1e-5)
        True
    """
    if not isinstance(layer, _ConvNd):
        return select_positions(flatten_positions(x, layer, len(x), ""), positions)[:, :, None]
    view = _windows(x, layer)
    # only the chosen positions are copied
    places = torch.unravel_index(positions, view.shape[2 : 2 + len(layer.kernel_size)])
    if positions.ndim == 2:
        image = torch.arange(len(x), device=positions.device)[:, None]
        chosen: tuple[slice | Tensor, ...] = (image, slice(None), *places)
        rows = view[chosen]  # [n, p, C, *taps]
    else:
        everything: tuple[slice | Tensor, ...] = (slice(None), slice(None))
        rows = view[everything + places].movedim(2, 1)
    return rows.reshape(len(x), positions.shape[-1], layer.groups, -1)


def padded(x: Tensor, layer: _ConvNd) -> Tensor:
    """Pad what a convolution reads as it does itself, [n, C, *spatial]."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def pooled_patches(x: Tensor, layer: _ConvNd) -> Tensor:
    """Average the patches behind all outputs of a convolution, padding included.

    Args:
        x: the layer's input, [n, C, *spatial].
        layer: a convolution of 1 to 3 dimensions, not transposed.

    Returns:
        [n, blocks, patch] in the dtype of ``x``: what the layer makes of it, plus its bias, are the pooled outputs.

    Example:
        >>> conv, x = nn.Conv2d(2, 1, 3, stride=2, padding=1, bias=False), torch.randn(4, 2, 5, 5)
        >>> pooled = pooled_patches(x, conv)[:, 0] @ conv.weight.reshape(-1)
        >>> torch.allclose(pooled, conv(x).mean((1, 2, 3)), atol=1e-6)
        True
    """
    positions = tuple(range(2, 2 + len(layer.kernel_size)))
    return _windows(x, layer).mean(positions).reshape(len(x), layer.groups, -1)


def _windows(x: Tensor, layer: _ConvNd) -> Tensor:
    """View what a convolution reads as [n, C, *out, *taps], without a copy of what is padded."""
    view = padded(x, layer)
    for d, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        view = view.unfold(2 + d, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return view


def select_positions(view: Tensor, positions: Tensor) -> Tensor:
    """Select [n, p, C] of [n, positions, C], at positions [p] of all images or [n, p] of each."""
    return view.index_select(1, positions) if positions.ndim == 1 else select_rows(view, positions)


def positions_of(
    layer: nn.Module,
    available: int,
    images: int,
    drawn: range,
    rows_per_number: int = ROWS_PER_NUMBER,
    fewest: int = FEWEST_ROWS,
) -> Tensor:
    """Choose output positions for a fit: all, or one at random from each of equally long stretches of every image.

    Args:
        layer: decides how many are needed, up to :data:`MOST_ROWS`.
        available: output positions of an image.
        images: that the fit has in all.
        drawn: numbers of the images to choose positions for; the same image number always has the same positions.
        rows_per_number: rows of all images together, a number of the patch.
        fewest: rows at least, shared by the layer's blocks, though each has 16,384.

    Returns:
        [available] or [len(drawn), p] int64.

    Example:
        >>> positions_of(nn.Conv2d(4, 4, 3), 64, 2048, range(3)).shape
        torch.Size([3, 32])
        >>> positions_of(nn.Conv2d(64, 4, 3), 64, 512, range(3)).shape
        torch.Size([64])
        >>> positions_of(nn.Conv2d(64, 64, 3, groups=64), 64, 2048, range(3)).shape
        torch.Size([3, 8])
    """
    needed = rows_wanted(layer, rows_per_number, fewest)
    wanted = min(available, max(1, -(-needed // images)))
    if wanted == available:
        return torch.arange(available)
    return sampled_positions(torch.tensor(drawn), available, wanted)


def rows_wanted(layer: nn.Module, rows_per_number: int = ROWS_PER_NUMBER, fewest: int = FEWEST_ROWS) -> int:
    """Count the rows that a fit of a layer should have, of all images together.

    Example:
        >>> rows_wanted(nn.Conv2d(4, 4, 3)), rows_wanted(nn.Conv2d(256, 4, 3))
        (65536, 131072)
    """
    fewest = max(fewest // blocks_of(layer), FEWEST_ROWS_OF_BLOCKS)
    return min(max(rows_per_number * patch_size(layer), fewest), MOST_ROWS)


def fits(layer: nn.Module, limit: int = LARGEST_PATCH) -> bool:
    """Whether a layer's patch is small enough for :class:`~tp_twoaxis.reconstruction.patch_fit.PatchFit`.

    Example:
        >>> fits(nn.Conv2d(512, 512, 3)), fits(nn.Conv2d(1024, 64, 3))
        (True, False)
    """
    return patch_size(layer) <= limit and blocks_of(layer) * patch_size(layer) ** 2 <= LARGEST_PATCH**2
