"""What is found out before the first of several passes over a calibration set, and must be so in each of them."""

from __future__ import annotations

import torch
from torch import nn

from tp_twoaxis.errors import TwoAxisError
from tp_twoaxis.runtime.batches import Batch
from tp_twoaxis.statistics.layouts import BatchLayout
from tp_twoaxis.statistics.sampling import image_keys


class Survey:
    """The plan of a calibration, and the images that it was made with.

    Args:
        layouts: name -> where the layer has its images.
        expected: images in the whole set, or None.
        passes: the layers of each pass, by name.
        first: the first batch.

    Attributes:
        columns: task variable -> its columns, once they are known.
    """

    def __init__(
        self,
        layouts: dict[str, BatchLayout],
        expected: int | None,
        passes: list[dict[str, nn.Module]],
        first: Batch,
    ) -> None:
        self.layouts = layouts
        self.expected = expected
        self.passes = passes
        self.columns: dict[str, tuple[int, int]] = {}
        self._keys = image_keys(*first.inputs.tensors)
        self._images: int | None = None

    def check_batch(self, first: Batch, number: int) -> None:
        """Check that a pass begins with the images that the first one began with.

        Raises:
            TwoAxisError: it does not.
        """
        if not torch.equal(image_keys(*first.inputs.tensors), self._keys):
            raise self._changed(number, "other images in its first batch than in that of the first pass")

    def check_count(self, images: int, number: int) -> None:
        """Check that a pass had as many images as the first one.

        Raises:
            TwoAxisError: it had more or fewer.
        """
        if self._images is None:
            self._images = images
        if images != self._images:
            raise self._changed(number, f"{images} images, {self._images} in the first pass")

    def _changed(self, number: int, what: str) -> TwoAxisError:
        return TwoAxisError(
            f"loader: pass {number + 1} of {len(self.passes)} got {what}; calibration in several passes needs the same "
            "images in the same order every time: switch shuffling and random augmentation off, or leave max_memory out"
        )
