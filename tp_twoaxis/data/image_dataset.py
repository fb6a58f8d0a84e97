"""Larger images, read, resized and cropped one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tp_twoaxis.data.array_dataset import check_normalisation
from tp_twoaxis.data.sources import Source


class ImageDataset(Dataset[Any]):
    """Images that are read one by one: shorter side to ``image_size / crop_fraction``, then a centre crop.

    Items are ``(normalised float32 [3, H, W], label)``, or the image alone where labels are unknown. An image that
    already is ``image_size`` on both sides is taken as it is. Made by :func:`~tp_twoaxis.data.open_dataset`. Where
    images were drawn, ``rows`` says which of the split they are.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        crop_fraction: float,
    ) -> None:
        check_normalisation(mean, std, 3)
        self.source = source
        self.labels = source.labels
        self.rows = source.rows
        self.image_size = image_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.crop_fraction = crop_fraction

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in 0..{len(self) - 1}")
        pixels = read_pixels(self.source, index, self.image_size, self.crop_fraction)
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        image = (pixels.float() / 255 - mean) / std
        return image if self.labels is None else (image, int(self.labels[index]))


def read_pixels(source: Source, index: int, size: int | None, crop_fraction: float) -> Tensor:
    """Decode one image to uint8 ``[3, H, W]``, at its own size where ``size`` is None."""
    image = source.image(index)
    if size is not None and image.size != (size, size):
        shorter = round(size / crop_fraction)
        # integer division, as torchvision's Resize has it: a rounded side would shift the crop
        width, height = (side * shorter // min(image.size) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), resample=2)  # 2: bilinear, with antialiasing when it shrinks
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
