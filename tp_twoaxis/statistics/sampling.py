"""Which positions of an image stand for all of them: drawn by what the image shows, so by nothing else."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tp_twoaxis.statistics.moments import float64_device

# of larger images every third, fifth, ... number is looked at, so that a key costs little beside a forward pass
KEY_NUMBERS = 2**10
_SAME_SIZE = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
_SAME_SIZE[torch.bfloat16] = torch.int16


def image_keys(*inputs: Tensor) -> Tensor:
    """Hash what each image of a batch holds.

    The hash is multilinear in the bits of up to 1,024 evenly spaced numbers of an image, with the finaliser of
    splitmix64 (Steele, Lea & Flood 2014) behind it. It is exact integer arithmetic: the same for an image wherever it
    stands, in whatever batch, memory format, process and device.

    Args:
        inputs: [n, ...] of any dtype, the tensors that make up the images of a batch.

    Returns:
        [n] int64, on the inputs' device.

    Example:
        >>> images = torch.arange(6.0).view(3, 2)
        >>> torch.equal(image_keys(images)[1:], image_keys(images[1:])), len(image_keys(images).unique())
        (True, 3)
    """
    keys = torch.zeros(len(inputs[0]), dtype=torch.int64, device=inputs[0].device)
    for number, images in enumerate(inputs):
        flat = images.detach().reshape(len(images), -1)
        flat = flat[:, :: -(-flat.shape[1] // KEY_NUMBERS) | 1]  # odd: a step that divides the width sees few columns
        bits = flat.view(_SAME_SIZE[flat.dtype]) if flat.dtype in _SAME_SIZE else flat
        factors = _factors(flat.shape[1], number).to(flat.device)
        keys = _mix(keys.to(flat.device) + (bits.to(torch.int64) * factors).sum(1))
    return keys


def sampled_positions(keys: Tensor, available: int, wanted: int) -> Tensor:
    """Draw ``wanted`` of ``available`` positions for each image, one from each of equally long stretches.

    A stretch is ``available / wanted`` positions long, not rounded, and its draw is uniform: over images each position
    is as likely as any other. Neighbouring stretches share a position where they do not end on whole numbers, and may
    then both draw it.

    Args:
        keys: [n] int64, of :func:`image_keys`.
        available: positions of an image.
        wanted: how many to draw, at most as many.

    Returns:
        [n, wanted] int64, increasing along each row; equal keys give equal rows.

    Example:
        >>> sampled_positions(torch.tensor([7, 7, 8]), 64, 4).shape
        torch.Size([3, 4])
    """
    keys = keys.to(float64_device(keys.device))
    stretches = torch.arange(wanted, dtype=torch.int64, device=keys.device)
    bits = _mix(keys[:, None] + _mix(stretches + 1))
    within = (bits >> 11 & (2**53 - 1)).double() * 2.0**-53
    return ((stretches + within) * (available / wanted)).long().clamp_(max=available - 1)


def select_rows(view: Tensor, positions: Tensor) -> Tensor:
    """Gather positions [n, wanted] of [n, P, C]; along the dense dimension, which is P when channels come first.

    Example:
        >>> select_rows(torch.arange(6).view(2, 3, 1), torch.tensor([[0, 2], [1, 1]]))[..., 0].tolist()
        [[0, 2], [4, 4]]
    """
    positions = positions.to(view.device)
    if view.stride(1) == 1 and view.stride(2) != 1:
        index = positions[:, None].expand(-1, view.shape[2], -1)
        return view.transpose(1, 2).gather(2, index).transpose(1, 2)
    starts = torch.arange(len(view), device=view.device)[:, None]
    if view.is_contiguous():  # rows copied whole, several times faster on a CPU than by two indices
        rows = view.flatten(0, 1).index_select(0, (starts * view.shape[1] + positions).ravel())
        return rows.view(*positions.shape, view.shape[2])
    return view[starts, positions]


def stratified(available: int, wanted: int) -> Tensor:
    """Pick ``wanted`` of ``available`` positions, one at random from each of equally long stretches, without an image.

    Returns:
        [wanted] increasing indices; the same ones on every call.

    Example:
        >>> stratified(4, 4).tolist(), len(stratified(1024, 16).unique())
        ([0, 1, 2, 3], 16)
    """
    generator = torch.Generator().manual_seed(0)
    edges = torch.arange(wanted + 1) * available // wanted
    offsets = torch.rand(wanted, generator=generator, dtype=torch.float64) * (edges[1:] - edges[:-1])
    return edges[:-1] + offsets.long()


@lru_cache(maxsize=8)
def _factors(numbers: int, stream: int) -> Tensor:
    """Odd 64-bit factors, one a number of an image."""
    return _mix(torch.arange(numbers, dtype=torch.int64) + (stream << 40) + 1) | 1


def _mix(x: Tensor) -> Tensor:
    """Scramble int64, one to one: splitmix64's finaliser; products wrap, shifts are logical."""
    x = (x ^ (x >> 30 & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (2**33 - 1))


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
