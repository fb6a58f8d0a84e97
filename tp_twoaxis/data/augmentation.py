"""Random crops and mirrors of whole batches, on whatever device they are."""

from __future__ import annotations

import torch
from torch import Tensor


def crop_and_flip(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Crop every image at a random offset after zero-padding by an eighth of the side, and mirror half of them.

    Args:
        images: [N, C, H, W], on any device.
        generator: a CPU generator; None uses PyTorch's global one.

    Returns:
        [N, C, H, W], in the images' dtype and memory format.

    Example:
        >>> crop_and_flip(torch.ones(2, 3, 16, 16), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 16, 16])
    """
    count, _, height, width = images.shape
    pad = max(height, width) // 8
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    down, right = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.arange(width)
    columns = torch.where(mirrored, columns.flip(0), columns) + right
    rows = torch.arange(height) + down
    batch = torch.arange(count)[:, None, None]
    rows, columns, batch = (i.to(images.device) for i in (rows[:, :, None], columns[:, None, :], batch))
    # an index on each side of the channels moves them to the end
    cropped = padded[batch, :, rows, columns].permute(0, 3, 1, 2)
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return cropped.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
